//! How other threads talk to a shard.
//!
//! Handles of glommio objects must not leave their shard, and a task of a shard that is woken from another
//! thread goes through glommio's foreign wakers: an unbounded queue, and a reference count whose last
//! release by a foreign thread can meet the executor's own destruction of the task. We do not build on
//! that. A doorbell is made of two things that are sound by themselves:
//!
//! * the queue is a bounded tokio channel, of which the shard only ever uses `try_recv` (no waker is
//!   registered, so none is called from outside);
//! * the bell is a byte through a Unix socket pair, on which the shard waits through io_uring like on any
//!   other socket. A flag keeps it to one byte for as long as the shard has not looked.
//!
//! The other direction needs nothing special: a tokio `oneshot` that the shard completes wakes a tokio
//! task, which tokio allows from any thread. For an answer *into* a shard, make a doorbell of capacity 1.
//!
//! ```no_run
//! # async fn agent() -> std::io::Result<()> {
//! let (ringer, doorbell) = dataplane::doorbell::doorbell(16)?;
//! // On the shard: let mut commands = doorbell.attach(); while let Some((x, reply)) = commands.recv().await { … }
//! let (reply, answer) = tokio::sync::oneshot::channel::<u64>();
//! ringer.send((21_u64, reply)).await.map_err(std::io::Error::other)?;
//! # let _ = (answer.await, doorbell); Ok(()) }
//! ```
//!
//! When the shard ends, senders get [`Closed`]; when the last sender is gone, the shard gets `None` after
//! what was queued.

use std::io::{self, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::io::AsyncReadExt;
use tokio::sync::mpsc;

/// Makes a doorbell whose queue holds at most `capacity` messages.
///
/// # Errors
/// No descriptor is left for the socket pair.
///
/// # Panics
/// When `capacity` is 0.
pub fn doorbell<T: Send + 'static>(capacity: usize) -> io::Result<(Ringer<T>, Doorbell<T>)> {
    let (inside, outside) = UnixStream::pair()?;
    outside.set_nonblocking(true)?;
    let (sender, receiver) = mpsc::channel(capacity);
    let rung = Arc::new(AtomicBool::new(false));
    let line = Arc::new(Line { sender, bell: outside, rung: rung.clone() });
    Ok((Ringer { line }, Doorbell { receiver, rung, bell: inside }))
}

/// The shard no longer listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the shard is gone")]
pub struct Closed;

/// Why a message could not be left at once; the message comes back.
#[derive(Debug, thiserror::Error)]
pub enum TrySendError<T> {
    /// The queue is full.
    #[error("the shard's queue is full")]
    Full(T),
    /// The shard no longer listens.
    #[error("the shard is gone")]
    Closed(T),
}

/// The side of the other threads. Clones ring the same shard.
pub struct Ringer<T> {
    line: Arc<Line<T>>,
}

/// Field order matters: the channel closes before the bell's socket does, so that a shard which is woken
/// by the end of the socket finds the channel closed.
struct Line<T> {
    sender: mpsc::Sender<T>,
    bell: UnixStream,
    rung: Arc<AtomicBool>,
}

impl<T> Clone for Ringer<T> {
    fn clone(&self) -> Self {
        Self { line: self.line.clone() }
    }
}

impl<T> std::fmt::Debug for Ringer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ringer").finish_non_exhaustive()
    }
}

impl<T> Ringer<T> {
    /// Leaves a message for the shard; waits while the queue is full. For async code on other threads.
    ///
    /// # Errors
    /// [`Closed`]; the message is dropped.
    pub async fn send(&self, message: T) -> Result<(), Closed> {
        self.line.sender.send(message).await.map_err(|_| Closed)?;
        self.line.ring();
        Ok(())
    }

    /// Leaves a message for the shard if there is room; never waits, so it may be called from anywhere.
    ///
    /// # Errors
    /// [`TrySendError`] with the message.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        self.line.sender.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(message) => TrySendError::Full(message),
            mpsc::error::TrySendError::Closed(message) => TrySendError::Closed(message),
        })?;
        self.line.ring();
        Ok(())
    }

    /// Leaves a message for the shard; blocks the thread while the queue is full. Not for async code.
    ///
    /// # Errors
    /// [`Closed`]; the message is dropped.
    pub fn blocking_send(&self, message: T) -> Result<(), Closed> {
        self.line.sender.blocking_send(message).map_err(|_| Closed)?;
        self.line.ring();
        Ok(())
    }
}

