//! One shard's end of the transport: a socket, the connections on it and the task that drives them.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use pki::{PeerIdentity, Trust};
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{ClientConfig, ConnectionHandle, EndpointConfig, ServerConfig, VarInt};

use super::driver::Driver;
use super::notify::{Bell, Waiters};
use super::shared::{Phase, Shared};
use super::socket::{self, UdpSocket};
use super::{Connection, QuicError, TransportOptions};

/// A UDP socket and its QUIC connections, on one shard.
///
/// Clones are the same endpoint; none of them can leave the thread. The driver runs as a task of the
/// executor it was bound on, and ends after [`Endpoint::shutdown`], or when the last clone and the last
/// connection are gone.
#[derive(Clone)]
pub struct Endpoint {
    owner: Rc<Owner>,
}

struct Owner {
    core: Rc<Core>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.core.abandoned.set(true);
        self.core.waiting.borrow_mut().ready.clear();
        self.core.bell.ring();
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("local_addr", &self.local_addr()).finish_non_exhaustive()
    }
}

/// What handles and driver share.
pub(super) struct Core {
    pub(super) socket: UdpSocket,
    pub(super) proto: RefCell<quinn_proto::Endpoint>,
    pub(super) connections: RefCell<HashMap<usize, Rc<Shared>>>,
    pub(super) bell: Rc<Bell>,
    pub(super) waiting: RefCell<Waiting>,
    pub(super) options: TransportOptions,
    pub(super) server_crypto: Arc<QuicServerConfig>,
    client_crypto: Arc<QuicClientConfig>,
    /// No handle is left: the driver ends with its last connection.
    pub(super) abandoned: Cell<bool>,
    /// `shutdown` was called: nothing new is made or taken.
    pub(super) closing: Cell<bool>,
    pub(super) stopped: Cell<bool>,
    pub(super) stop_waiters: RefCell<Waiters>,
}

/// Incoming connections that nobody has accepted yet.
#[derive(Default)]
pub(super) struct Waiting {
    /// In their handshake; bounded, with `ready`, by the backlog.
    pub(super) handshakes: usize,
    pub(super) ready: VecDeque<Connection>,
    pub(super) acceptors: Waiters,
}

impl Endpoint {
    /// Binds a socket and starts the driver on the current executor.
    ///
    /// Port 0 has the system choose one; see [`Endpoint::local_addr`]. The IPv6 wildcard address takes
    /// IPv4 too. All peers, dialled or dialling, must be members of the fleet that `trust` stands for.
    ///
    /// # Errors
    /// [`QuicError::Options`], [`QuicError::Pki`], [`QuicError::Bind`].
    ///
    /// # Panics
    /// When called outside of a glommio executor.
    pub fn bind(addr: SocketAddr, trust: &Trust, options: TransportOptions) -> Result<Self, QuicError> {
        options.validate()?;
        let server_crypto = Arc::new(QuicServerConfig::try_from(trust.server_config(pki::ALPN_DATA)?)?);
        let client_crypto = Arc::new(QuicClientConfig::try_from(trust.client_config(pki::ALPN_DATA)?)?);
        let socket = UdpSocket::bind(addr, options.socket_buffer_bytes)
            .map_err(|source| QuicError::Bind { addr, source })?;

        let mut config = EndpointConfig::default();
        // The largest that UDP can carry is within the range that is checked here.
        let _ = config.max_udp_payload_size(super::options::UDP_PAYLOAD_MAX);
        let server = server_config(&options, server_crypto.clone(), None);
        let proto = quinn_proto::Endpoint::new(Arc::new(config), Some(server), true, None);

        let core = Rc::new(Core {
            socket,
            proto: RefCell::new(proto),
            connections: RefCell::default(),
            bell: Rc::default(),
            waiting: RefCell::default(),
            options,
            server_crypto,
            client_crypto,
            abandoned: Cell::new(false),
            closing: Cell::new(false),
            stopped: Cell::new(false),
            stop_waiters: RefCell::default(),
        });
        glommio::spawn_local(Driver::new(core.clone()).run()).detach();
        Ok(Self { owner: Rc::new(Owner { core }) })
    }

