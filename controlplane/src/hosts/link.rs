//! The listening end: accepts hosts, checks who they are, carries messages between them and the core.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pki::{Kind, PeerIdentity, PkiError, Trust};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicServerConfig};
use quinn::rustls::pki_types::CertificateDer;
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use wire::fleet::{FromHost, ToHost, VERSION};
use wire::ids::HostName;

use super::frames::{LinkError, read, write};
use crate::core::{Handle, HostInput, chain};

/// Hosts that may be connected at once, and handshakes under way: more than one control plane is meant for.
const CONNECTIONS_MAX: usize = 4096;
/// Blobs that a host may fetch at once, besides its stream of commands.
const BLOBS_MAX: u32 = 8;
/// From the handshake to Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Commands that wait for the stream. The core has fewer than this under way per host.
const QUEUE: usize = 256;
/// A connection over which nothing comes for this long is dead. Hosts that are lost from sight are noticed earlier, by heartbeats.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why hosts cannot be listened for.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The identity cannot be used.
    #[error("the control plane's identity")]
    Identity(#[from] PkiError),
    /// The cryptography of QUIC is not to be had.
    #[error("the TLS configuration does not suit QUIC")]
    Cipher(#[from] NoInitialCipherSuite),
    /// The address cannot be listened on.
    #[error("cannot listen for hosts on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Listens for hosts.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    address: SocketAddr,
}

impl Server {
    /// Listens on `address` and serves hosts, with blobs from `images`, until dropped. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`ServerError`] when the identity or the address cannot be used.
    pub fn start(
        address: SocketAddr,
        trust: &Trust,
        core: Handle,
        images: &Path,
    ) -> Result<Self, ServerError> {
        let tls = QuicServerConfig::try_from(trust.server_config(pki::ALPN_CONTROL)?)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        config.transport_config(Arc::new(transport()));
        let bind = |source| ServerError::Bind { address, source };
        let endpoint = Endpoint::server(config, address).map_err(bind)?;
        let address = endpoint.local_addr().map_err(bind)?;
        tokio::spawn(accept(endpoint.clone(), core, images.into()));
        Ok(Self { endpoint, address })
    }

    /// Where hosts can dial in.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(VarInt::from_u32(0), b"the control plane is stopping");
    }
}

fn transport() -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1 + BLOBS_MAX));
    transport.max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.datagram_receive_buffer_size(None);
    transport.max_idle_timeout(Some(
        VarInt::from_u32(u32::try_from(IDLE_TIMEOUT.as_millis()).unwrap_or(u32::MAX)).into(),
    ));
    transport.keep_alive_interval(Some(IDLE_TIMEOUT / 4));
    transport
}

async fn accept(endpoint: Endpoint, core: Handle, images: Arc<Path>) {
    static CONNECTION: AtomicU64 = AtomicU64::new(1);
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() >= CONNECTIONS_MAX {
            incoming.refuse();
            continue;
        }
        let (core, images) = (core.clone(), images.clone());
        let number = CONNECTION.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            if let Err(error) = serve(incoming, number, core, images).await {
                tracing::info!(%remote, connection = number, error = %chain(&error), "host link ended");
            }
        });
    }
}

/// One host's connection, from handshake to end.
async fn serve(
    incoming: quinn::Incoming,
    number: u64,
    core: Handle,
    images: Arc<Path>,
) -> Result<(), LinkError> {
    let connection = incoming.await?;
    let host = host_name(&connection)?;
    let hello = tokio::time::timeout(HELLO_TIMEOUT, hello(&connection, &host)).await;
    let (mut send, mut receive, release, boot_nonce) =
        hello.map_err(|_| LinkError::Hello(format!("{host} did not say Hello in time")))??;
    let (sender, mut commands) = mpsc::channel::<ToHost>(QUEUE);
    let streams = Some(connection.clone());
    let joined =
        HostInput::Joined { host: host.clone(), connection: number, release, boot_nonce, sender, streams };
    core.host(joined).await.map_err(|_| LinkError::Stopping)?;
    let writer = async {
        while let Some(message) = commands.recv().await {
            write(&mut send, &message).await?;
        }
        connection.close(VarInt::from_u32(0), b"replaced by a newer connection of this host");
        Ok::<(), LinkError>(())
    };
    let reader = async {
        while let Some((_, message)) = read::<FromHost>(&mut receive).await? {
            let said = HostInput::Said { host: host.clone(), connection: number, message };
            core.host(said).await.map_err(|_| LinkError::Stopping)?;
        }
        Ok(())
    };
    let ended = tokio::select! {
        ended = writer => ended,
        ended = reader => ended,
        () = super::streams::serve(connection.clone(), images) => Ok(()),
    };
    connection.close(VarInt::from_u32(0), b"");
    // When the core is gone nobody needs to hear of it.
    let _ = core.host(HostInput::Left { host, connection: number }).await;
    ended
}

/// The host's name, from the certificate that TLS has verified.
fn host_name(connection: &Connection) -> Result<HostName, LinkError> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(PkiError::NoCertificate)?;
    let peer = PeerIdentity::from_chain(&chain)?;
    if peer.kind() != Kind::Host {
        let text = format!("{peer} is not a host; only hosts may dial in here");
        connection.close(VarInt::from_u32(1), text.as_bytes());
        return Err(LinkError::Hello(text));
    }
    peer.name().parse().map_err(|error: wire::ids::ParseIdError| LinkError::Hello(error.to_string()))
}

type Greeted = (SendStream, RecvStream, String, u64);

async fn hello(connection: &Connection, host: &HostName) -> Result<Greeted, LinkError> {
    let (mut send, mut receive) = connection.accept_bi().await?;
    let problem = match read::<FromHost>(&mut receive).await? {
        Some((_, FromHost::Hello { version, host: name, boot_nonce, release })) => {
            if name != *host {
                format!(
                    "the certificate is {host}'s, but Hello says {name}: give the host the identity made for it (`mashines fleet host-cert {name}`)"
                )
            } else if version < VERSION {
                format!(
                    "protocol version {version} is too old, {VERSION} is needed: upgrade mashined on {host}"
                )
            } else if release.len() > 128 {
                "the release is longer than 128 bytes".to_owned()
            } else {
                return Ok((send, receive, release, boot_nonce));
            }
        }
        _ => "the first message must be Hello".to_owned(),
    };
    write(&mut send, &ToHost::Rejected { detail: problem.clone() }).await?;
    // The peer reads it and closes; it has until the Hello timeout.
    let _ = send.finish();
    let _ = send.stopped().await;
    Err(LinkError::Hello(format!("{host} rejected: {problem}")))
}
