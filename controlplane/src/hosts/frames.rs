//! Frames on a QUIC stream.

use quinn::{ReadExactError, RecvStream, SendStream};
use rkyv::util::AlignedVec;
use wire::frame::{self, EncodeError, FrameError, HEADER_BYTES, Header, Message};

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer's bytes are not the frames that belong here.
    #[error("the peer broke the protocol")]
    Frame(#[from] FrameError),
    /// The stream ended in the middle of a frame, or the connection broke.
    #[error("the stream ended within a frame")]
    Read(#[from] ReadExactError),
    /// The connection broke.
    #[error("the stream cannot be written")]
    Write(#[from] quinn::WriteError),
    /// The connection broke.
    #[error("the connection broke")]
    Connection(#[from] quinn::ConnectionError),
    /// A message that does not fit a frame.
    #[error("a message cannot be encoded")]
    Encode(#[from] EncodeError),
    /// The peer's certificate says nothing we can use.
    #[error("the peer's identity")]
    Identity(#[from] pki::PkiError),
    /// The peer did not say Hello in time, or said it wrong.
    #[error("{0}")]
    Hello(String),
    /// The control plane is stopping.
    #[error("the control plane is stopping")]
    Stopping,
}

/// Reads one message. `None` when the stream ended between two.
///
/// # Errors
/// [`LinkError`]; the link is then of no further use.
pub async fn read<M: Message>(stream: &mut RecvStream) -> Result<Option<(u16, M)>, LinkError> {
    let mut fixed = [0; HEADER_BYTES];
    match stream.read_exact(&mut fixed).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let header = Header::parse(&fixed)?;
    if header.kind != M::KIND {
        return Err(FrameError::WrongKind { got: header.kind, want: M::KIND }.into());
    }
    let length = header.body_bytes as usize;
    let mut body = AlignedVec::with_capacity(length);
    body.resize(length, 0);
    stream.read_exact(&mut body).await?;
    Ok(Some((header.version, header.decode(&body)?)))
}

/// Writes one message.
///
/// # Errors
/// [`LinkError`]; the link is then of no further use.
pub async fn write<M: Message>(stream: &mut SendStream, message: &M) -> Result<(), LinkError> {
    let bytes = frame::encode(wire::fleet::VERSION, message, 0)?;
    Ok(stream.write_all(&bytes).await?)
}