    /// The address that was bound, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.core().socket.local_addr()
    }

    /// Connects to the fleet member `peer` at `addr`. Completes when the peer has proved to be `peer`.
    ///
    /// Whether the peer accepts *us* it decides a moment later: a refusal ends the connection that this
    /// returns (see [`Connection::closed`]), so treat the peer's first answer as the proof.
    ///
    /// A peer that does not answer fails it after the idle timeout; drop the future to give up sooner.
    ///
    /// # Errors
    /// [`QuicError::Connect`], or [`QuicError::Lost`] with what ended the handshake.
    pub async fn connect(&self, addr: SocketAddr, peer: &PeerIdentity) -> Result<Connection, QuicError> {
        let shared = self.core().dial(addr, &peer.dns_name())?;
        let mut guard = CloseUnlessKept { shared: shared.clone(), kept: false };
        poll_fn(|cx| {
            let mut state = shared.state.borrow_mut();
            match &state.phase {
                Phase::Established(_) => Poll::Ready(Ok(())),
                Phase::Lost(lost) => Poll::Ready(Err(QuicError::Lost(lost.clone()))),
                Phase::Handshaking => {
                    state.phase_waiters.add(cx);
                    Poll::Pending
                }
            }
        })
        .await?;
        guard.kept = true;
        Connection::established(shared).ok_or(QuicError::EndpointClosed)
    }

    /// The next connection that a member of the fleet has made to us; its identity is proved.
    ///
    /// # Errors
    /// [`QuicError::EndpointClosed`] after [`Endpoint::shutdown`].
    pub async fn accept(&self) -> Result<Connection, QuicError> {
        poll_fn(|cx| {
            let mut waiting = self.core().waiting.borrow_mut();
            if let Some(connection) = waiting.ready.pop_front() {
                return Poll::Ready(Ok(connection));
            }
            if self.core().closing.get() || self.core().stopped.get() {
                return Poll::Ready(Err(QuicError::EndpointClosed));
            }
            waiting.acceptors.add(cx);
            Poll::Pending
        })
        .await
    }

    /// Closes all connections with `code` and `reason`, tells the peers, and completes when the driver
    /// has ended (after about three round trips; connections whose peer is gone do not hold it up long).
    pub async fn shutdown(&self, code: u64, reason: &str) {
        let core = self.core();
        core.closing.set(true);
        let connections: Vec<_> = core.connections.borrow().values().cloned().collect();
        for connection in connections {
            connection.close(super::connection::varint(code), reason);
        }
        let unclaimed = std::mem::take(&mut core.waiting.borrow_mut().ready);
        drop(unclaimed);
        core.waiting.borrow_mut().acceptors.wake_all();
        core.bell.ring();
        poll_fn(|cx| {
            if core.stopped.get() {
                return Poll::Ready(());
            }
            core.stop_waiters.borrow_mut().add(cx);
            Poll::Pending
        })
        .await;
    }

    fn core(&self) -> &Core {
        &self.owner.core
    }
}

/// A connection attempt that is dropped half way must not live on.
struct CloseUnlessKept {
    shared: Rc<Shared>,
    kept: bool,
}

impl Drop for CloseUnlessKept {
    fn drop(&mut self) {
        if !self.kept {
            self.shared.close(VarInt::from_u32(0), "");
        }
    }
}

impl Core {
    fn dial(&self, addr: SocketAddr, server_name: &str) -> Result<Rc<Shared>, QuicError> {
        if self.closing.get() || self.stopped.get() {
            return Err(QuicError::EndpointClosed);
        }
        let mut config = ClientConfig::new(self.client_crypto.clone());
        config.transport_config(self.options.transport(socket::route_mtu(addr)));
        let (handle, proto) = self
            .proto
            .borrow_mut()
            .connect(Instant::now(), config, addr, server_name)
            .map_err(|source| QuicError::Connect { addr, source })?;
        Ok(self.adopt(handle, proto))
    }

    /// Takes charge of a new connection.
    pub(super) fn adopt(&self, handle: ConnectionHandle, proto: quinn_proto::Connection) -> Rc<Shared> {
        let shared = Shared::new(handle.0, proto, self.bell.clone());
        self.connections.borrow_mut().insert(handle.0, shared.clone());
        shared.touch();
        shared
    }
}

/// The settings for a connection that `peer` makes to us.
pub(super) fn server_config(
    options: &TransportOptions,
    crypto: Arc<QuicServerConfig>,
    peer: Option<SocketAddr>,
) -> Arc<ServerConfig> {
    let mut config = ServerConfig::with_crypto(crypto);
    config.transport_config(options.transport(peer.and_then(socket::route_mtu)));
    // Hosts do not roam; a peer whose address changes has to dial again.
    config.migration(false);
    config.max_incoming(options.accept_backlog);
    Arc::new(config)
}
