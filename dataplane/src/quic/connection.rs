//! One connection to a peer of the fleet, as its users see it.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use pki::PeerIdentity;
use quinn_proto::{Dir, StreamId, VarInt};

use super::shared::{Phase, Shared};
use super::{Lost, QuicError, RecvStream, SendStream};

/// A connection whose peer has proved who it is.
///
/// Clones are the same connection. When the last clone and the last stream are gone, the connection is
/// closed with code 0. It belongs to the shard that made it and cannot leave its thread.
#[derive(Clone)]
pub struct Connection {
    pub(super) handle: Rc<Handle>,
}

/// What the users of a connection share; the driver holds only the `Shared` within.
pub(super) struct Handle {
    pub(super) shared: Rc<Shared>,
    peer: PeerIdentity,
    remote: SocketAddr,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close(VarInt::from_u32(0), "");
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.handle.peer)
            .field("remote", &self.handle.remote)
            .finish()
    }
}

/// How a connection fares; figures are since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Congestion window, bytes.
    pub congestion_window_bytes: u64,
    /// Datagram size in use, UDP payload bytes.
    pub mtu: u16,
    /// Packets that were sent.
    pub packets_sent: u64,
    /// Packets that were declared lost (their content was sent again).
    pub packets_lost: u64,
    /// How often the congestion window was cut.
    pub congestion_events: u64,
    /// UDP payload bytes sent, headers and retransmissions included.
    pub bytes_sent: u64,
    /// UDP payload bytes received.
    pub bytes_received: u64,
    /// Send calls: `bytes_sent` over this is how well segmentation offload works.
    pub sends: u64,
}

impl Connection {
    /// `None` while the handshake has not ended well.
    pub(super) fn established(shared: Rc<Shared>) -> Option<Self> {
        let (peer, remote) = {
            let state = shared.state.borrow();
            let Phase::Established(peer) = &state.phase else { return None };
            (peer.clone(), state.proto.remote_address())
        };
        Some(Self { handle: Rc::new(Handle { shared, peer, remote }) })
    }

    /// Who the peer is, proved by its certificate.
    pub fn peer(&self) -> &PeerIdentity {
        &self.handle.peer
    }

    /// The peer's name, without kind and domain.
    pub fn peer_host(&self) -> &str {
        self.handle.peer.name()
    }

    /// Where the peer is.
    pub fn remote_addr(&self) -> SocketAddr {
        self.handle.remote
    }

    /// Opens a stream to send on. Waits while the peer's limit of open streams is reached.
    ///
    /// The peer learns of the stream with its first bytes.
    ///
    /// # Errors
    /// [`QuicError::Lost`].
    pub async fn open_uni(&self) -> Result<SendStream, QuicError> {
        Ok(SendStream::new(self.clone(), self.open(Dir::Uni).await?))
    }

    /// Opens a stream in both directions. Waits while the peer's limit of open streams is reached.
    ///
    /// # Errors
    /// [`QuicError::Lost`].
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), QuicError> {
        let id = self.open(Dir::Bi).await?;
        Ok((SendStream::new(self.clone(), id), RecvStream::new(self.clone(), id)))
    }

    /// The next stream that the peer has opened to send on, in the order of their opening.
    ///
    /// # Errors
    /// [`QuicError::Lost`].
    pub async fn accept_uni(&self) -> Result<RecvStream, QuicError> {
        Ok(RecvStream::new(self.clone(), self.accept(Dir::Uni).await?))
    }

    /// The next stream in both directions that the peer has opened, in the order of their opening.
    ///
    /// # Errors
    /// [`QuicError::Lost`].
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), QuicError> {
        let id = self.accept(Dir::Bi).await?;
        Ok((SendStream::new(self.clone(), id), RecvStream::new(self.clone(), id)))
    }

    /// Ends the connection now: what was not acknowledged may never arrive. All operations on it fail
    /// with [`Lost::ClosedLocally`] from here on, and the peer's with [`Lost::ClosedByPeer`].
    ///
    /// `code` is cut to 62 bits; `reason` is for the peer's log.
    pub fn close(&self, code: u64, reason: &str) {
        self.handle.shared.close(varint(code), reason);
    }

    /// Completes when the connection has ended, and says why.
    pub async fn closed(&self) -> Lost {
        poll_fn(|cx| {
            let mut state = self.handle.shared.state.borrow_mut();
            match state.lost() {
                Some(lost) => Poll::Ready(lost.clone()),
                None => {
                    state.phase_waiters.add(cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Why the connection has ended, if it has.
    pub fn lost(&self) -> Option<Lost> {
        self.handle.shared.state.borrow().lost().cloned()
    }

    /// How the connection fares.
    pub fn stats(&self) -> ConnectionStats {
        let stats = self.handle.shared.state.borrow().proto.stats();
        ConnectionStats {
            rtt: stats.path.rtt,
            congestion_window_bytes: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            packets_sent: stats.path.sent_packets,
            packets_lost: stats.path.lost_packets,
            congestion_events: stats.path.congestion_events,
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            sends: stats.udp_tx.ios,
        }
    }

    async fn open(&self, dir: Dir) -> Result<StreamId, QuicError> {
        poll_fn(|cx| {
            let mut state = self.handle.shared.state.borrow_mut();
            if let Some(lost) = state.lost() {
                return Poll::Ready(Err(lost.clone().into()));
            }
            match state.proto.streams().open(dir) {
                Some(id) => Poll::Ready(Ok(id)),
                None => {
                    state.opening(dir).add(cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    async fn accept(&self, dir: Dir) -> Result<StreamId, QuicError> {
        poll_fn(|cx| {
            let mut state = self.handle.shared.state.borrow_mut();
            if let Some(id) = state.proto.streams().accept(dir) {
                return Poll::Ready(Ok(id));
            }
            if let Some(lost) = state.lost() {
                return Poll::Ready(Err(lost.clone().into()));
            }
            state.accepting(dir).add(cx);
            Poll::Pending
        })
        .await
    }
}

/// QUIC's codes have 62 bits.
pub(super) fn varint(code: u64) -> VarInt {
    VarInt::from_u64(code & (u64::MAX >> 2)).unwrap_or(VarInt::MAX)
}
