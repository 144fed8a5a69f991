//! The link to the control plane: QUIC by quinn on tokio, one stream of frames in each direction.
//!
//! The link comes and goes; machines and migrations do not depend on it. Commands are idempotent and the control plane repeats
//! those it has no answer for, so nothing is kept here for a link that broke: what was to be said then is either
//! asked for again or part of the next heartbeat.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, IdleTimeout, RecvStream, SendStream, TransportConfig};
use rkyv::util::AlignedVec;
use tokio::sync::mpsc;
use wire::fleet::{FromHost, ToHost, VERSION};
use wire::frame::{self, HEADER_BYTES, Header, Message};

/// Name of the control plane's identity.
pub const CONTROL_NAME: &str = "control";
/// A control plane that is silent for this long is gone.
const IDLE_LIMIT: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Pause between two tries to reach it: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Reports that may wait for the link: a second's worth of progress of a hundred migrations.
const REPORTS_MAX: usize = 1024;
/// A control plane that does not answer a dial within this is tried again: it may just have been restarted.
const DIAL_LIMIT: Duration = Duration::from_secs(1);
/// Connections to guests that the control plane may have open at a time.
const STREAMS_MAX: u32 = 1024;
/// How long the control plane has to answer Hello.
const WELCOME_LIMIT: Duration = Duration::from_secs(5);

/// What the link tells the agent.
#[derive(Debug)]
pub enum LinkEvent {
    /// Joined: send the first heartbeat and whatever must be said again.
    Up {
        /// Where to send. Bounded; a full queue means that the control plane does not read, and waiting is right.
        to_control: mpsc::Sender<FromHost>,
        /// Interval of heartbeats.
        heartbeat: Duration,
        /// For streams of our own.
        connection: Connection,
    },
    /// The control plane has opened a stream beside the commands.
    Stream {
        /// To it.
        send: SendStream,
        /// From it.
        receive: RecvStream,
    },
    /// A command.
    Command {
        /// Its number.
        op: u64,
        /// What to do.
        command: Box<wire::fleet::Command>,
    },
    /// Broken; a new try is under way.
    Down,
}

