//! The TCP services: echo on port 7, commands on port 9.
//!
//! A connection has its place in a fixed table and its own buffers, so clients cannot use up anything but each other's places.

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

/// A line of reply.
pub type Reply = Text<2048>;

/// All connections.
pub struct Services {
    echo: [SocketHandle; ECHO_CONNECTIONS],
    command: [Connection; COMMAND_CONNECTIONS],
}

/// A place for a command connection.
struct Connection {
    socket: SocketHandle,
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
        let echo = core::array::from_fn(|_| stack.add_socket(ECHO_BUFFER, frames));
        let command = core::array::from_fn(|_| Connection::new(stack.add_socket(COMMAND_BUFFER, frames)));
        let mut services = Self { echo, command };
        services.serve_echo(&mut stack.sockets);
        for connection in &mut services.command {
            connection.tend(stack.sockets.get_mut(connection.socket));
        }
        services
    }

    /// Serves all connections once.
    pub fn serve(&mut self, sockets: &mut SocketSet<'_>, machine: &mut Machine) {
        self.serve_echo(sockets);
        for connection in &mut self.command {
            connection.serve(sockets.get_mut(connection.socket), machine);
        }
    }

    /// Answers those that wait for the task that just ended.
    pub fn task_done(&mut self, sockets: &mut SocketSet<'_>, machine: &mut Machine, reply: &Reply) {
        for connection in self.command.iter_mut().filter(|c| c.waiting) {
            connection.waiting = false;
            connection.answer(reply.clone());
            connection.serve(sockets.get_mut(connection.socket), machine);
        }
    }

    fn serve_echo(&mut self, sockets: &mut SocketSet<'_>) {
        for &handle in &self.echo {
            let socket = sockets.get_mut::<Socket<'_>>(handle);
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

impl Connection {
    fn new(socket: SocketHandle) -> Self {
        Self {
            socket,
            line: [0; LINE],
            len: 0,
            too_long: false,
            reply: Reply::new(),
            sent: 0,
            waiting: false,
        }
    }

    fn serve(&mut self, socket: &mut Socket<'_>, machine: &mut Machine) {
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
            *self = Self::new(self.socket);
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
