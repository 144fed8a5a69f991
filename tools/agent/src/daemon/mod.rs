//! The agent proper: one loop around `poll` that serves connections and the sessions on them.
//!
//! ```text
//!   client ══ connection ══ AgentSession ══ pipes or a terminal ══ program
//!              at most 64        at most 256; each lives on without its connection for ten minutes
//! ```
//!
//! What happens on failure: a connection that breaks the protocol is told why and closed, its session stays. A program that cannot be started
//! is a coded answer. The loop itself ends only when the kernel refuses `poll`.

pub mod connection;
pub mod listen;
mod requests;
pub mod session;
pub mod spawn;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::time::ClockId;
use wire::agent::{Demand, FailCode, FromAgent, HANGUP_GRACE_US, SessionId, Task, ToAgent};
use wire::units::Instant;

use self::connection::{Broken, Connection, Use};
use self::session::{Interest, Leftover, Session};
use crate::power;

/// Most connections at once.
pub const CONNECTIONS_MAX: usize = 64;
/// Most sessions at once.
pub const SESSIONS_MAX: usize = 256;

/// The agent.
#[derive(Debug)]
pub struct Daemon {
    listener: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    sessions: BTreeMap<SessionId, Session>,
    /// Programs whose session was closed, and when they are killed.
    leftovers: Vec<(Leftover, Instant)>,
    /// Input devices that may be the power button.
    buttons: Vec<File>,
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Connection(u64),
    Session(SessionId, Interest),
    Button(usize),
    Leftover,
}

/// Now, on the clock that goes on while the guest sleeps or moves.
fn now() -> Instant {
    let time = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Instant(seconds.saturating_mul(1_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0) / 1000))
}

impl Daemon {
    /// An agent that serves the connections of `listener`, which does not block.
    pub fn new(listener: OwnedFd) -> Self {
        let (connections, sessions) = (BTreeMap::new(), BTreeMap::new());
        let (leftovers, buttons) = (Vec::new(), Vec::new());
        Self { listener, connections, next_connection: 0, sessions, leftovers, buttons }
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// When the kernel refuses `poll`.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            let now = now();
            for source in ready {
                match source {
                    Source::Listener => self.accept(),
                    Source::Connection(id) => self.serve(id, now),
                    Source::Session(id, interest) => {
                        if let Some(session) = self.sessions.get_mut(&id) {
                            session.ready(interest, now);
                        }
                    }
                    Source::Button(place) => self.button(place),
                    Source::Leftover => {}
                }
            }
            self.expire(now);
            self.send(now);
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let mut sources = vec![Source::Listener];
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        for (&id, connection) in &self.connections {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, connection.takes_input());
            flags.set(PollFlags::OUT, connection.has_output());
            sources.push(Source::Connection(id));
            fds.push(PollFd::from_borrowed_fd(connection.as_fd(), flags));
        }
        for (&id, session) in &self.sessions {
            for (interest, fd) in session.interests() {
                let flags = if interest == Interest::Input { PollFlags::OUT } else { PollFlags::IN };
                sources.push(Source::Session(id, interest));
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            }
        }
        for (place, button) in self.buttons.iter().enumerate() {
            sources.push(Source::Button(place));
            fds.push(PollFd::new(button, PollFlags::IN));
        }
        for (leftover, _) in &self.leftovers {
            sources.push(Source::Leftover);
            fds.push(PollFd::from_borrowed_fd(leftover.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, self.patience().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(source, _)| source).collect())
    }

    /// Time until the next deadline.
    fn patience(&self) -> Option<Timespec> {
        let sessions = self.sessions.values().filter_map(Session::deadline);
        let first = sessions.chain(self.leftovers.iter().map(|(_, kill)| *kill)).min()?;
        // A whole millisecond more, so that it is past the deadline when we wake up.
        let us = first.us_since(now()).saturating_add(1000);
        let seconds = i64::try_from(us / 1_000_000).unwrap_or(i64::MAX);
        Some(Timespec { tv_sec: seconds, tv_nsec: i64::try_from(us % 1_000_000).unwrap_or(0) * 1000 })
    }

    fn button(&mut self, place: usize) {
        match self.buttons.get(place).map(power::is_pressed) {
            Some(Ok(true)) => requests::power_button_pressed(),
            // Out of order, and so out of the list: it would be ready for ever.
            Some(Err(_)) => drop(self.buttons.swap_remove(place)),
            Some(Ok(false)) | None => {}
        }
    }

    fn accept(&mut self) {
        match listen::accept(&self.listener) {
            Ok(Some(socket)) => {
                let mut connection = Connection::new(socket);
                if self.connections.len() >= CONNECTIONS_MAX {
                    connection.refuse(FailCode::TooManyConnections, "the agent has too many connections");
                    // As much as fits into the socket, which this does.
                    let _ = connection.write();
                    return;
                }
                self.connections.insert(self.next_connection, connection);
                self.next_connection += 1;
            }
            Ok(None) => {}
            Err(error) => crate::say!("cannot accept a connection: {error}"),
        }
    }

    /// Reads from a connection and does what its messages say.
    fn serve(&mut self, id: u64, now: Instant) {
        if let Err(broken) = self.messages(id, now) {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            match broken {
                Broken::Ended | Broken::Io(_) => self.drop_connection(id, now),
                Broken::Version(_) => connection.refuse(FailCode::Version, broken.to_string()),
                Broken::Frame(error) => connection.refuse(FailCode::BadRequest, error.to_string()),
            }
        }
    }

