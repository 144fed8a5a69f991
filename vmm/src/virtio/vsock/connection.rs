//! One connection: a stream socket of the host on one side, a stream of the guest on the other.
//!
//! ```text
//!  Naming --port read--> Asked --response--> Open --reset, both ends shut, socket broken--> gone
//! ```
//!
//! What the guest sends goes into a buffer as large as the room that it was promised, and from there into the socket. What the
//! socket sends is read only when the guest has room and a buffer for it, so nothing is kept for the guest.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use wire::vmm::VSOCK_OPEN;

use super::packet::{DATA_BYTES_MAX, Header, NO_RECEIVE, NO_SEND, Operation};

/// Room promised to the guest, in bytes.
pub const ROOM_BYTES: u32 = 256 << 10;
/// When the guest has less than this left by what it was told, it is told anew.
const LOW_BYTES: u32 = ROOM_BYTES / 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The client has not said its port yet; so many bytes of it are there.
    Naming([u8; 4], usize),
    /// The guest has been asked, or is to be.
    Asked,
    /// Data flow.
    Open,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    host_port: u32,
    guest_port: u32,
    state: State,
    /// For the socket.
    buffer: VecDeque<u8>,
    /// Control packets for the guest.
    due: VecDeque<(Operation, u32)>,
    /// Bytes of the guest that have gone into the socket; wraps.
    taken: u32,
    /// The same as the guest was last told.
    told: u32,
    /// What the guest has room for, and how much it has taken out.
    guest_room: u32,
    guest_taken: u32,
    /// Bytes sent to it; wraps.
    sent: u32,
    /// The client has no more to send.
    client_ended: bool,
    /// What the guest has shut down.
    guest_shut: u32,
    /// Nothing more can come of it.
    over: bool,
}