impl<T> Line<T> {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // A full socket has unread bytes in it, which wake the shard just as well; a closed one
            // means that nobody is there to be woken.
            let _ = (&self.bell).write(&[1]);
        }
    }
}

/// The shard's side, on its way to the shard.
pub struct Doorbell<T> {
    receiver: mpsc::Receiver<T>,
    rung: Arc<AtomicBool>,
    bell: UnixStream,
}

impl<T> std::fmt::Debug for Doorbell<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doorbell").finish_non_exhaustive()
    }
}

impl<T> Doorbell<T> {
    /// Begins to listen, on the executor of the calling thread.
    ///
    /// # Panics
    /// When called outside of a glommio executor.
    pub fn attach(self) -> Mailbox<T> {
        let descriptor = self.bell.into_raw_fd();
        // SAFETY: `descriptor` was just given up by its owner, so glommio becomes its only owner.
        let bell = unsafe { glommio::net::UnixStream::from_raw_fd(descriptor) };
        Mailbox { receiver: self.receiver, rung: self.rung, bell }
    }
}

/// The shard's side at work; it cannot leave the shard.
pub struct Mailbox<T> {
    receiver: mpsc::Receiver<T>,
    rung: Arc<AtomicBool>,
    bell: glommio::net::UnixStream,
}

impl<T> std::fmt::Debug for Mailbox<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<T> Mailbox<T> {
    /// The next message, in the order of sending; `None` when all senders are gone. Dropping the future
    /// loses nothing.
    pub async fn recv(&mut self) -> Option<T> {
        loop {
            // In this order: a message that is queued after the look finds the flag down and rings.
            self.rung.store(false, Ordering::SeqCst);
            match self.receiver.try_recv() {
                Ok(message) => return Some(message),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => {}
            }
            match self.bell.read(&mut [0_u8; 16]).await {
                Ok(count) if count > 0 => {}
                // The end of the socket: the channel was closed before it, and has its last word.
                _ => return self.receiver.try_recv().ok(),
            }
        }
    }

    /// A message that is there already.
    pub fn try_recv(&mut self) -> Option<T> {
        self.receiver.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::sync::oneshot;

    type Question = (u64, oneshot::Sender<u64>);

    /// A shard that doubles what it is asked, until the last ringer is gone; returns how many it answered.
    fn doubling_shard(doorbell: Doorbell<Question>) -> std::thread::JoinHandle<u64> {
        std::thread::spawn(move || {
            crate::shards::run_here(async move {
                let mut mailbox = doorbell.attach();
                let mut answered = 0;
                while let Some((x, reply)) = mailbox.recv().await {
                    answered += 1;
                    let _ = reply.send(x * 2);
                }
                answered
            })
            .unwrap()
        })
    }

    #[test]
    fn every_question_is_answered_whether_the_shard_sleeps_or_not() {
        const ASKERS: u64 = 4;
        const EACH: u64 = 2000;
        let (ringer, doorbell) = doorbell::<Question>(8).unwrap();
        let shard = doubling_shard(doorbell);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let askers: Vec<_> = (0..ASKERS)
                .map(|asker| {
                    let ringer = ringer.clone();
                    tokio::spawn(async move {
                        for x in 0..EACH {
                            let (reply, answer) = oneshot::channel();
                            ringer.send((x, reply)).await.unwrap();
                            let answer = tokio::time::timeout(Duration::from_secs(5), answer);
                            assert_eq!(answer.await.expect("a wake-up was lost").unwrap(), x * 2);
                            if x % 500 == asker {
                                // Long enough for the shard to fall asleep.
                                tokio::time::sleep(Duration::from_millis(3)).await;
                            }
                        }
                    })
                })
                .collect();
            for asker in askers {
                asker.await.unwrap();
            }
        });
        drop(ringer);
        assert_eq!(shard.join().unwrap(), ASKERS * EACH);
    }

    #[test]
    fn a_full_queue_refuses_and_a_gone_shard_says_so() {
        let (ringer, doorbell) = doorbell::<u8>(2).unwrap();
        ringer.try_send(1).unwrap();
        ringer.try_send(2).unwrap();
        assert!(matches!(ringer.try_send(3), Err(TrySendError::Full(3))));
        drop(doorbell);
        assert!(matches!(ringer.try_send(4), Err(TrySendError::Closed(4))));
        assert_eq!(ringer.blocking_send(5), Err(Closed));
    }
}
