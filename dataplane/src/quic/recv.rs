//! The receiving half of a stream.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use quinn_proto::{ReadError, ReadableError, StreamId, VarInt};

use super::QuicError;
use super::connection::{Connection, varint};
use super::shared::Shared;

/// Bytes taken from the transport at once. Taking a chunk at a time would pay the transport's
/// bookkeeping for each datagram; the stream's flow-control credit runs ahead of the reader by at most
/// this much.
const TAKE_BYTES: usize = 256 << 10;

/// A stream that we receive on.
///
/// Dropping it before its end tells the peer to stop (code 0).
pub struct RecvStream {
    connection: Connection,
    id: StreamId,
    /// Received in order, not read yet; at most [`TAKE_BYTES`].
    taken: VecDeque<Bytes>,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// More may come.
    Open,
    /// The peer has finished and everything was taken.
    Finished,
    /// The peer gave up.
    Reset(VarInt),
    /// We gave up.
    Stopped,
}

impl std::fmt::Debug for RecvStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvStream").field("id", &self.id).field("end", &self.end).finish_non_exhaustive()
    }
}

impl RecvStream {
    pub(super) fn new(connection: Connection, id: StreamId) -> Self {
        Self { connection, id, taken: VecDeque::new(), end: End::Open }
    }

    /// The stream's number, unique within the connection and the same on both sides.
    pub fn id(&self) -> u64 {
        self.id.into()
    }

    /// The connection this stream belongs to.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next bytes in order, at most `max` of them and at least one, without copying; `None` at the
    /// end of a stream that the peer has finished.
    ///
    /// The chunk is a view of the datagram it came in: hold on to it only briefly.
    ///
    /// # Errors
    /// [`QuicError::Reset`] by the peer, [`QuicError::Lost`] (what arrived before is returned first),
    /// [`QuicError::Closed`] after [`RecvStream::stop`].
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, QuicError> {
        if self.taken.is_empty() {
            poll_fn(|cx| self.poll_take(cx)).await?;
        }
        let Some(first) = self.taken.front_mut() else { return Ok(None) };
        if first.len() > max.max(1) {
            return Ok(Some(first.split_to(max.max(1))));
        }
        Ok(self.taken.pop_front())
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`QuicError::Ended`] when the stream is finished before that, else as for
    /// [`RecvStream::read_chunk`]. The content of `buffer` is then unspecified.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), QuicError> {
        let mut rest = buffer;
        while !rest.is_empty() {
            if self.taken.is_empty() {
                poll_fn(|cx| self.poll_take(cx)).await?;
            }
            let Some(first) = self.taken.front_mut() else {
                return Err(QuicError::Ended { missing: rest.len() });
            };
            let count = first.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            first.copy_to_slice(now);
            rest = later;
            if first.is_empty() {
                self.taken.pop_front();
            }
        }
        Ok(())
    }

    /// Tells the peer that nothing more is wanted (`code` cut to 62 bits) and throws away what was not
    /// read. No effect on a stream that has ended.
    pub fn stop(&mut self, code: u64) {
        self.taken.clear();
        if self.end != End::Open {
            return;
        }
        self.end = End::Stopped;
        let shared = &self.connection.handle.shared;
        let mut state = shared.state.borrow_mut();
        if state.lost().is_none() && state.proto.recv_stream(self.id).stop(varint(code)).is_ok() {
            drop(state);
            shared.touch();
        }
    }

    /// Ready when `taken` is not empty, or the stream has come to its good end.
    fn poll_take(&mut self, cx: &Context<'_>) -> Poll<Result<(), QuicError>> {
        let shared = &self.connection.handle.shared;
        if self.end == End::Open {
            self.end = take(shared, self.id, &mut self.taken);
        }
        if !self.taken.is_empty() {
            return Poll::Ready(Ok(()));
        }
        match self.end {
            End::Finished => Poll::Ready(Ok(())),
            End::Reset(code) => Poll::Ready(Err(QuicError::Reset(code.into_inner()))),
            End::Stopped => Poll::Ready(Err(QuicError::Closed)),
            End::Open => {
                let mut state = shared.state.borrow_mut();
                if let Some(lost) = state.lost() {
                    return Poll::Ready(Err(lost.clone().into()));
                }
                state.readers.insert(self.id, cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Moves what has arrived in order from the transport to `taken`, and says whether the end was met.
fn take(shared: &Shared, id: StreamId, taken: &mut VecDeque<Bytes>) -> End {
    let mut state = shared.state.borrow_mut();
    let mut stream = state.proto.recv_stream(id);
    let mut chunks = match stream.read(true) {
        Ok(chunks) => chunks,
        Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => return End::Stopped,
    };
    let mut room = TAKE_BYTES;
    let end = loop {
        if room == 0 {
            break End::Open;
        }
        match chunks.next(room) {
            Ok(Some(chunk)) => {
                room -= chunk.bytes.len();
                taken.push_back(chunk.bytes);
            }
            Ok(None) => break End::Finished,
            Err(ReadError::Blocked) => break End::Open,
            Err(ReadError::Reset(code)) => break End::Reset(code),
        }
    };
    let credit = chunks.finalize();
    drop(state);
    if credit.should_transmit() {
        shared.touch();
    }
    end
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop(0);
        self.connection.handle.shared.state.borrow_mut().readers.remove(&self.id);
    }
}
