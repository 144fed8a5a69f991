//! A fake host on a real QUIC connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pki::{FleetCa, Kind, PeerIdentity, Trust};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Endpoint, RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use wire::fleet::{FromHost, ToHost, VERSION};
use wire::ids::HostName;

use super::World;
use crate::hosts::frames::{read, write};

/// How often the host looks for something to do or to say.
const TURN: Duration = Duration::from_millis(10);

/// A control plane that is being restarted does not answer; the next attempt may find it.
const DIAL_TIMEOUT: Duration = Duration::from_millis(500);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One host of a [`World`], dialling in again whenever its link breaks. Ends when dropped.
#[derive(Debug)]
pub struct FakeHost {
    connected: watch::Sender<bool>,
    delay: watch::Sender<Duration>,
    rejected: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

impl FakeHost {
    /// Starts a host of `world` that dials `control`. Its certificate is made by `ca` for the name `certified`, which is `name`
    /// unless the test wants it to lie.
    ///
    /// # Errors
    /// When no identity or socket can be made.
    pub fn start(
        world: &World,
        name: &HostName,
        certified: &str,
        ca: &FleetCa,
        control: SocketAddr,
    ) -> Result<Self, Failure> {
        let trust = Trust::new(ca.cert_pem(), &ca.issue(certified, Kind::Host)?)?;
        let tls = QuicClientConfig::try_from(trust.client_config(pki::ALPN_CONTROL)?)?;
        let mut endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
        let (connected, mut wanted) = watch::channel(true);
        let (delay, delayed) = watch::channel(Duration::ZERO);
        let (reject, rejected) = watch::channel(None);
        let (world, name) = (world.clone(), name.clone());
        let task = tokio::spawn(async move {
            loop {
                if wanted.wait_for(|wanted| *wanted).await.is_err() {
                    return;
                }
                let mut unwanted = wanted.clone();
                tokio::select! {
                    ended = serve(&endpoint, control, &world, &name, delayed.clone()) => {
                        if let Err(Some(detail)) = ended {
                            let _ = reject.send(Some(detail));
                        }
                    }
                    _ = unwanted.wait_for(|wanted| !*wanted) => {}
                }
                // Dropping its streams has closed the connection.
                tokio::time::sleep(TURN).await;
            }
        });
        Ok(Self { connected, delay, rejected, task })
    }

    /// Cuts the link, or lets the host dial in again.
    pub fn connect(&self, on: bool) {
        self.connected.send_replace(on);
    }

    /// Makes the host think before each answer.
    pub fn delay(&self, delay: Duration) {
        self.delay.send_replace(delay);
    }

    /// Why the control plane turned it away, once it did.
    pub fn rejected(&self) -> Option<String> {
        self.rejected.borrow().clone()
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, to its end. The error is what the control plane said when it turned the host away.
async fn serve(
    endpoint: &Endpoint,
    control: SocketAddr,
    world: &World,
    name: &HostName,
    delay: watch::Receiver<Duration>,
) -> Result<(), Option<String>> {
    let dialled = tokio::time::timeout(DIAL_TIMEOUT, dial(endpoint, control, name)).await;
    let (mut send, mut receive) = dialled.map_err(|_| None)?.map_err(|_| None)?;
    let heartbeat = match read::<ToHost>(&mut receive).await {
        Ok(Some((_, ToHost::Welcome { heartbeat_ms, .. }))) => Duration::from_millis(heartbeat_ms.into()),
        Ok(Some((_, ToHost::Rejected { detail }))) => return Err(Some(detail)),
        _ => return Err(None),
    };
    let (commands, mut queue) = mpsc::channel(256);
    let reader = async {
        while let Ok(Some((_, message))) = read::<ToHost>(&mut receive).await {
            if commands.send(message).await.is_err() {
                return;
            }
        }
    };
    let worker = async {
        let mut beat = tokio::time::interval(heartbeat);
        let mut turn = tokio::time::interval(TURN);
        loop {
            let say = tokio::select! {
                _ = beat.tick() => vec![world.heartbeat(name)],
                _ = turn.tick() => {
                    world.step();
                    world.take_notices(name)
                }
                Some(message) = queue.recv() => {
                    let ToHost::Command { op, command } = message else { continue };
                    let pause = *delay.borrow();
                    tokio::time::sleep(pause).await;
                    vec![FromHost::Answer { op, answer: world.command(name, command) }, world.heartbeat(name)]
                }
            };
            for message in say {
                if write(&mut send, &message).await.is_err() {
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = reader => {}
        () = worker => {}
    }
    Ok(())
}

async fn dial(
    endpoint: &Endpoint,
    control: SocketAddr,
    name: &HostName,
) -> Result<(SendStream, RecvStream), Failure> {
    let server = PeerIdentity::new(Kind::Control, "control")?.dns_name();
    let connection = endpoint.connect(control, &server)?.await?;
    let (mut send, receive) = connection.open_bi().await?;
    let hello =
        FromHost::Hello { version: VERSION, host: name.clone(), boot_nonce: 1, release: "fake".to_owned() };
    write(&mut send, &hello).await?;
    Ok((send, receive))
}
