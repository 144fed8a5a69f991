//! One connection: a client's socket on this side, a port of the guest on the other.
//!
//! ```text
//!              port read            RESPONSE              client gone, all told
//!   Asking ------------> Requested ---------> Open -------------------------> Closing --RST, SHUTDOWN--> dropped
//!      '--hang-up, 10 s-----'--RST, 10 s-------'--RST, or SHUTDOWN of both--> Draining --all written---> dropped
//! ```
//!
//! Both directions are bounded by credit. What the guest sends is at most [`BUFFER_BYTES`] ahead of what the client has taken; a guest that sends
//! more than it was allowed is reset. What the client sends stays in its socket until the guest has said that there is room.
//!
//! An end of file travels as a half-close in either direction. `Closing` is remembered, without a socket, because the guest may still be reading: a
//! reset would throw away what it has not read.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use wire::vmm::VSOCK_OPEN;

use super::packet::{Header, NO_MORE_RECEIVING, NO_MORE_SENDING, Op};

/// What the guest may send before the client has taken anything. With the most connections that there can be: 32 MiB.
pub const BUFFER_BYTES: u32 = 128 << 10;
/// The guest is told that there is room again in steps of this.
const CREDIT_STEP: u32 = BUFFER_BYTES / 4;
const BOTH: u32 = NO_MORE_RECEIVING | NO_MORE_SENDING;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The client has sent this much of the port.
    Asking { port: [u8; 4], have: usize },
    /// The guest is to be asked, or has been and has not answered.
    Requested { sent: bool },
    /// Data flows.
    Open,
    /// The client is gone and the guest knows; its last word is awaited.
    Closing,
    /// The guest is gone; the client still has to take what it sent.
    Draining,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It is over, and the guest knows.
    Drop,
    /// It is over, and the guest is to be told.
    Reset,
}

/// A packet for the guest, but for the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// What for.
    pub op: Op,
    /// Flags.
    pub flags: u32,
    /// Bytes of data.
    pub data_bytes: u32,
    /// Our count of bytes passed on.
    pub fwd_cnt: u32,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// `None` in [`State::Closing`].
    socket: Option<UnixStream>,
    state: State,
    /// The port that the client named.
    port: u32,
    /// Before this, the client has to name a port and the guest to answer.
    deadline: Instant,
    /// Whether it is among those that may have a packet to send.
    pub queued: bool,
    /// The socket may have something to read: data, or its end.
    readable: bool,
    /// The client is gone, or takes no more.
    hung_up: bool,
    /// Nothing more comes from the client, or goes to the guest.
    client_done: bool,
    /// What the guest was told of that.
    told: u32,
    /// The guest's half-closes.
    guest_shutdown: u32,
    /// The client was told that the guest sends no more.
    client_told: bool,
    /// Bytes sent to the guest, modulo 2^32; and the guest's own figures.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The guest was asked for room.
    credit_asked: bool,
    /// From the guest, not yet taken by the client.
    outbound: VecDeque<u8>,
    /// Bytes passed on to the client, modulo 2^32; and which of it the guest knows.
    forwarded: u32,
    announced: u32,
    credit_due: bool,
}

impl Connection {
    /// A client that has just connected on the non-blocking `socket`.
    pub const fn new(socket: UnixStream, deadline: Instant) -> Self {
        Self {
            socket: Some(socket),
            state: State::Asking { port: [0; 4], have: 0 },
            port: 0,
            deadline,
            queued: false,
            readable: true,
            hung_up: false,
            client_done: false,
            told: 0,
            guest_shutdown: 0,
            client_told: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            credit_asked: false,
            outbound: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            credit_due: false,
        }
    }

