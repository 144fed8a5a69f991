//! What the machine can do at best: one plain TCP connection between the two hosts, and memcpy.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use xtask::fleet::netns;

/// Memory that bytes come from and go to: more than the caches hold.
const REGION_BYTES: usize = 64 << 20;
/// One write.
const WRITE_BYTES: usize = 256 << 10;
/// Sent or copied in all.
const TOTAL_BYTES: usize = 1 << 30;
/// Longest silence before the connection is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Yardstick {
    pub tcp_gib_per_s: f64,
    pub tcp_sender_cpu_s_per_gib: f64,
    pub tcp_receiver_cpu_s_per_gib: f64,
    /// From one region to another, in order.
    pub memcpy_gib_per_s: f64,
}

/// Sends from one namespace to the other, which has `address`, and copies.
///
/// # Errors
/// When the hosts do not reach each other.
pub fn measure(from: &str, to: &str, address: Ipv4Addr) -> Result<Yardstick> {
    let source = region(1);
    let mut target = region(2);
    let memcpy_gib_per_s = copy(&source, &mut target);
    let listener = netns::within(to, || TcpListener::bind((address, 0)))?.context("listening on a host")?;
    let port = listener.local_addr().context("the address of a listener")?.port();
    let peer = SocketAddr::new(IpAddr::V4(address), port);
    let stream = netns::within(from, || TcpStream::connect_timeout(&peer, SILENCE_MAX))?
        .context("connecting to a host")?;
    let accepted = listener.accept().context("accepting a host")?.0;
    // Sockets belong to the namespace they were made in, wherever the threads are that use them.
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(accepted, &mut target));
        let sent = send(stream, &source);
        (sent, receiver.join().unwrap_or_else(|_| Err(anyhow!("the receiver panicked"))))
    });
    let ((seconds, tcp_sender_cpu_s_per_gib), tcp_receiver_cpu_s_per_gib) = (sent?, received?);
    Ok(Yardstick {
        tcp_gib_per_s: 1.0 / seconds,
        tcp_sender_cpu_s_per_gib,
        tcp_receiver_cpu_s_per_gib,
        memcpy_gib_per_s,
    })
}

/// Memory whose every page is touched.
fn region(seed: u8) -> Vec<u8> {
    (0..REGION_BYTES).map(|at| seed.wrapping_add((at >> 12).to_le_bytes()[0])).collect()
}

/// GiB/s.
fn copy(source: &[u8], target: &mut [u8]) -> f64 {
    let begun = Instant::now();
    for _ in 0..TOTAL_BYTES / REGION_BYTES {
        target.copy_from_slice(source);
        std::hint::black_box(&mut *target);
    }
    1.0 / begun.elapsed().as_secs_f64()
}

/// Returns seconds until all had arrived and CPU seconds of this thread.
fn send(mut stream: TcpStream, source: &[u8]) -> Result<(f64, f64)> {
    stream.set_read_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
    stream.set_write_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
    let (begun, cpu) = (Instant::now(), thread_cpu());
    for _ in 0..TOTAL_BYTES / REGION_BYTES {
        for piece in source.chunks(WRITE_BYTES) {
            stream.write_all(piece).context("sending")?;
        }
    }
    stream.read_exact(&mut [0]).context("waiting for the receiver")?;
    Ok((begun.elapsed().as_secs_f64(), thread_cpu() - cpu))
}

/// Returns CPU seconds of this thread.
fn receive(mut stream: TcpStream, target: &mut [u8]) -> Result<f64> {
    stream.set_read_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
    let cpu = thread_cpu();
    let mut left = TOTAL_BYTES;
    while left > 0 {
        let at = (TOTAL_BYTES - left) % REGION_BYTES;
        let end = (at + WRITE_BYTES.min(left)).min(REGION_BYTES);
        let count = stream.read(&mut target[at..end]).context("receiving")?;
        ensure!(count > 0, "the sender is gone");
        left -= count;
    }
    stream.write_all(&[1]).context("answering the sender")?;
    Ok(thread_cpu() - cpu)
}

fn thread_cpu() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default().as_secs_f64()
}
