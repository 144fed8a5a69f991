//! A UDP relay that loses packets by a seed, and can be cut.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between one client and one server; ends when dropped.
pub(super) struct Relay {
    pub(super) addr: SocketAddr,
    pub(super) dropped: Arc<AtomicU64>,
    cut: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Loses `loss_per_mille` of a thousand datagrams in each direction.
    pub(super) fn start(server: SocketAddr, loss_per_mille: u64) -> Self {
        let front = UdpSocket::bind("[::1]:0").unwrap();
        let back = UdpSocket::bind("[::1]:0").unwrap();
        back.connect(server).unwrap();
        let addr = front.local_addr().unwrap();
        let (dropped, cut, stop) = (Arc::default(), Arc::default(), Arc::default());
        let link = Link {
            loss_per_mille,
            dropped: Arc::clone(&dropped),
            cut: Arc::clone(&cut),
            stop: Arc::clone(&stop),
        };
        // The client is known by its first datagram.
        let mut first = [0; 65_536];
        front.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        back.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let threads = vec![std::thread::spawn(move || {
            let Some((bytes, client)) = link.first(&front, &mut first) else { return };
            front.connect(client).unwrap();
            let _ = back.send(&first[..bytes]);
            let (front_too, back_too) = (front.try_clone().unwrap(), back.try_clone().unwrap());
            std::thread::scope(|scope| {
                scope.spawn(|| link.pump(&back_too, &front_too, 1));
                link.pump(&front, &back, 2);
            });
        })];
        Self { addr, dropped, cut, stop, threads }
    }

    /// From now on (or no longer) every datagram is lost.
    pub(super) fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

struct Link {
    loss_per_mille: u64,
    dropped: Arc<AtomicU64>,
    cut: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Link {
    fn first(&self, front: &UdpSocket, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        while !self.stop.load(Ordering::SeqCst) {
            if let Ok(found) = front.recv_from(buffer) {
                return Some(found);
            }
        }
        None
    }

    fn pump(&self, from: &UdpSocket, to: &UdpSocket, seed: u64) {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut buffer = [0; 65_536];
        while !self.stop.load(Ordering::SeqCst) {
            let bytes = match from.recv(&mut buffer) {
                Ok(bytes) => bytes,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) =>
                {
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if self.cut.load(Ordering::SeqCst) || state % 1000 < self.loss_per_mille {
                self.dropped.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            // Sending can fail when the other side is gone already.
            let _ = to.send(&buffer[..bytes]);
        }
    }
}
