//! What ends a wrong sleep of a shard: a thread beside the shards that wakes each of them at least every [`PULSE`].
//!
//! glommio 0.9 can fall asleep with tasks ready to run: when the system takes the thread off its core for
//! longer than the preempt timer, right between the arming of that timer and the first task, the executor
//! sees "time to yield", runs nothing, takes that for "nothing to run" and waits for I/O that may never come.
//! (Two executors that share a core under load hang for good within minutes.) Timers of the shard itself
//! cannot be relied on to end that: those that come due while the thread is off its core are taken together,
//! and the task that would arm the next ones is among those that are not run. Being woken from outside needs
//! no task of the shard to have run before.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest sleep of a shard that wrongly thinks it has nothing to do.
const PULSE: Duration = Duration::from_millis(20);
/// A shard that does not answer is woken less and less often, down to this. (Each wake that waits for a shard holds one of the 32,767 references that glommio has for a task.)
const PULSE_LONGEST: Duration = Duration::from_millis(640);

/// The thread that wakes one shard; it ends when this is dropped.
#[derive(Debug)]
pub struct Pulse {
    task: Sender<Waker>,
    beaten: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts the thread. It does nothing until [`Pulse::follow`] runs.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start() -> io::Result<Self> {
        let (task, tasks) = mpsc::channel();
        let beaten = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&beaten);
        let thread = std::thread::Builder::new().name("pulse".into()).spawn(move || beat(&tasks, &seen))?;
        Ok(Self { task, beaten, thread: Some(thread) })
    }

    /// The task that is woken: to be run by the shard, for ever.
    pub fn follow(&self) -> impl Future<Output = ()> + 'static {
        let (task, beaten) = (self.task.clone(), Arc::clone(&self.beaten));
        let mut known = false;
        poll_fn(move |context| {
            if !known {
                // Without the thread there is nobody to tell, and nothing else to do.
                known = task.send(context.waker().clone()).is_ok();
            }
            beaten.store(true, Ordering::Relaxed);
            Poll::Pending
        })
    }
}

impl Drop for Pulse {
    /// The task must be gone by now: it holds the channel open, too.
    fn drop(&mut self) {
        let (nobody, _) = mpsc::channel();
        drop(std::mem::replace(&mut self.task, nobody));
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked, and if it has, the shard has ended all the same.
            let _ = thread.join();
        }
    }
}

/// Wakes the task that comes through the channel until the channel is closed.
fn beat(tasks: &Receiver<Waker>, beaten: &AtomicBool) {
    let Ok(waker) = tasks.recv() else { return };
    let (mut distance, mut woken) = (PULSE, Instant::now());
    loop {
        match tasks.recv_timeout(PULSE) {
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if beaten.swap(false, Ordering::Relaxed) {
            distance = PULSE;
        } else if woken.elapsed() < distance {
            continue;
        } else {
            distance = (distance * 2).min(PULSE_LONGEST);
        }
        woken = Instant::now();
        waker.wake_by_ref();
    }
}