impl Connection {
    /// A client that has just come; `stream` does not block.
    pub const fn new(stream: UnixStream, host_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port: 0,
            state: State::Naming([0; 4], 0),
            buffer: VecDeque::new(),
            due: VecDeque::new(),
            taken: 0,
            told: 0,
            guest_room: 0,
            guest_taken: 0,
            sent: 0,
            client_ended: false,
            guest_shut: 0,
            over: false,
        }
    }

    /// Whether it can be forgotten.
    pub fn is_over(&self) -> bool {
        self.over && self.due.is_empty()
    }

    /// Whether this packet's ports are its own.
    pub const fn is_for(&self, guest_port: u32) -> bool {
        self.guest_port == guest_port
    }

    /// What to wait for at the socket.
    pub fn interest(&self) -> EventFlags {
        let mut interest = EventFlags::empty();
        if self.over {
            return interest;
        }
        match self.state {
            State::Naming(..) => interest |= EventFlags::IN,
            // Only the end, which is always told.
            State::Asked => {}
            State::Open => {
                if !self.client_ended && self.credit() > 0 {
                    interest |= EventFlags::IN;
                }
            }
        }
        if !self.buffer.is_empty() {
            interest |= EventFlags::OUT;
        }
        interest
    }

    /// How much the guest has room for.
    const fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_taken);
        if self.guest_shut & NO_RECEIVE != 0 { 0 } else { self.guest_room.saturating_sub(under_way) }
    }

    /// The client hung up altogether.
    pub fn hung_up(&mut self) {
        // What it sent before is still there to be read, in the one state where it matters.
        if self.state != State::Open || self.client_ended {
            self.reset();
        }
    }

    /// Reads the port that a new client wants.
    pub fn name(&mut self) {
        let State::Naming(mut bytes, have) = self.state else { return };
        match self.stream.read(&mut bytes[have..]) {
            Ok(0) => self.over = true,
            Ok(count) if have + count == bytes.len() => {
                self.guest_port = u32::from_le_bytes(bytes);
                self.state = State::Asked;
                self.due.push_back((Operation::Request, 0));
            }
            Ok(count) => self.state = State::Naming(bytes, have + count),
            Err(error) if is_passing(&error) => {}
            Err(_) => self.over = true,
        }
    }

    /// Takes a packet of the guest up.
    pub fn take(&mut self, header: &Header, data: &[u8]) {
        self.guest_room = header.room_bytes;
        self.guest_taken = header.taken_bytes;
        match (header.operation, self.state) {
            (Operation::Reset, _) => {
                self.due.clear();
                self.over = true;
            }
            (Operation::Response, State::Asked) => {
                self.state = State::Open;
                self.buffer.push_back(VSOCK_OPEN);
                // The byte is ours and takes none of the guest's room.
                self.taken = self.taken.wrapping_sub(1);
                self.flush();
            }
            (Operation::Data, State::Open) if self.guest_shut & NO_SEND == 0 => self.take_data(data),
            (Operation::Shutdown, State::Open) => {
                self.guest_shut |= header.flags & (NO_RECEIVE | NO_SEND);
                self.flush();
            }
            (Operation::CreditUpdate, State::Open) => {}
            (Operation::CreditRequest, State::Open) => self.tell(),
            _ => self.reset(),
        }
    }

    fn take_data(&mut self, data: &[u8]) {
        let room = usize::try_from(ROOM_BYTES).unwrap_or(usize::MAX);
        // The byte of the host's own may be in the buffer, too.
        if self.buffer.len() + data.len() > room + 1 {
            return self.reset();
        }
        self.buffer.extend(data);
        self.flush();
    }

    /// Writes what the socket takes, and does what was waiting for that.
    pub fn flush(&mut self) {
        while !self.buffer.is_empty() && !self.over {
            let (first, _) = self.buffer.as_slices();
            match self.stream.write(first) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.taken = self.taken.wrapping_add(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.reset(),
            }
        }
        if self.taken.wrapping_sub(self.told) >= LOW_BYTES && self.state == State::Open {
            self.tell();
        }
        if self.buffer.is_empty() && self.guest_shut & NO_SEND != 0 {
            if self.guest_shut & NO_RECEIVE != 0 || self.client_ended {
                return self.reset();
            }
            let _gone_already = self.stream.shutdown(std::net::Shutdown::Write);
        }
    }

    fn tell(&mut self) {
        if !self.due.iter().any(|(operation, _)| *operation == Operation::CreditUpdate) {
            self.due.push_back((Operation::CreditUpdate, 0));
        }
    }

    /// Ends it, and says so to the guest if it knows of it.
    pub fn reset(&mut self) {
        if self.over {
            return;
        }
        let unknown = matches!(self.state, State::Naming(..))
            || self.due.iter().any(|(operation, _)| *operation == Operation::Request);
        self.due.clear();
        if !unknown {
            self.due.push_back((Operation::Reset, 0));
        }
        self.over = true;
        let _gone_already = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Whether there is something for the guest, as far as is known without reading the socket.
    pub fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// The next control packet for the guest.
    pub fn next_due(&mut self) -> Option<Header> {
        let (operation, flags) = self.due.pop_front()?;
        Some(self.header(operation, flags, 0))
    }

    /// Reads data for the guest into `data`, no more than it has room for. Nothing when there are none now.
    pub fn read(&mut self, data: &mut [u8]) -> Option<(Header, usize)> {
        if self.state != State::Open || self.client_ended || self.over {
            return None;
        }
        let credit = usize::try_from(self.credit()).unwrap_or(0);
        let most = data.len().min(credit).min(DATA_BYTES_MAX);
        if most == 0 {
            return None;
        }
        match self.stream.read(&mut data[..most]) {
            Ok(0) => {
                self.client_ended = true;
                if self.guest_shut & NO_SEND != 0 {
                    self.reset();
                } else {
                    self.due.push_back((Operation::Shutdown, NO_SEND));
                }
                None
            }
            Ok(count) => {
                let bytes = u32::try_from(count).unwrap_or(0);
                self.sent = self.sent.wrapping_add(bytes);
                Some((self.header(Operation::Data, 0, bytes), count))
            }
            Err(error) if is_passing(&error) => None,
            Err(_) => {
                self.reset();
                None
            }
        }
    }

    fn header(&mut self, operation: Operation, flags: u32, data_bytes: u32) -> Header {
        self.told = self.taken;
        Header {
            host_port: self.host_port,
            guest_port: self.guest_port,
            data_bytes,
            operation,
            flags,
            room_bytes: ROOM_BYTES,
            taken_bytes: self.taken,
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
