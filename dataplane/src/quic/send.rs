//! The sending half of a stream.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn_proto::{FinishError, StreamId, VarInt, WriteError};

use super::connection::{Connection, varint};
use super::shared::{Fate, Sending, State};
use super::{Lost, QuicError};

/// Code of a stream that was dropped before it was finished.
const CODE_ABANDONED: u32 = 0;

/// A stream that we send on.
///
/// Dropping it before [`SendStream::finish`] resets it with code 0: a receiver never takes half of what
/// was meant for the whole. Dropping it after that is fine, the rest is delivered all the same as long as
/// the connection lives.
pub struct SendStream {
    connection: Connection,
    id: StreamId,
    /// Finished, reset or stopped: nothing may be written any more.
    ended: bool,
}

impl std::fmt::Debug for SendStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendStream").field("id", &self.id).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl SendStream {
    pub(super) fn new(connection: Connection, id: StreamId) -> Self {
        let sending = Sending { fate: Fate::Open, waiter: None };
        connection.handle.shared.state.borrow_mut().sending.insert(id, sending);
        Self { connection, id, ended: false }
    }

    /// The stream's number, unique within the connection and the same on both sides.
    pub fn id(&self) -> u64 {
        self.id.into()
    }

    /// The connection this stream belongs to.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Hands all of `chunks` to the transport without copying, in order. Waits while the send window or
    /// the peer's receive window is full, so that memory stays bounded.
    ///
    /// The chunks are held until the peer acknowledges them; they must not be views of memory that
    /// changes. Chunks of 64 KiB and more are cheapest: the transport looks for the bytes of a packet by
    /// walking the list of chunks that are not acknowledged.
    ///
    /// On return all chunks are empty. When the future is dropped half way, what was taken has been
    /// removed from the front of `chunks`.
    ///
    /// # Errors
    /// [`QuicError::Lost`], [`QuicError::Stopped`] by the peer, [`QuicError::Closed`] after `finish` or
    /// `reset`.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), QuicError> {
        let mut done = chunks.iter().take_while(|chunk| chunk.is_empty()).count();
        while done < chunks.len() {
            done += poll_fn(|cx| self.poll_write(&mut chunks[done..], cx)).await?;
        }
        Ok(())
    }

    /// Hands one chunk to the transport; see [`SendStream::write_chunks`].
    ///
    /// # Errors
    /// As for [`SendStream::write_chunks`].
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), QuicError> {
        self.write_chunks(&mut [chunk]).await
    }

    /// Copies `data` into the transport; see [`SendStream::write_chunks`] for waiting.
    ///
    /// # Errors
    /// As for [`SendStream::write_chunks`].
    pub async fn write_all(&mut self, data: &[u8]) -> Result<(), QuicError> {
        self.write_chunk(Bytes::copy_from_slice(data)).await
    }

    /// Ends the stream in good order, at once: everything written will be delivered, and then its end.
    /// [`SendStream::acknowledged`] tells when that has happened.
    ///
    /// # Errors
    /// As for [`SendStream::write_chunks`].
    pub fn finish(&mut self) -> Result<(), QuicError> {
        let shared = &self.connection.handle.shared;
        let mut state = shared.state.borrow_mut();
        if let Some(lost) = state.lost() {
            return Err(lost.clone().into());
        }
        if self.ended {
            return Err(QuicError::Closed);
        }
        self.ended = true;
        let finished = state.proto.send_stream(self.id).finish();
        drop(state);
        shared.touch();
        match finished {
            Ok(()) => Ok(()),
            Err(FinishError::Stopped(code)) => Err(QuicError::Stopped(code.into_inner())),
            Err(FinishError::ClosedStream) => Err(QuicError::Closed),
        }
    }

    /// Completes when the peer's transport has acknowledged everything up to the end of a finished
    /// stream. (That its user has read it, only its user can say.)
    ///
    /// # Errors
    /// [`QuicError::Lost`], [`QuicError::Stopped`]. Never completes before `finish`.
    pub async fn acknowledged(&mut self) -> Result<(), QuicError> {
        poll_fn(|cx| {
            let mut state = self.connection.handle.shared.state.borrow_mut();
            match state.sending.get(&self.id).map(|sending| sending.fate) {
                Some(Fate::Acknowledged) => return Poll::Ready(Ok(())),
                Some(Fate::Stopped(code)) => return Poll::Ready(Err(QuicError::Stopped(code.into_inner()))),
                Some(Fate::Open) | None => {}
            }
            if let Some(lost) = state.lost() {
                return Poll::Ready(Err(lost.clone().into()));
            }
            wait(&mut state, self.id, cx);
            Poll::Pending
        })
        .await
    }

    /// Gives the stream up: what is not delivered yet will not be, and the peer's reads fail with `code`
    /// (cut to 62 bits). No effect on a stream that was reset or whose connection is lost.
    pub fn reset(&mut self, code: u64) {
        self.reset_with(varint(code));
    }

    /// Streams with a higher priority are sent first; 0 at the beginning. Takes effect from the next
    /// write on.
    ///
    /// # Errors
    /// [`QuicError::Closed`] when the stream is over.
    pub fn set_priority(&mut self, priority: i32) -> Result<(), QuicError> {
        let mut state = self.connection.handle.shared.state.borrow_mut();
        state.proto.send_stream(self.id).set_priority(priority).map_err(|_| QuicError::Closed)
    }

    /// Writes what fits now; the count is of chunks that are done with.
    fn poll_write(&mut self, chunks: &mut [Bytes], cx: &Context<'_>) -> Poll<Result<usize, QuicError>> {
        let shared = &self.connection.handle.shared;
        let mut state = shared.state.borrow_mut();
        if let Some(lost) = state.lost() {
            return Poll::Ready(Err(Lost::clone(lost).into()));
        }
        if self.ended {
            return Poll::Ready(Err(QuicError::Closed));
        }
        match state.proto.send_stream(self.id).write_chunks(chunks) {
            Ok(written) => {
                drop(state);
                shared.touch();
                Poll::Ready(Ok(written.chunks))
            }
            Err(WriteError::Blocked) => {
                wait(&mut state, self.id, cx);
                Poll::Pending
            }
            Err(WriteError::Stopped(code)) => {
                self.ended = true;
                Poll::Ready(Err(QuicError::Stopped(code.into_inner())))
            }
            Err(WriteError::ClosedStream) => {
                self.ended = true;
                Poll::Ready(Err(QuicError::Closed))
            }
        }
    }

    fn reset_with(&mut self, code: VarInt) {
        self.ended = true;
        let shared = &self.connection.handle.shared;
        let mut state = shared.state.borrow_mut();
        if state.lost().is_none() && state.proto.send_stream(self.id).reset(code).is_ok() {
            drop(state);
            shared.touch();
        }
    }
}

fn wait(state: &mut State, id: StreamId, cx: &Context<'_>) {
    if let Some(sending) = state.sending.get_mut(&id) {
        sending.waiter = Some(cx.waker().clone());
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        if !self.ended {
            self.reset_with(CODE_ABANDONED.into());
        }
        self.connection.handle.shared.state.borrow_mut().sending.remove(&self.id);
    }
}
