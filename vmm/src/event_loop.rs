//! The main thread: one epoll set for the control socket, the devices and the guest's end.
//!
//! Devices are in the set only while the guest runs. Everything in it is level-triggered, so what was not handled, because
//! the guest was paused or a budget ran out, comes again. Each event costs a bounded amount of work.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use wire::vmm::{Code, FromVmm, Reply, Request};

use crate::control::{Connection, Incoming};
use crate::event::borrow;
use crate::supervisor::{Answer, Supervisor};

/// Why the loop ended although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The operating system.
    #[error("the event loop failed")]
    Os(#[from] Errno),
    /// The control socket.
    #[error("the control socket failed")]
    Socket(#[from] io::Error),
}

/// What an event is about; the numbers are the set's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Connection,
    GuestEnded,
    /// The host's side of the device in this slot.
    Host(usize),
    /// Queue of the device in a slot.
    Queue(usize, usize),
}

impl Source {
    fn token(self) -> u64 {
        let pack = |kind: u64, slot: usize, queue: usize| {
            kind << 32 | u64::try_from(slot).unwrap_or(0) << 16 | u64::try_from(queue).unwrap_or(0)
        };
        match self {
            Self::Listener => pack(0, 0, 0),
            Self::Connection => pack(1, 0, 0),
            Self::GuestEnded => pack(2, 0, 0),
            Self::Host(slot) => pack(3, slot, 0),
            Self::Queue(slot, queue) => pack(4, slot, queue),
        }
    }

    fn from_token(token: u64) -> Self {
        let part = |shift: u32| usize::try_from(token >> shift & 0xffff).unwrap_or(0);
        match token >> 32 {
            0 => Self::Listener,
            1 => Self::Connection,
            2 => Self::GuestEnded,
            3 => Self::Host(part(16)),
            _ => Self::Queue(part(16), part(0)),
        }
    }
}

/// The loop and what it serves.
pub struct EventLoop {
    epoll: OwnedFd,
    listener: UnixListener,
    connection: Option<Connection>,
    /// Whether the set waits for room in the connection's socket.
    waits_for_room: bool,
    supervisor: Supervisor,
    /// Whether the machine's events have been added.
    machine_added: bool,
    /// Whether the devices' queues are in the set.
    devices_added: bool,
    /// By slot, whether the device's host side is in the set.
    hosts_added: Vec<bool>,
    quit: bool,
}

