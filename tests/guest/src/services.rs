//! The TCP services: echo on port 7, commands on port 9.
//!
//! A connection has its place in a fixed table and its own buffers, so clients cannot use up anything but each other's places.
//! There are no time-outs, as a machine may be away for long; but if all places of a port are taken, the one that was silent
//! longest, and for a minute at least, is given to the next client.

use crate::commands::{self, Outcome};
use crate::machine::Machine;
use crate::memory::frames::Frames;
use crate::net::Stack;
use core::fmt::Write as _;
use guest_core::text::Text;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};

const ECHO_PORT: u16 = 7;
const COMMAND_PORT: u16 = 9;
const ECHO_CONNECTIONS: usize = 8;
const COMMAND_CONNECTIONS: usize = 4;
/// Sockets in all.
pub const SOCKETS: usize = ECHO_CONNECTIONS + COMMAND_CONNECTIONS;
const ECHO_BUFFER: usize = 64 * 1024;
const COMMAND_BUFFER: usize = 8 * 1024;
/// Longest command line, without its end.
const LINE: usize = 255;
/// Silence after which a place may be given away.
const SILENCE_US: u64 = 60_000_000;
/// Time for a handshake.
const HANDSHAKE_US: u64 = 5_000_000;

/// A line of reply.
pub type Reply = Text<2048>;

/// All connections.
pub struct Services {
    echo: [Place; ECHO_CONNECTIONS],
    command: [Connection; COMMAND_CONNECTIONS],
}

/// A socket and when it was last heard of, microseconds since boot.
#[derive(Clone, Copy)]
struct Place {
    socket: SocketHandle,
    heard_us: u64,
}

/// A place for a command connection.
struct Connection {
    place: Place,
    line: [u8; LINE],
    len: usize,
    too_long: bool,
    reply: Reply,
    sent: usize,
    /// The reply comes when the running task is done.
    waiting: bool,
}

impl Services {
    /// Opens all sockets.
    pub fn new(stack: &mut Stack<'_>, frames: &mut Frames) -> Self {
        let echo =
            core::array::from_fn(|_| Place { socket: stack.add_socket(ECHO_BUFFER, frames), heard_us: 0 });
        let command = core::array::from_fn(|_| Connection::new(stack.add_socket(COMMAND_BUFFER, frames)));
        let mut services = Self { echo, command };
        services.serve_echo(&mut stack.sockets, 0);
        for connection in &mut services.command {
            connection.tend(stack.sockets.get_mut(connection.place.socket));
        }
        services
    }

    /// Serves all connections once.
    pub fn serve(&mut self, sockets: &mut SocketSet<'_>, machine: &mut Machine) {
        let now_us = machine.clock.uptime_us();
        self.serve_echo(sockets, now_us);
        for connection in &mut self.command {
            connection.serve(sockets.get_mut(connection.place.socket), machine, now_us);
        }
    }

    /// Gives places away: those of clients that never finished their handshake, and if all are taken, the silent one.
    /// To be called about once a second, as silence is no event.
    pub fn make_room(&mut self, sockets: &mut SocketSet<'_>, now_us: u64) {
        for place in &mut self.echo {
            place.hear(sockets.get(place.socket), now_us);
        }
        for connection in &mut self.command {
            connection.place.hear(sockets.get(connection.place.socket), now_us);
        }
        let silent = silent(sockets, self.echo.iter(), now_us);
        for place in &mut self.echo {
            let socket = sockets.get_mut::<Socket<'_>>(place.socket);
            if Some(place.socket) == silent || place.unfinished(socket, now_us) {
                socket.abort();
                tend(socket, ECHO_PORT);
            }
        }
        let places = self.command.iter().filter(|c| !c.waiting).map(|c| &c.place);
        let silent = self::silent(sockets, places, now_us);
        for connection in &mut self.command {
            let socket = sockets.get_mut::<Socket<'_>>(connection.place.socket);
            if Some(connection.place.socket) == silent || connection.place.unfinished(socket, now_us) {
                socket.abort();
                connection.tend(socket);
            }
        }
    }

    /// Answers those that wait for the task that just ended.
    pub fn task_done(&mut self, sockets: &mut SocketSet<'_>, machine: &mut Machine, reply: &Reply) {
        for connection in self.command.iter_mut().filter(|c| c.waiting) {
            connection.waiting = false;
            connection.answer(reply.clone());
            let now_us = machine.clock.uptime_us();
            connection.serve(sockets.get_mut(connection.place.socket), machine, now_us);
        }
    }

