//! Frames on QUIC streams.

use rkyv::util::AlignedVec;
use wire::frame::{self, EncodeError, FrameError, HEADER_BYTES, Header, Message};

use crate::quic::{QuicError, RecvStream, SendStream};

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream or its connection.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// The peer sent something else than a frame that belongs there.
    #[error("the peer broke the framing")]
    Frame(#[from] FrameError),
    /// A message of ours that does not fit a frame.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// What was to be sent cannot be read from a disk of the machine.
    #[error("a disk of the machine cannot be read on this host")]
    Disk(#[from] std::io::Error),
}

/// Sends a message without payload.
///
/// # Errors
/// [`StreamError`].
pub async fn send<M: Message>(to: &mut SendStream, version: u16, message: &M) -> Result<(), StreamError> {
    let bytes = frame::encode(version, message, 0)?;
    Ok(to.write_all(&bytes).await?)
}

/// Receives a frame's header and body into `body`, whose memory is used again. `None` at the end of the stream. The payload, if any, is
/// still to be read.
///
/// # Errors
/// [`StreamError`].
pub async fn receive_head(
    from: &mut RecvStream,
    body: &mut AlignedVec,
) -> Result<Option<Header>, StreamError> {
    let mut fixed = [0; HEADER_BYTES];
    match from.read_exact(&mut fixed).await {
        Ok(()) => {}
        // Nothing of a frame: the stream ended where it may.
        Err(QuicError::Ended { missing: HEADER_BYTES }) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let header = Header::parse(&fixed)?;
    body.clear();
    body.resize(header.body_bytes as usize, 0);
    from.read_exact(body).await?;
    Ok(Some(header))
}

/// Receives a message without payload; `None` at the end of the stream.
///
/// # Errors
/// [`StreamError`].
pub async fn receive<M: Message>(from: &mut RecvStream) -> Result<Option<M>, StreamError> {
    let mut body = AlignedVec::new();
    let Some(header) = receive_head(from, &mut body).await? else { return Ok(None) };
    Ok(Some(header.decode(&body)?))
}
