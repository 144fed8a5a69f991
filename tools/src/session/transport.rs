//! What carries frames between a session and the agent: each message is one frame, whole and in order.

use std::future::Future;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wire::frame::{FrameError, HEADER_BYTES, Header};

/// Why nothing can be carried any more. The session tries another connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The way broke, or cannot be made.
    #[error("{0}")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What came is no frame.
    #[error("what came is no message of the agent")]
    Frame(#[from] FrameError),
    /// Trying again is of no use: the machine does not exist, the token is not valid.
    #[error("{0}")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<std::io::Error> for TransportError {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error.into())
    }
}

/// A connection to the agent.
pub trait Transport {
    /// Sends one frame. Not cancelled while under way, but for a time-out that ends the connection.
    fn send(&mut self, frame: &[u8]) -> impl Future<Output = Result<(), TransportError>>;

    /// The next frame, whole; nothing at the end. **Must be cancel-safe**: a call that is dropped loses no bytes.
    fn recv(&mut self) -> impl Future<Output = Result<Option<Vec<u8>>, TransportError>>;
}

/// Frames over a byte stream.
#[derive(Debug)]
pub struct Framed<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Framed<S> {
    /// Over `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    fn take(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let Some(fixed) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::parse(fixed)?;
        let bytes = u64::from(header.body_bytes) + u64::from(header.payload_bytes);
        let length = usize::try_from(bytes).unwrap_or(usize::MAX - HEADER_BYTES) + HEADER_BYTES;
        if self.buffer.len() < length {
            return Ok(None);
        }
        let rest = self.buffer.split_off(length);
        Ok(Some(std::mem::replace(&mut self.buffer, rest)))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Transport for Framed<S> {
    async fn send(&mut self, frame: &[u8]) -> Result<(), TransportError> {
        self.stream.write_all(frame).await?;
        Ok(self.stream.flush().await?)
    }

    async fn recv(&mut self) -> Result<Option<Vec<u8>>, TransportError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            // Cancel-safe: bytes are in the buffer or still in the stream.
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}