    /// When it is given up, if neither client nor guest has said anything by then.
    pub const fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Asking { .. } | State::Requested { .. } => Some(self.deadline),
            _ => None,
        }
    }

    /// What is due when the deadline has passed, or the client is gone before the guest has answered.
    pub const fn give_up(&self) -> Fate {
        if matches!(self.state, State::Requested { sent: true }) { Fate::Reset } else { Fate::Drop }
    }

    /// The guest's port, once the client has named it.
    pub const fn guest_port(&self) -> Option<u32> {
        match self.state {
            State::Asking { .. } => None,
            _ => Some(self.port),
        }
    }

    /// Whether the guest still knows of it.
    pub const fn is_known(&self) -> bool {
        !matches!(self.state, State::Asking { .. } | State::Draining)
    }

    /// Whether only the guest's last word is awaited.
    pub const fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing)
    }

    /// The socket became ready.
    pub fn ready(&mut self, flags: EventFlags) -> Fate {
        let gone = EventFlags::HUP | EventFlags::ERR;
        self.readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | gone);
        self.hung_up |= flags.intersects(gone);
        match self.state {
            State::Asking { .. } => self.read_port(),
            State::Requested { .. } if self.hung_up => self.give_up(),
            _ => self.flush(),
        }
    }

    fn read_port(&mut self) -> Fate {
        let (State::Asking { port, have }, Some(socket)) = (&mut self.state, &mut self.socket) else {
            return Fate::Keep;
        };
        while *have < port.len() {
            match socket.read(&mut port[*have..]) {
                Ok(0) => return Fate::Drop,
                Ok(bytes) => *have += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Fate::Keep,
                Err(_) => return Fate::Drop,
            }
        }
        self.port = u32::from_le_bytes(*port);
        self.state = State::Requested { sent: false };
        if self.hung_up { Fate::Drop } else { Fate::Keep }
    }

    /// Passes on what the guest sent, as far as the client takes it.
    fn flush(&mut self) -> Fate {
        let Some(socket) = &mut self.socket else { return Fate::Keep };
        while !self.outbound.is_empty() && !self.hung_up {
            match socket.write(self.outbound.as_slices().0) {
                Ok(bytes) => {
                    self.outbound.drain(..bytes);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(bytes).unwrap_or(0));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.hung_up = true,
            }
        }
        if self.hung_up {
            // Nobody reads it any more. The guest is told as soon as it has got what the client had sent before.
            let lost = u32::try_from(self.outbound.len()).unwrap_or(0);
            self.outbound = VecDeque::new();
            self.forwarded = self.forwarded.wrapping_add(lost);
            self.readable = true;
        }
        self.credit_due |= self.forwarded.wrapping_sub(self.announced) >= CREDIT_STEP;
        if !self.outbound.is_empty() {
            return Fate::Keep;
        }
        if self.state == State::Draining {
            return Fate::Drop;
        }
        if self.guest_shutdown & BOTH == BOTH {
            return Fate::Reset;
        }
        if self.guest_shutdown & NO_MORE_SENDING != 0 && !self.client_told {
            self.client_told = true;
            let _gone = socket.shutdown(Shutdown::Write);
        }
        Fate::Keep
    }

    /// A packet of the guest for this connection.
    pub fn take(&mut self, header: &Header, data: &[u8]) -> Fate {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.credit_asked &= self.credit() == 0;
        match (self.state, header.op) {
            (State::Requested { sent: true }, Op::Response) => self.open(),
            (State::Open, Op::Data) => self.take_data(data),
            (State::Open | State::Closing, Op::CreditUpdate) => Fate::Keep,
            (State::Open | State::Closing, Op::CreditRequest) => {
                self.credit_due = true;
                Fate::Keep
            }
            (State::Open, Op::Shutdown) => {
                self.guest_shutdown |= header.flags & BOTH;
                self.client_done |= self.guest_shutdown & NO_MORE_RECEIVING != 0;
                self.flush()
            }
            (State::Open, Op::Reset) => {
                self.state = State::Draining;
                self.flush()
            }
            (_, Op::Reset) => Fate::Drop,
            // Also the guest's answer to our SHUTDOWN, which ours is the last word to.
            _ => Fate::Reset,
        }
    }

    fn open(&mut self) -> Fate {
        self.state = State::Open;
        self.readable = true;
        let Some(socket) = &mut self.socket else { return Fate::Reset };
        // The first byte in an empty socket always finds room, unless nobody is there.
        match socket.write(&[VSOCK_OPEN]) {
            Ok(1) => Fate::Keep,
            _ => Fate::Reset,
        }
    }

    fn take_data(&mut self, data: &[u8]) -> Fate {
        let room = usize::try_from(BUFFER_BYTES).unwrap_or(0).saturating_sub(self.outbound.len());
        if data.len() > room || self.guest_shutdown & NO_MORE_SENDING != 0 {
            return Fate::Reset;
        }
        self.outbound.extend(data);
        self.flush()
    }

    /// How much the guest takes now. A guest that claims to have passed on more than it got has no room.
    const fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The next packet for the guest, if there is one; its data in `room`.
    pub fn next_packet(&mut self, room: &mut [u8]) -> Option<Outgoing> {
        let (op, flags, data_bytes) = match self.state {
            State::Requested { sent: false } => {
                self.state = State::Requested { sent: true };
                (Op::Request, 0, 0)
            }
            State::Open | State::Closing if std::mem::take(&mut self.credit_due) => (Op::CreditUpdate, 0, 0),
            State::Open => self.data(room).or_else(|| self.shutdown())?,
            _ => return None,
        };
        self.announced = self.forwarded;
        Some(Outgoing { op, flags, data_bytes, fwd_cnt: self.forwarded })
    }

    /// Data of the client, or the question for room for it.
    fn data(&mut self, room: &mut [u8]) -> Option<(Op, u32, u32)> {
        let credit = self.credit();
        let socket = self.socket.as_mut()?;
        if !self.readable || self.client_done || room.is_empty() {
            return None;
        }
        if credit == 0 {
            let asked = std::mem::replace(&mut self.credit_asked, true);
            return (!asked).then_some((Op::CreditRequest, 0, 0));
        }
        let bytes = room.len().min(usize::try_from(credit).unwrap_or(usize::MAX));
        loop {
            match socket.read(&mut room[..bytes]) {
                Ok(0) => self.client_done = true,
                Ok(bytes) => {
                    let bytes = u32::try_from(bytes).unwrap_or(0);
                    self.sent = self.sent.wrapping_add(bytes);
                    return Some((Op::Data, 0, bytes));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.client_done = true;
                    self.hung_up = true;
                }
            }
            self.readable = false;
            return None;
        }
    }

    /// The client's end of file, or its end.
    fn shutdown(&mut self) -> Option<(Op, u32, u32)> {
        if !self.client_done {
            return None;
        }
        let flags = NO_MORE_SENDING | if self.hung_up { NO_MORE_RECEIVING } else { 0 };
        if flags == self.told {
            return None;
        }
        self.told = flags;
        if flags == BOTH {
            self.state = State::Closing;
            self.socket = None;
        }
        Some((Op::Shutdown, flags, 0))
    }
}
