//! The yardsticks: one TCP connection, plain or with TLS, with blocking calls.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use pki::{Kind, PeerIdentity, Trust};
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use crate::{BATCH, Cost, Meter, REGION, WARM_UP, region};

trait Duplex: Read + Write {}
impl<T: Read + Write> Duplex for T {}

pub fn receive(
    trust: Option<&Trust>,
    bytes: usize,
    announce: impl FnOnce(SocketAddr),
) -> anyhow::Result<Cost> {
    let listener = TcpListener::bind("[::1]:0")?;
    announce(listener.local_addr()?);
    let (socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    let mut stream: Box<dyn Duplex> = match trust {
        None => Box::new(socket),
        Some(trust) => {
            let config = Arc::new(trust.server_config(pki::ALPN_DATA)?);
            Box::new(StreamOwned::new(ServerConnection::new(config)?, socket))
        }
    };
    let mut memory = region();
    take(&mut *stream, &mut memory, WARM_UP)?;
    let meter = Meter::start();
    take(&mut *stream, &mut memory, bytes)?;
    Ok(meter.stop())
}

fn take(stream: &mut dyn Duplex, memory: &mut [u8], bytes: usize) -> anyhow::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let at = (bytes - left) % REGION;
        let count = stream.read(&mut memory[at..(at + BATCH.min(left)).min(REGION)])?;
        anyhow::ensure!(count > 0, "the sender is gone");
        left -= count;
    }
    stream.write_all(&[1])?;
    stream.flush()?;
    Ok(())
}

pub fn send(trust: Option<&Trust>, receiver: SocketAddr, bytes: usize) -> anyhow::Result<Cost> {
    let socket = TcpStream::connect(receiver)?;
    socket.set_nodelay(true)?;
    let mut stream: Box<dyn Duplex> = match trust {
        None => Box::new(socket),
        Some(trust) => {
            let config = Arc::new(trust.client_config(pki::ALPN_DATA)?);
            let name = PeerIdentity::new(Kind::Host, "receiver")?.dns_name().try_into()?;
            Box::new(StreamOwned::new(ClientConnection::new(config, name)?, socket))
        }
    };
    let memory = region();
    give(&mut *stream, &memory, WARM_UP)?;
    let meter = Meter::start();
    give(&mut *stream, &memory, bytes)?;
    Ok(meter.stop())
}

fn give(stream: &mut dyn Duplex, memory: &[u8], bytes: usize) -> anyhow::Result<()> {
    for at in (0..bytes).step_by(BATCH) {
        let from = at % REGION;
        stream.write_all(&memory[from..from + BATCH.min(bytes - at)])?;
    }
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    Ok(())
}
