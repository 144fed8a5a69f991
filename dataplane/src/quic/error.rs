//! What can go wrong on a connection, as types that callers can act on.

use std::net::SocketAddr;
use std::sync::Arc;

/// Why an operation of the transport failed.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The socket could not be made or bound.
    #[error("binding a UDP socket to {addr}")]
    Bind {
        /// The address that was asked for.
        addr: SocketAddr,
        /// Why the system refused.
        #[source]
        source: std::io::Error,
    },
    /// A transport option is out of its range.
    #[error("transport option {name} is out of range: {detail}")]
    Options {
        /// Which option.
        name: &'static str,
        /// The range it must be in.
        detail: &'static str,
    },
    /// Keys or certificates are unusable.
    #[error("TLS set-up")]
    Pki(#[from] pki::PkiError),
    /// The TLS configuration lacks the cipher suite that QUIC needs for its first packets.
    #[error("the TLS configuration cannot carry QUIC")]
    Cipher(#[from] quinn_proto::crypto::rustls::NoInitialCipherSuite),
    /// The attempt to connect could not even begin.
    #[error("connecting to {addr}")]
    Connect {
        /// The peer's address.
        addr: SocketAddr,
        /// What is wrong with the attempt.
        #[source]
        source: quinn_proto::ConnectError,
    },
    /// The connection is gone; every operation on it and on its streams fails with the same reason.
    #[error("connection lost")]
    Lost(#[from] Lost),
    /// The peer gave up sending on this stream.
    #[error("the peer reset the stream (code {0})")]
    Reset(u64),
    /// The peer no longer wants what is sent on this stream.
    #[error("the peer stopped the stream (code {0})")]
    Stopped(u64),
    /// The stream ended, in good order, before all that was asked for had arrived.
    #[error("the stream ended {missing} bytes early")]
    Ended {
        /// How many bytes were still wanted.
        missing: usize,
    },
    /// The stream was already finished, reset or stopped by this side.
    #[error("the stream is already closed on this side")]
    Closed,
    /// The endpoint is shutting down and takes part in nothing new.
    #[error("the endpoint is shut down")]
    EndpointClosed,
}

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Lost {
    /// Nothing was heard from the peer for the idle timeout: it is dead, or the link is.
    #[error("nothing was heard from the peer for the idle timeout")]
    TimedOut,
    /// The peer closed it, with a code and a reason of its own.
    #[error("closed by the peer (code {code}): {reason}")]
    ClosedByPeer {
        /// The peer's code.
        code: u64,
        /// The peer's words; untrusted text.
        reason: String,
    },
    /// This side closed it.
    #[error("closed by this side")]
    ClosedLocally,
    /// The peer restarted and knows nothing of this connection.
    #[error("the peer has restarted and lost the connection")]
    PeerRestarted,
    /// TLS, QUIC itself, or the peer's refusal to take more connections ended it.
    #[error("the handshake or the protocol failed")]
    Protocol(#[source] quinn_proto::ConnectionError),
    /// TLS accepted the peer but its certificate carries no identity of a fleet.
    #[error("the peer is no member of the fleet")]
    Stranger(#[source] Arc<pki::PkiError>),
}

impl From<quinn_proto::ConnectionError> for Lost {
    fn from(error: quinn_proto::ConnectionError) -> Self {
        use quinn_proto::ConnectionError as E;
        match error {
            E::TimedOut => Lost::TimedOut,
            E::LocallyClosed => Lost::ClosedLocally,
            E::Reset => Lost::PeerRestarted,
            E::ApplicationClosed(close) => Lost::ClosedByPeer {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            other => Lost::Protocol(other),
        }
    }
}