    fn serve_echo(&mut self, sockets: &mut SocketSet<'_>, now_us: u64) {
        for place in &mut self.echo {
            let socket = sockets.get_mut::<Socket<'_>>(place.socket);
            place.hear(socket, now_us);
            let mut chunk = [0; 4096];
            while socket.can_recv() && socket.can_send() {
                let room = (socket.send_capacity() - socket.send_queue()).min(chunk.len());
                let Ok(bytes) = socket.recv_slice(&mut chunk[..room]) else { break };
                // There is room for it.
                let _ = socket.send_slice(&chunk[..bytes]);
            }
            tend(socket, ECHO_PORT);
        }
    }
}

impl Place {
    /// Takes note of bytes that came, and of a place that is free.
    fn hear(&mut self, socket: &Socket<'_>, now_us: u64) {
        if socket.can_recv() || socket.is_listening() {
            self.heard_us = now_us;
        }
    }

    /// Whether the client has not finished its handshake for too long.
    fn unfinished(&self, socket: &Socket<'_>, now_us: u64) -> bool {
        socket.state() == State::SynReceived && now_us.saturating_sub(self.heard_us) > HANDSHAKE_US
    }
}

impl Connection {
    fn new(socket: SocketHandle) -> Self {
        Self {
            place: Place { socket, heard_us: 0 },
            line: [0; LINE],
            len: 0,
            too_long: false,
            reply: Reply::new(),
            sent: 0,
            waiting: false,
        }
    }

    fn serve(&mut self, socket: &mut Socket<'_>, machine: &mut Machine, now_us: u64) {
        self.place.hear(socket, now_us);
        loop {
            self.send(socket);
            if self.waiting || self.sent < self.reply.as_bytes().len() || !self.read_line(socket) {
                break;
            }
            self.execute(machine);
        }
        self.tend(socket);
    }

    fn tend(&mut self, socket: &mut Socket<'_>) {
        if tend(socket, COMMAND_PORT) {
            *self = Self::new(self.place.socket);
        }
    }

    /// Takes bytes in until a line is complete.
    fn read_line(&mut self, socket: &mut Socket<'_>) -> bool {
        while socket.can_recv() {
            let complete = socket.recv(|bytes| {
                let end = bytes.iter().position(|&b| b == b'\n');
                for &byte in &bytes[..end.unwrap_or(bytes.len())] {
                    match self.line.get_mut(self.len) {
                        Some(place) => {
                            *place = byte;
                            self.len += 1;
                        }
                        None => self.too_long = true,
                    }
                }
                (end.map_or(bytes.len(), |end| end + 1), end.is_some())
            });
            match complete {
                Ok(true) => return true,
                Ok(false) => {}
                Err(_) => return false,
            }
        }
        false
    }

    fn execute(&mut self, machine: &mut Machine) {
        let line = core::str::from_utf8(&self.line[..self.len]).map_err(|_| "not text");
        let line = if self.too_long { Err("line too long") } else { line };
        let outcome = match line {
            Ok(line) => commands::execute(line, machine),
            Err(error) => Outcome::error(error),
        };
        (self.len, self.too_long) = (0, false);
        match outcome {
            Outcome::Reply(reply) => self.answer(reply),
            Outcome::Wait => self.waiting = true,
        }
    }

    fn answer(&mut self, mut reply: Reply) {
        // A Text never fails.
        let _ = reply.write_char('\n');
        (self.reply, self.sent) = (reply, 0);
    }

    fn send(&mut self, socket: &mut Socket<'_>) {
        let rest = &self.reply.as_bytes()[self.sent..];
        if !rest.is_empty() && socket.can_send() {
            self.sent += socket.send_slice(rest).unwrap_or(0);
        }
    }
}

/// The place to give away: the one silent longest, if none listens and it was silent long enough.
fn silent<'p>(
    sockets: &SocketSet<'_>,
    places: impl Iterator<Item = &'p Place> + Clone,
    now_us: u64,
) -> Option<SocketHandle> {
    if places.clone().any(|place| sockets.get::<Socket<'_>>(place.socket).is_listening()) {
        return None;
    }
    let oldest = places.min_by_key(|place| place.heard_us)?;
    (now_us.saturating_sub(oldest.heard_us) > SILENCE_US).then_some(oldest.socket)
}

/// Answers a close with a close, and listens anew; whether the socket had been closed.
fn tend(socket: &mut Socket<'_>, port: u16) -> bool {
    if socket.state() == State::CloseWait && !socket.can_recv() {
        socket.close();
    }
    if socket.is_open() && socket.state() != State::TimeWait {
        return false;
    }
    socket.abort();
    // A closed socket and a port other than 0 cannot fail.
    let _ = socket.listen(port);
    true
}
