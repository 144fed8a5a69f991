//! One connection of `mashined`, non-blocking in both directions.
//!
//! Reading stops exactly at the end of a frame, so that the descriptors which arrive with the next frame's first byte cannot be
//! mistaken for this one's. A peer that breaks the framing, sends too many descriptors, or does not read its
//! answers loses the connection; the guest does not notice.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rkyv::util::AlignedVec;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use wire::frame::{self, EncodeError, FrameError, HEADER_BYTES, Header};
use wire::vmm::{FromVmm, ToVmm, VERSION};

/// Most descriptors with one frame: those of [`wire::vmm::Request::Create`].
const DESCRIPTORS_MAX: usize = 5 + 2 * wire::space::DISKS_MAX;
/// How much of a body is made room for at a time, so that a length alone costs no memory.
const READ_BYTES: usize = 256 << 10;
/// Most bytes of answers that may wait for the peer: two of the longest.
const QUEUED_BYTES_MAX: usize = 16 << 20;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer closed it.
    #[error("the connection was closed")]
    Closed,
    /// The operating system.
    #[error("the connection failed")]
    Io(#[from] Errno),
    /// Not a frame of ours.
    #[error("the peer broke the protocol")]
    Frame(#[from] FrameError),
    /// A frame of another version.
    #[error("the peer speaks version {0} of the protocol, this VMM {VERSION}")]
    Version(u16),
    /// Too many descriptors.
    #[error("the peer sent more than {DESCRIPTORS_MAX} descriptors")]
    Descriptors,
    /// The peer does not read.
    #[error("the peer does not read its answers")]
    Stuck,
    /// An answer that is no frame; a bug.
    #[error("an answer cannot be sent")]
    Encode(#[from] EncodeError),
}

/// A request with what came along.
#[derive(Debug)]
pub struct Incoming {
    /// The request.
    pub message: ToVmm,
    /// Descriptors, in order.
    pub descriptors: Vec<OwnedFd>,
}

struct Outgoing {
    bytes: AlignedVec,
    sent: usize,
    descriptors: Vec<OwnedFd>,
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    fixed: [u8; HEADER_BYTES],
    fixed_bytes: usize,
    header: Option<Header>,
    body: AlignedVec,
    body_bytes: usize,
    descriptors: Vec<OwnedFd>,
    outgoing: VecDeque<Outgoing>,
    /// Whether the peer has said hello.
    pub greeted: bool,
}

impl Connection {
    /// A connection on `stream`, which must be non-blocking.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            fixed: [0; HEADER_BYTES],
            fixed_bytes: 0,
            header: None,
            body: AlignedVec::new(),
            body_bytes: 0,
            descriptors: Vec::new(),
            outgoing: VecDeque::new(),
            greeted: false,
        }
    }

    /// Reads until a whole request is there; `None` when there is no more to read now.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is of no use then.
    pub fn receive(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            let Some(header) = self.header else {
                let got =
                    receive_into(&self.stream, &mut self.fixed[self.fixed_bytes..], &mut self.descriptors)?;
                let Some(got) = got else { return Ok(None) };
                self.fixed_bytes += got;
                if self.fixed_bytes == HEADER_BYTES {
                    let header = Header::parse(&self.fixed)?;
                    if header.version != VERSION {
                        return Err(ConnectionError::Version(header.version));
                    }
                    self.header = Some(header);
                }
                continue;
            };
            let want = usize::try_from(header.body_bytes).unwrap_or(usize::MAX);
            if self.body_bytes == want {
                let message = header.decode::<ToVmm>(&self.body)?;
                self.header = None;
                self.fixed_bytes = 0;
                self.body = AlignedVec::new();
                self.body_bytes = 0;
                let descriptors = std::mem::take(&mut self.descriptors);
                return Ok(Some(Incoming { message, descriptors }));
            }
            self.body.resize(want.min(self.body_bytes + READ_BYTES), 0);
            let got = receive_into(&self.stream, &mut self.body[self.body_bytes..], &mut self.descriptors)?;
            let Some(got) = got else { return Ok(None) };
            self.body_bytes += got;
        }
    }

    /// Queues a message and sends what the socket takes.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is of no use then.
    pub fn send(&mut self, message: &FromVmm, descriptors: Vec<OwnedFd>) -> Result<(), ConnectionError> {
        let bytes = frame::encode(VERSION, message, 0)?;
        let queued: usize = self.outgoing.iter().map(|out| out.bytes.len() - out.sent).sum();
        if queued + bytes.len() > QUEUED_BYTES_MAX {
            return Err(ConnectionError::Stuck);
        }
        self.outgoing.push_back(Outgoing { bytes, sent: 0, descriptors });
        self.flush()
    }

    /// Sends what is queued, as far as the socket takes it.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is of no use then.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while let Some(out) = self.outgoing.front_mut() {
            match send_from(&self.stream, &out.bytes[out.sent..], &out.descriptors) {
                Ok(sent) => {
                    out.sent += sent;
                    out.descriptors.clear();
                    if out.sent == out.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether answers wait for the socket.
    pub fn is_blocked(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Reads into `buffer`; `None` when nothing is there.
fn receive_into(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, ConnectionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS_MAX {
        return Err(ConnectionError::Descriptors);
    }
    if received.bytes == 0 {
        return Err(ConnectionError::Closed);
    }
    Ok(Some(received.bytes))
}

fn send_from(stream: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::MSGSIZE);
    }
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use wire::vmm::Request;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Connection::new(ours), theirs)
    }

    fn hello(seq: u32) -> AlignedVec {
        frame::encode(VERSION, &ToVmm { seq, request: Request::Hello { version: 1 } }, 0).unwrap()
    }

    #[test]
    fn descriptors_stay_with_their_frame() {
        let (mut ours, theirs) = pair();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let one = hello(1);
        send_from(&theirs, &one, &[file.try_clone().unwrap(), file.try_clone().unwrap()]).unwrap();
        send_from(&theirs, &hello(2)[..30], &[file]).unwrap();
        let first = ours.receive().unwrap().unwrap();
        assert_eq!((first.message.seq, first.descriptors.len()), (1, 2));
        assert!(ours.receive().unwrap().is_none());
        send_from(&theirs, &hello(2)[30..], &[]).unwrap();
        let second = ours.receive().unwrap().unwrap();
        assert_eq!((second.message.seq, second.descriptors.len()), (2, 1));
    }

    #[test]
    fn broken_framing_ends_the_connection() {
        for mut bytes in [hello(1).to_vec(), hello(1).to_vec(), hello(1).to_vec(), hello(1).to_vec()]
            .into_iter()
            .enumerate()
            .map(|(at, mut bytes)| {
                bytes[[0, 4, 16, HEADER_BYTES][at]] ^= 0x10;
                bytes
            })
        {
            let (mut ours, mut theirs) = pair();
            bytes.extend_from_slice(&[0; 64]);
            theirs.write_all(&bytes).unwrap();
            assert!(ours.receive().is_err());
        }
        let (mut ours, theirs) = pair();
        drop(theirs);
        assert!(matches!(ours.receive(), Err(ConnectionError::Closed)));
    }

    #[test]
    fn a_length_alone_costs_no_memory() {
        let (mut ours, mut theirs) = pair();
        let mut bytes = hello(1).to_vec();
        bytes[8..12].copy_from_slice(&(8u32 << 20).to_le_bytes());
        theirs.write_all(&bytes).unwrap();
        assert!(ours.receive().unwrap().is_none());
        assert!(ours.body.capacity() <= 2 * READ_BYTES);
        let (mut ours, mut theirs) = pair();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        theirs.write_all(&bytes).unwrap();
        assert!(matches!(ours.receive(), Err(ConnectionError::Frame(FrameError::TooLong { .. }))));
    }

    #[test]
    fn a_peer_that_does_not_read_is_dropped() {
        let (mut ours, _theirs) = pair();
        let answer = FromVmm::Reply { seq: 1, reply: wire::vmm::Reply::State(vec![0; 4 << 20]) };
        let mut results = (0..8).map(|_| ours.send(&answer, Vec::new()));
        assert!(results.any(|result| matches!(result, Err(ConnectionError::Stuck))));
        assert!(ours.is_blocked());
    }
}