/// Why the link could not be made or broke.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// TLS could not be configured.
    #[error("cannot use this host's certificate")]
    Tls(#[from] pki::PkiError),
    /// TLS refuses its own configuration.
    #[error("the TLS configuration does not fit QUIC")]
    Quic(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The socket.
    #[error("cannot open a UDP socket")]
    Socket(#[source] io::Error),
    /// Dialling.
    #[error("cannot dial the control plane")]
    Connect(#[from] quinn::ConnectError),
    /// Nobody answers there.
    #[error("the control plane does not answer; is it running, and is --control its --fleet-listen address?")]
    NoAnswer,
    /// The connection ended.
    #[error("the connection to the control plane ended")]
    Lost(#[from] quinn::ConnectionError),
    /// The stream ended or carried something else than frames.
    #[error("the stream from the control plane broke")]
    Stream(#[source] io::Error),
    /// It does not want us.
    #[error("the control plane rejected this host: {0}")]
    Rejected(String),
    /// It answered with something else.
    #[error("the control plane did not answer Hello with Welcome")]
    NoWelcome,
}

/// Keeps the link up until the agent's end of `events` is gone.
pub async fn keep(
    control: SocketAddr,
    trust: Arc<pki::Trust>,
    hello: FromHost,
    events: mpsc::Sender<LinkEvent>,
) {
    let mut pause = RETRY.0;
    let mut complained = String::new();
    while !events.is_closed() {
        let error = match run(control, &trust, &hello, &events, &mut pause).await {
            Ok(()) => return,
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        if events.send(LinkEvent::Down).await.is_err() {
            return;
        }
        if error != complained {
            tracing::warn!(%control, error, "no link to the control plane; trying on");
            complained = error;
        }
        // The pause before a new try is the back-off itself; there is no event to wait for instead.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn run(
    control: SocketAddr,
    trust: &pki::Trust,
    hello: &FromHost,
    events: &mpsc::Sender<LinkEvent>,
    pause: &mut Duration,
) -> Result<(), LinkError> {
    let endpoint = endpoint(control, trust)?;
    let name = pki::PeerIdentity::new(pki::Kind::Control, CONTROL_NAME)?.dns_name();
    let dialled = tokio::time::timeout(DIAL_LIMIT, endpoint.connect(control, &name)?).await;
    let connection = dialled.map_err(|_| LinkError::NoAnswer)??;
    let (mut send, mut receive) = connection.open_bi().await?;
    write(&mut send, hello).await.map_err(LinkError::Stream)?;
    let answer =
        tokio::time::timeout(WELCOME_LIMIT, read(&mut receive)).await.map_err(|_| LinkError::NoWelcome)?;
    let heartbeat = match answer.map_err(LinkError::Stream)? {
        ToHost::Welcome { heartbeat_ms, .. } => Duration::from_millis(u64::from(heartbeat_ms.max(10))),
        ToHost::Rejected { detail } => return Err(LinkError::Rejected(detail)),
        ToHost::Command { .. } => return Err(LinkError::NoWelcome),
    };
    tracing::info!(%control, "joined the fleet");
    *pause = RETRY.0;
    let (to_control, mut outgoing) = mpsc::channel(REPORTS_MAX);
    let up = LinkEvent::Up { to_control, heartbeat, connection: connection.clone() };
    if events.send(up).await.is_err() {
        return Ok(());
    }
    let writer = async {
        while let Some(message) = outgoing.recv().await {
            write(&mut send, &message).await?;
        }
        Ok::<(), io::Error>(())
    };
    let reader = async {
        loop {
            if let ToHost::Command { op, command } = read::<ToHost>(&mut receive).await?
                && events.send(LinkEvent::Command { op, command: Box::new(command) }).await.is_err()
            {
                return Ok::<(), io::Error>(());
            }
        }
    };
    let streams = async {
        loop {
            let (send, receive) = connection.accept_bi().await?;
            if events.send(LinkEvent::Stream { send, receive }).await.is_err() {
                return Ok::<(), quinn::ConnectionError>(());
            }
        }
    };
    tokio::select! {
        ended = writer => ended.map_err(LinkError::Stream),
        ended = reader => ended.map_err(LinkError::Stream),
        ended = streams => Ok(ended?),
    }
}

fn endpoint(control: SocketAddr, trust: &pki::Trust) -> Result<Endpoint, LinkError> {
    let tls = QuicClientConfig::try_from(trust.client_config(pki::ALPN_CONTROL)?)?;
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_idle_timeout(IdleTimeout::try_from(IDLE_LIMIT).ok());
    transport.max_concurrent_bidi_streams(STREAMS_MAX.into());
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    let any = if control.is_ipv4() { SocketAddr::from(([0; 4], 0)) } else { SocketAddr::from(([0; 16], 0)) };
    let mut endpoint = Endpoint::client(any).map_err(LinkError::Socket)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Writes one message.
///
/// # Errors
/// The stream's.
pub(super) async fn write<M: Message>(send: &mut SendStream, message: &M) -> io::Result<()> {
    let bytes = frame::encode(VERSION, message, 0).map_err(io::Error::other)?;
    Ok(send.write_all(&bytes).await?)
}

/// Reads one message.
///
/// # Errors
/// The stream's; `InvalidData` when it is no message of this kind.
pub(super) async fn read<M: Message>(receive: &mut RecvStream) -> io::Result<M> {
    let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut fixed = [0; HEADER_BYTES];
    receive.read_exact(&mut fixed).await.map_err(io::Error::other)?;
    let header = Header::parse(&fixed).map_err(invalid)?;
    let mut body = AlignedVec::<16>::with_capacity(header.body_bytes as usize);
    body.resize(header.body_bytes as usize, 0);
    receive.read_exact(&mut body).await.map_err(io::Error::other)?;
    header.decode(&body).map_err(invalid)
}
