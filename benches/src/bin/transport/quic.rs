//! Ours: one shard at each end, pages spread over several streams.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use bytes::BytesMut;
use dataplane::quic::{Connection, Endpoint, Pool, TransportOptions};
use dataplane::shards;
use pki::{Kind, PeerIdentity, Trust};

use crate::{BATCH, Cost, Meter, PAGE, REGION, WARM_UP, region};

type Memory = Rc<RefCell<Vec<u8>>>;

fn options(mtu: u16) -> TransportOptions {
    TransportOptions { mtu_max: mtu, ..TransportOptions::default() }
}

pub fn receive(
    trust: &Trust,
    bytes: usize,
    streams: usize,
    mtu: u16,
    announce: impl FnOnce(SocketAddr) + 'static,
) -> anyhow::Result<Cost> {
    let trust = trust.clone();
    shards::run_here(async move {
        let endpoint = Endpoint::bind("[::1]:0".parse()?, &trust, options(mtu))?;
        announce(endpoint.local_addr());
        let connection = endpoint.accept().await?;
        let memory: Memory = Rc::new(RefCell::new(region()));
        take(&connection, &memory, WARM_UP, streams).await?;
        let meter = Meter::start();
        take(&connection, &memory, bytes, streams).await?;
        let cost = meter.stop();
        connection.closed().await;
        endpoint.shutdown(0, "").await;
        Ok(cost)
    })?
}

/// Receives `bytes` over as many streams as are promised, then says so.
async fn take(connection: &Connection, memory: &Memory, bytes: usize, streams: usize) -> anyhow::Result<()> {
    let mut lanes = Vec::new();
    for lane in 0..streams {
        let mut stream = connection.accept_uni().await?;
        let memory = memory.clone();
        let base = lane * (REGION / streams);
        lanes.push(glommio::spawn_local(async move {
            let mut at = 0;
            while let Some(chunk) = stream.read_chunk(BATCH).await? {
                let mut rest = &chunk[..];
                let mut memory = memory.borrow_mut();
                while !rest.is_empty() {
                    // Page by page, as guest memory is filled.
                    let count = rest.len().min(PAGE - at % PAGE);
                    let to = (base + at) % REGION;
                    memory[to..to + count].copy_from_slice(&rest[..count]);
                    rest = &rest[count..];
                    at += count;
                }
            }
            Ok::<usize, dataplane::quic::QuicError>(at)
        }));
    }
    let mut total = 0;
    for lane in lanes {
        total += lane.await?;
    }
    anyhow::ensure!(total == bytes, "{total} of {bytes} bytes have arrived");
    let mut done = connection.open_uni().await?;
    done.write_all(&[1]).await?;
    done.finish()?;
    Ok(())
}

pub fn send(
    trust: &Trust,
    receiver: SocketAddr,
    bytes: usize,
    streams: usize,
    mtu: u16,
) -> anyhow::Result<(Cost, u16, u64)> {
    let trust = trust.clone();
    shards::run_here(async move {
        let endpoint = Endpoint::bind("[::1]:0".parse()?, &trust, options(mtu))?;
        let connection = endpoint.connect(receiver, &PeerIdentity::new(Kind::Host, "receiver")?).await?;
        let memory = Rc::new(region());
        give(&connection, &memory, WARM_UP, streams).await?;
        let lost = connection.stats().packets_lost;
        let meter = Meter::start();
        give(&connection, &memory, bytes, streams).await?;
        let cost = meter.stop();
        let stats = connection.stats();
        if std::env::var_os("TRANSPORT_STATS").is_some() {
            eprintln!("{stats:?}");
        }
        connection.close(0, "");
        endpoint.shutdown(0, "").await;
        Ok((cost, stats.mtu, stats.packets_lost - lost))
    })?
}

/// Sends `bytes` over several streams and waits until the receiver has them.
async fn give(
    connection: &Connection,
    memory: &Rc<Vec<u8>>,
    bytes: usize,
    streams: usize,
) -> anyhow::Result<()> {
    let mut lanes = Vec::new();
    for lane in 0..streams {
        let mut stream = connection.open_uni().await?;
        let memory = memory.clone();
        let base = lane * (REGION / streams);
        let share = bytes / streams;
        lanes.push(glommio::spawn_local(async move {
            let mut pool = Pool::new(BATCH, 32);
            for at in (0..share).step_by(BATCH) {
                let mut block = pool.take();
                copy_pages(&memory, base + at, BATCH.min(share - at), &mut block);
                stream.write_chunk(block.split().freeze()).await?;
                pool.give(block);
            }
            stream.finish()
        }));
    }
    for lane in lanes {
        lane.await?;
    }
    let mut done = connection.accept_uni().await?;
    done.read_exact(&mut [0]).await?;
    Ok(())
}

/// Guest memory changes under our hands, so its pages are copied once.
fn copy_pages(memory: &[u8], at: usize, bytes: usize, block: &mut BytesMut) {
    for page in (at..at + bytes).step_by(PAGE) {
        let from = page % REGION;
        block.extend_from_slice(&memory[from..from + PAGE.min(at + bytes - page)]);
    }
}
