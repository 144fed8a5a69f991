//! The client's view: one TCP connection that sends a numbered message every millisecond and awaits its echo.
//!
//! One message is under way at a time. So a lost packet shows as a retransmission and as a gap, and a pause of the machine as a
//! gap alone: the next message is never the cause of a spurious retransmission of the last one.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::tcp_info;

/// Time from one message to the next.
const PACE: Duration = Duration::from_millis(1);
/// Without an echo for this long the connection counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Size of a message, in bytes.
const MESSAGE_BYTES: usize = 64;
/// Arrivals that are kept: an hour of them.
const ARRIVALS_MAX: usize = 3_600_000;

/// A running echo client.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    arrivals: Arc<Mutex<Vec<Instant>>>,
    thread: JoinHandle<io::Result<u32>>,
}

/// What the client saw in all.
#[derive(Debug)]
pub struct Verdict {
    /// Why the connection broke, if it did.
    pub broken: Option<String>,
    /// Segments that had to be sent again.
    pub packets_lost: u32,
    /// Messages that came back.
    pub echoes: usize,
}

impl Echo {
    /// Starts it on a connection to an echo server.
    ///
    /// # Errors
    /// When the socket cannot be set up.
    pub fn start(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true).context("switching Nagle's algorithm off")?;
        stream.set_read_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
        stream.set_write_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
        let (stop, arrivals) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<Instant>>>::default());
        let thread = std::thread::Builder::new().name("echo".to_owned()).spawn({
            let (stop, arrivals) = (Arc::clone(&stop), Arc::clone(&arrivals));
            move || converse(stream, &stop, &arrivals)
        });
        Ok(Self { stop, arrivals, thread: thread.context("starting the echo client")? })
    }

    /// Largest time between two echoes, of those that touch `from..=to`, in microseconds; `None` if there was no echo.
    pub fn gap_us_max(&self, from: Instant, to: Instant) -> Option<u64> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        largest_gap_us(&arrivals, from, to)
    }

    /// Waits for the first echo after `time`, so that the gap that was open then is closed. Returns when it was, or
    /// `None` if the connection is broken.
    pub fn echo_after(&self, time: Instant) -> Option<Instant> {
        loop {
            let last = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).last().copied();
            if last.is_some_and(|last| last > time) {
                return last;
            }
            if self.thread.is_finished() {
                return None;
            }
            // The client itself sleeps between messages; to be told of each would disturb what it measures.
            std::thread::sleep(PACE);
        }
    }

    /// Ends it and says what it saw.
    pub fn finish(self) -> Verdict {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the echo client panicked")));
        let echoes = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).len();
        match ended {
            Ok(packets_lost) => Verdict { broken: None, packets_lost, echoes },
            Err(error) => Verdict { broken: Some(anyhow!(error).to_string()), packets_lost: 0, echoes },
        }
    }
}

/// Sends and receives until told to stop. Returns the number of retransmissions.
fn converse(mut stream: TcpStream, stop: &AtomicBool, arrivals: &Mutex<Vec<Instant>>) -> io::Result<u32> {
    let mut due = Instant::now();
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let sent = message(number);
        stream.write_all(&sent)?;
        let mut echoed = [0; MESSAGE_BYTES];
        stream.read_exact(&mut echoed)?;
        if echoed != sent {
            return Err(io::Error::other(format!("message {number} came back altered")));
        }
        let now = Instant::now();
        {
            let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            if arrivals.len() < ARRIVALS_MAX {
                arrivals.push(now);
            }
        }
        due = (due + PACE).max(now);
        std::thread::sleep(due.saturating_duration_since(now));
    }
    tcp_info::retransmits(&stream)
}

/// The number, then bytes that follow from it.
fn message(number: u64) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0; MESSAGE_BYTES];
    let words = (0_u64..).map(|word| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word));
    for (place, word) in bytes.chunks_exact_mut(8).zip(std::iter::once(number).chain(words)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Largest difference of neighbours, of those pairs that touch `from..=to`, in microseconds.
fn largest_gap_us(arrivals: &[Instant], from: Instant, to: Instant) -> Option<u64> {
    let gaps = arrivals.windows(2).filter_map(|pair| match pair {
        [earlier, later] if *later >= from && *earlier <= to => Some(*later - *earlier),
        _ => None,
    });
    gaps.max().map(|gap| u64::try_from(gap.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_largest_gap_is_looked_for_in_the_window_only() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let arrivals = [at(0), at(50), at(51), at(60), at(61), at(161)];
        assert_eq!(
            largest_gap_us(&arrivals, at(51), at(61)),
            Some(100_000),
            "a gap that begins in the window"
        );
        assert_eq!(largest_gap_us(&arrivals, at(52), at(60)), Some(9_000));
        assert_eq!(largest_gap_us(&arrivals, at(55), at(56)), Some(9_000), "a gap around the window");
        assert_eq!(largest_gap_us(&[], at(0), at(1)), None);
    }

    #[test]
    fn a_server_that_answers_wrongly_or_leaves_breaks_the_connection() {
        for (altered, what) in [(true, "altered"), (false, "")] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let echo = Echo::start(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
            let mut server = listener.accept().unwrap().0;
            let mut bytes = [0; MESSAGE_BYTES];
            for _ in 0..3 {
                server.read_exact(&mut bytes).unwrap();
                server.write_all(&bytes).unwrap();
            }
            server.read_exact(&mut bytes).unwrap();
            if altered {
                bytes[63] ^= 1;
                server.write_all(&bytes).unwrap();
            }
            drop(server);
            assert_eq!(echo.echo_after(Instant::now() + Duration::from_secs(1)), None);
            let verdict = echo.finish();
            assert_eq!(verdict.echoes, 3);
            let why = verdict.broken.unwrap();
            assert!(why.contains(what), "{why}");
        }
    }
}