    fn messages(&mut self, id: u64, now: Instant) -> Result<(), Broken> {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.write()?;
            if connection.takes_input() {
                connection.read()?;
            }
        }
        while let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.closing) {
            let Some(message) = connection.next_message()? else { break };
            self.handle(id, message, now);
        }
        Ok(())
    }

    fn handle(&mut self, id: u64, message: ToAgent, now: Instant) {
        let sessions = self.sessions.len();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match (connection.used, message) {
            (Use::Requests, ToAgent::Request(request)) => {
                connection.send(&requests::answer(&request, sessions));
            }
            (Use::Requests, ToAgent::Open { session, task }) => self.open(id, session, &task, now),
            (Use::Requests, ToAgent::Resume { session, received }) => self.attach(id, session, received),
            (Use::Requests, _) => connection.refuse(FailCode::BadRequest, "there is no session here"),
            (Use::Session(session), message) => self.in_session(id, session, message),
        }
    }

    fn open(&mut self, id: u64, session: SessionId, task: &Task, now: Instant) {
        if !self.sessions.contains_key(&session) {
            let begun = match self.sessions.len() {
                0..SESSIONS_MAX => Session::start(task, now),
                _ => Err(spawn::Refused {
                    code: FailCode::TooManySessions,
                    detail: format!("the guest has {SESSIONS_MAX} sessions already"),
                }),
            };
            match begun {
                Ok(begun) => drop(self.sessions.insert(session, begun)),
                Err(refused) => return self.refuse(id, refused.code, refused.detail),
            }
        }
        self.attach(id, session, [0; 2]);
    }

    fn attach(&mut self, id: u64, session: SessionId, received: [u64; 2]) {
        let Some(known) = self.sessions.get_mut(&session) else {
            return self.refuse(id, FailCode::NoSuchSession, format!("there is no session {session}"));
        };
        if let Err(violation) = known.machine.attach(received) {
            return self.refuse(id, FailCode::BadRequest, violation.to_string());
        }
        let before = known.connection.replace(id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.used = Use::Session(session);
        }
        if let Some(before) = before {
            self.refuse(before, FailCode::Superseded, "another connection took the session");
        }
    }

    fn in_session(&mut self, id: u64, session: SessionId, message: ToAgent) {
        let Some(known) = self.sessions.get_mut(&session) else {
            return self.refuse(id, FailCode::NoSuchSession, "the session was given up");
        };
        match known.machine.handle(message) {
            Ok(None) => {}
            Ok(Some(Demand::Close)) => self.forget(session),
            Ok(Some(Demand::Pong)) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.send(&FromAgent::Pong);
                }
            }
            Ok(Some(demand)) => drop(known.apply(demand)),
            Err(violation) => self.refuse(id, FailCode::BadRequest, violation.to_string()),
        }
    }

    fn forget(&mut self, session: SessionId) {
        let Some(known) = self.sessions.remove(&session) else { return };
        if let Some(connection) = known.connection.and_then(|id| self.connections.get_mut(&id)) {
            connection.closing = true;
        }
        if let Some(leftover) = known.close() {
            self.leftovers.push((leftover, now().plus_us(HANGUP_GRACE_US)));
        }
    }

    fn refuse(&mut self, id: u64, code: FailCode, detail: impl Into<String>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.refuse(code, detail);
        }
    }

    fn drop_connection(&mut self, id: u64, now: Instant) {
        let Some(connection) = self.connections.remove(&id) else { return };
        let Use::Session(session) = connection.used else { return };
        // Unless another connection has taken it meanwhile.
        if let Some(session) = self.sessions.get_mut(&session).filter(|s| s.connection == Some(id)) {
            session.connection = None;
            session.machine.detach(now);
        }
    }

    fn expire(&mut self, now: Instant) {
        let over = self.sessions.iter_mut().filter_map(|(&id, session)| session.expire(now).then_some(id));
        for id in over.collect::<Vec<_>>() {
            if let Some(leftover) = self.sessions.remove(&id).and_then(Session::close) {
                self.leftovers.push((leftover, now));
            }
        }
        self.leftovers.retain_mut(|(leftover, kill)| {
            if *kill <= now {
                leftover.kill();
                // Asked again, should it be stuck in the kernel.
                *kill = now.plus_us(HANGUP_GRACE_US);
            }
            !leftover.has_ended()
        });
    }

    /// Gives each connection what its session has to say, as much as it takes.
    fn send(&mut self, now: Instant) {
        let mut gone = Vec::new();
        for (&id, connection) in &mut self.connections {
            loop {
                let session = match connection.used {
                    Use::Session(session) if !connection.closing => self.sessions.get_mut(&session),
                    _ => None,
                };
                if let Some(session) = session.filter(|session| session.connection == Some(id)) {
                    while connection.takes_output() {
                        let Some(message) = session.machine.next_message() else { break };
                        connection.send(&message);
                    }
                }
                let had_output = connection.has_output();
                let written = connection.write();
                if written.is_err() || (connection.closing && !connection.has_output()) {
                    gone.push(id);
                    break;
                }
                if !had_output || connection.has_output() {
                    break;
                }
            }
        }
        for id in gone {
            self.drop_connection(id, now);
        }
    }
}

/// Listens and serves for ever.
///
/// # Errors
/// When it cannot listen, or the kernel refuses `poll`.
pub fn serve(address: &listen::Address) -> io::Result<()> {
    let mut daemon = Daemon::new(listen::listen(address)?);
    // Only in a guest: on another machine the button is none of our business.
    if matches!(address, listen::Address::Vsock(_)) {
        daemon.buttons = power::buttons();
    }
    daemon.run()
}