impl EventLoop {
    /// A loop that serves `listener`, and clients of the guest's vsock ports through `vsock`.
    ///
    /// # Errors
    /// [`LoopError`] when the operating system refuses.
    pub fn new(listener: UnixListener, vsock: Option<UnixListener>) -> Result<Self, LoopError> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let this = Self {
            epoll,
            listener,
            connection: None,
            waits_for_room: false,
            supervisor: Supervisor::new(vsock),
            machine_added: false,
            devices_added: false,
            hosts_added: Vec::new(),
            quit: false,
        };
        this.add(&this.listener, Source::Listener)?;
        Ok(this)
    }

    /// Serves until a request asks to quit.
    ///
    /// # Errors
    /// [`LoopError`]; the guest ends with the process.
    pub fn run(mut self) -> Result<(), LoopError> {
        let mut events: Vec<Event> = Vec::with_capacity(32);
        while !self.quit {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                self.serve(Source::from_token(event.data.u64()))?;
            }
            self.update_set()?;
        }
        Ok(())
    }

    fn serve(&mut self, source: Source) -> Result<(), LoopError> {
        match source {
            Source::Listener => self.accept()?,
            Source::Connection => self.serve_connection(),
            Source::GuestEnded => {
                if let Some(notice) = self.supervisor.guest_ended() {
                    self.send(&notice, Vec::new());
                }
            }
            Source::Host(slot) => self.serve_device(slot, None),
            Source::Queue(slot, queue) => self.serve_device(slot, Some(queue)),
        }
        Ok(())
    }

    /// Lets a device work. An event that was fetched before a pause comes too late and is left for the next run.
    fn serve_device(&self, slot: usize, queue: Option<usize>) {
        if !self.supervisor.is_running() {
            return;
        }
        let Some(machine) = self.supervisor.machine() else { return };
        let Some(mut transport) = machine.bus().transport(slot) else { return };
        match queue {
            None => {
                let _level_triggered = transport.host_event();
            }
            Some(queue) => {
                if let Some(notify) = transport.resources().notify.get(queue) {
                    let _was_spurious = notify.read();
                }
                if transport.queue_event(queue)
                    && let Some(notify) = transport.resources().notify.get(queue)
                {
                    let _pending = notify.write(1);
                }
            }
        }
    }

    /// Takes a new connection if there is none, or the one there is has been left by its peer.
    fn accept(&mut self) -> Result<(), LoopError> {
        if self.connection.as_ref().is_some_and(|connection| !is_dead(connection)) {
            // The newcomer waits in the backlog; the listener is out of the set meanwhile.
            return Ok(());
        }
        self.disconnect();
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        stream.set_nonblocking(true)?;
        let connection = Connection::new(stream);
        self.add(&connection, Source::Connection)?;
        epoll::delete(&self.epoll, &self.listener)?;
        self.connection = Some(connection);
        Ok(())
    }

    fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Closing takes it out of the set; the listener comes back in.
            drop(connection);
            self.waits_for_room = false;
            let _was_in = self.add(&self.listener, Source::Listener);
        }
    }

    fn serve_connection(&mut self) {
        // One request per event: devices get their turn between two.
        let Some(connection) = &mut self.connection else { return };
        let served = connection.flush().and_then(|()| connection.receive());
        match served {
            Ok(None) => {}
            Ok(Some(incoming)) => self.answer(incoming),
            Err(_) => self.disconnect(),
        }
    }

    fn answer(&mut self, Incoming { message, descriptors }: Incoming) {
        let hello = matches!(message.request, Request::Hello { .. });
        let greeted = self.connection.as_ref().is_some_and(|connection| connection.greeted);
        let answer: Answer = if hello || greeted {
            self.supervisor.handle(message.request, descriptors)
        } else {
            let detail = "say Hello first".to_owned();
            Reply::Refused { code: Code::WrongPhase, detail }.into()
        };
        if let Some(connection) = &mut self.connection {
            connection.greeted |= matches!(answer.reply, Reply::Hello { .. });
        }
        self.quit |= answer.quit;
        self.send(&FromVmm::Reply { seq: message.seq, reply: answer.reply }, answer.descriptors);
    }

    fn send(&mut self, message: &FromVmm, descriptors: Vec<OwnedFd>) {
        if let Some(connection) = &mut self.connection
            && connection.send(message, descriptors).is_err()
        {
            self.disconnect();
        }
    }

    /// Brings the set in line with what there is to listen to now.
    fn update_set(&mut self) -> Result<(), LoopError> {
        self.update_connection()?;
        let Some(machine) = self.supervisor.machine() else { return Ok(()) };
        if !self.machine_added {
            let fd = machine.ended_event();
            epoll::add(
                &self.epoll,
                borrow(fd),
                EventData::new_u64(Source::GuestEnded.token()),
                EventFlags::IN,
            )?;
            self.machine_added = true;
            self.hosts_added = vec![false; machine.bus().slots()];
        }
        let running = self.supervisor.is_running();
        for slot in 0..machine.bus().slots() {
            let Some(transport) = machine.bus().transport(slot) else { continue };
            if running != self.devices_added {
                for (queue, notify) in transport.resources().notify.iter().enumerate() {
                    self.listen(running, &borrow(notify), Source::Queue(slot, queue))?;
                }
            }
            let Some(host) = transport.host_fd() else { continue };
            let wanted = running && transport.wants_host_event();
            if self.hosts_added[slot] != wanted {
                self.listen(wanted, &host, Source::Host(slot))?;
                self.hosts_added[slot] = wanted;
            }
        }
        self.devices_added = running;
        Ok(())
    }

    fn update_connection(&mut self) -> Result<(), LoopError> {
        let Some(connection) = &self.connection else { return Ok(()) };
        if connection.is_blocked() != self.waits_for_room {
            self.waits_for_room = connection.is_blocked();
            let room = if self.waits_for_room { EventFlags::OUT } else { EventFlags::empty() };
            let data = EventData::new_u64(Source::Connection.token());
            epoll::modify(&self.epoll, connection, data, EventFlags::IN | room)?;
        }
        Ok(())
    }

    fn listen(&self, wanted: bool, fd: &impl AsFd, source: Source) -> Result<(), Errno> {
        if wanted { self.add(fd, source) } else { epoll::delete(&self.epoll, fd) }
    }

    fn add(&self, fd: &impl AsFd, source: Source) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, EventData::new_u64(source.token()), EventFlags::IN)
    }
}

/// Whether the peer is gone. Data that it left unread does not matter any more.
fn is_dead(connection: &Connection) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut fds, Some(&now));
    polled.is_ok_and(|ready| ready > 0)
}
