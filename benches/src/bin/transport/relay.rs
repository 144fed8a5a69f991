//! A link with delay and loss, for kernels that cannot emulate one: a relay between the two processes.
//!
//! It copies every datagram through user space, so goodput through it says how the transport copes with
//! round trips and loss, not how fast it is. The first datagram of a new client begins a new life.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the link does to datagrams.
#[derive(Clone, Copy)]
pub struct Link {
    /// In each direction.
    pub delay: Duration,
    /// Of a thousand datagrams, in each direction.
    pub loss_per_mille: u64,
}

/// A running relay; ends when dropped.
pub struct Relay {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    pub fn start(server: SocketAddr, link: Link) -> anyhow::Result<Self> {
        let (front, back) = (socket()?, socket()?);
        back.connect(server)?;
        let address = front.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || pump(&front, &back, link, &stopped));
        Ok(Self { address, stop, thread: Some(thread) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn socket() -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind("[::1]:0")?;
    socket.set_nonblocking(true)?;
    // As large as we may; what overflows is loss like any other.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 16 << 20);
    Ok(socket)
}

fn pump(front: &UdpSocket, back: &UdpSocket, link: Link, stop: &AtomicBool) {
    let mut client: Option<SocketAddr> = None;
    let mut under_way: VecDeque<(Instant, bool, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; 65_536];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    while !stop.load(Ordering::SeqCst) {
        let mut idle = true;
        for _ in 0..64 {
            let (forward, bytes) = match (front.recv_from(&mut buffer), client) {
                (Ok((bytes, from)), _) => {
                    client = Some(from);
                    (true, bytes)
                }
                (Err(error), Some(_)) if error.kind() == ErrorKind::WouldBlock => {
                    match back.recv(&mut buffer) {
                        Ok(bytes) => (false, bytes),
                        Err(_) => break,
                    }
                }
                _ => break,
            };
            idle = false;
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if state % 1000 >= link.loss_per_mille {
                under_way.push_back((Instant::now() + link.delay, forward, buffer[..bytes].to_vec()));
            }
        }
        while under_way.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
            let Some((_, forward, datagram)) = under_way.pop_front() else { break };
            idle = false;
            // What cannot be sent is lost.
            let _ = match (forward, client) {
                (true, _) => back.send(&datagram),
                (false, Some(client)) => front.send_to(&datagram, client),
                (false, None) => Ok(0),
            };
        }
        if idle {
            // There is no event for "the oldest datagram is due"; this is far below any delay asked for.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
