//! Tests of the transport: two shards in one process, over loopback or over a relay that loses packets.

mod failures;
mod peers;
mod relay;
mod streams;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use pki::{FleetCa, Kind, PeerIdentity, Trust};

use super::*;

/// No test takes nearly as long; one that hangs fails with this instead.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `future` on a shard of its own, within the tests' patience.
fn on_shard<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    crate::shards::run_here(async {
        let mut slot = None;
        glommio::timer::timeout(PATIENCE, async {
            slot = Some(future.await);
            Ok::<(), glommio::GlommioError<()>>(())
        })
        .await
        .expect("the test hangs");
        slot.unwrap()
    })
    .unwrap()
}

fn member(ca: &FleetCa, name: &str) -> Trust {
    Trust::new(ca.cert_pem(), &ca.issue(name, Kind::Host).unwrap()).unwrap()
}

fn host(name: &str) -> PeerIdentity {
    PeerIdentity::new(Kind::Host, name).unwrap()
}

fn any_port() -> SocketAddr {
    "[::1]:0".parse().unwrap()
}

/// A shard called host-b on a thread of its own, and where it can be reached.
struct Server<T> {
    addr: SocketAddr,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Server<T> {
    fn start<M, F>(trust: Trust, options: TransportOptions, bind: SocketAddr, main: M) -> Self
    where
        M: FnOnce(Endpoint) -> F + Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            on_shard(async move {
                let endpoint = Endpoint::bind(bind, &trust, options).unwrap();
                sender.send(endpoint.local_addr()).unwrap();
                main(endpoint).await
            })
        });
        Self { addr: receiver.recv().unwrap(), thread }
    }

    fn join(self) -> T {
        self.thread.join().unwrap()
    }
}

/// Runs `server` with a connection from host-a, and `client` with the same connection from the other side;
/// the server's endpoint is shut down when both are done.
fn connected<S, SF, C, CF, T, U>(options: TransportOptions, server: S, client: C) -> (T, U)
where
    S: FnOnce(Connection) -> SF + Send + 'static,
    SF: Future<Output = T> + 'static,
    T: Send + 'static,
    C: FnOnce(Connection) -> CF + 'static,
    CF: Future<Output = U> + 'static,
    U: 'static,
{
    let ca = FleetCa::create().unwrap();
    let running = Server::start(member(&ca, "host-b"), options.clone(), any_port(), |endpoint| async move {
        let connection = endpoint.accept().await.unwrap();
        assert_eq!(connection.peer(), &host("host-a"));
        let value = server(connection.clone()).await;
        // The client says when it is done; what is in flight must not be cut off.
        connection.closed().await;
        endpoint.shutdown(0, "").await;
        value
    });
    let (trust, addr) = (member(&ca, "host-a"), running.addr);
    let value = on_shard(async move {
        let endpoint = Endpoint::bind(any_port(), &trust, options).unwrap();
        let connection = endpoint.connect(addr, &host("host-b")).await.unwrap();
        assert_eq!(connection.peer_host(), "host-b");
        let value = client(connection.clone()).await;
        connection.close(0, "done");
        endpoint.shutdown(0, "").await;
        value
    });
    (running.join(), value)
}

/// Bytes that differ at every offset and for every seed.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}

/// Reads a stream to its end.
async fn read_all(stream: &mut RecvStream) -> Result<Vec<u8>, QuicError> {
    let mut data = Vec::new();
    while let Some(chunk) = stream.read_chunk(usize::MAX).await? {
        data.extend_from_slice(&chunk);
    }
    Ok(data)
}
