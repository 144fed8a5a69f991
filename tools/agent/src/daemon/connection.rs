//! One connection: frames in, frames out, and at most one frame more than the kernel takes in memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use wire::agent::{FailCode, FromAgent, SessionId, ToAgent, VERSION};
use wire::frame::{self, FrameError, HEADER_BYTES, Header};

/// Read at once. Also what is encoded ahead of the socket.
const STEP_BYTES: usize = 64 << 10;

/// What a connection is used for; its first message decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Nothing yet, or requests.
    Requests,
    /// A session.
    Session(SessionId),
}

/// Why nothing more comes from a connection.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The client is gone, or the way to it.
    #[error("the connection ended")]
    Ended,
    /// The kernel says so.
    #[error("reading from or writing to the connection")]
    Io(#[from] io::Error),
    /// What came is no frame.
    #[error("what came is no message")]
    Frame(#[from] FrameError),
    /// A frame of another version.
    #[error("version {0} of the protocol, ours is {VERSION}")]
    Version(u16),
}

/// A connection and its buffers.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// What it is used for.
    pub used: Use,
    input: Vec<u8>,
    output: Vec<u8>,
    /// To be closed once everything is written.
    pub closing: bool,
}

impl Connection {
    /// A connection that has just been accepted.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, used: Use::Requests, input: Vec::new(), output: Vec::new(), closing: false }
    }

    /// For `poll`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether something waits to be written.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether another message may be put in.
    pub fn takes_output(&self) -> bool {
        self.output.len() < STEP_BYTES
    }

    /// Whether bytes should be read. Within a session always (the session's window bounds them); of requests, the next one when the last one's answer is on its way.
    pub fn takes_input(&self) -> bool {
        !self.closing && (matches!(self.used, Use::Session(_)) || self.output.is_empty())
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// [`Broken`] at the end, or when the kernel says so.
    pub fn read(&mut self) -> Result<(), Broken> {
        let mut buffer = [0; STEP_BYTES];
        match rustix::io::read(&self.socket, &mut buffer[..]) {
            Ok(0) => Err(Broken::Ended),
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(Broken::Io(error.into())),
        }
    }

    /// The next whole message. After each [`Connection::read`] it is asked for until there is none, so that no more than a frame and a step stay in memory.
    ///
    /// # Errors
    /// [`Broken`] when it is none.
    pub fn next_message(&mut self) -> Result<Option<ToAgent>, Broken> {
        let Some(fixed) = self.input.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::parse(fixed)?;
        if header.version != VERSION {
            return Err(Broken::Version(header.version));
        }
        let length = HEADER_BYTES + usize::try_from(header.body_bytes).unwrap_or(usize::MAX - HEADER_BYTES);
        let Some(whole) = self.input.get(..length) else { return Ok(None) };
        let (_, message) = frame::decode_whole(whole)?;
        self.input.drain(..length);
        Ok(Some(message))
    }

    /// Puts a message in.
    pub fn send(&mut self, message: &FromAgent) {
        match frame::encode(VERSION, message, 0) {
            Ok(frame) => self.output.extend_from_slice(&frame),
            // Ours are all bounded; if one is not, the connection is of no use any more.
            Err(error) => {
                crate::say!("cannot send a message: {error}");
                self.closing = true;
            }
        }
    }

    /// Says why not, and closes.
    pub fn refuse(&mut self, code: FailCode, detail: impl Into<String>) {
        self.send(&FromAgent::Failed { code, detail: detail.into() });
        self.closing = true;
    }

    /// Writes what the kernel takes.
    ///
    /// # Errors
    /// [`Broken`] when the client is gone.
    pub fn write(&mut self) -> Result<(), Broken> {
        while !self.output.is_empty() {
            match rustix::net::send(&self.socket, &self.output, rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Broken::Io(error.into())),
            }
        }
        Ok(())
    }
}
