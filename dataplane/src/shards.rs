//! Starting a host's shards: one glommio executor per core, each pinned to its own.
//!
//! A shard that cannot be started is an error before anything else happens, with what to do about it:
//! io_uring may be switched off by the system's administrator, and small memlock limits refuse its memory.
//!
//! glommio 0.9 can fall asleep with tasks ready to run. Two things keep that harmless: the executor begins
//! with a preempt timer that never fires and gets the short one only with the queue that everything runs in,
//! and the [pulse](crate::pulse) ends such a sleep. Start executors only through this module.

use std::future::Future;
use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use glommio::{GlommioError, Latency, LocalExecutor, LocalExecutorBuilder, Placement, Shares};
use rustix::process::{Resource, getrlimit};
use rustix::thread::sched_getaffinity;

use crate::pulse::Pulse;

/// A task that is not done after this long yields to the others. glommio's own 100 ms would let one busy
/// task starve the transport for seconds.
const PREEMPT_TIMER: Duration = Duration::from_millis(1);
/// In force before the first task runs; never fires.
const PREEMPT_TIMER_AT_START: Duration = Duration::from_secs(3600);
/// Each executor registers its memory with three rings, and each of them counts.
const RINGS: u64 = 3;
/// Below this glommio has no use for it.
const IO_MEMORY_MIN: u64 = 64 << 10;
/// Nothing here does direct storage I/O through glommio's buffers, so more would be waste.
const IO_MEMORY_MAX: u64 = 1 << 20;

/// Why the shards could not be started, or how one of them ended.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The system gives no io_uring.
    #[error(
        "the kernel refuses io_uring (shard {shard}); check: sysctl kernel.io_uring_disabled (must be 0), a seccomp \
         profile of the container, and that the kernel is 5.11 or later"
    )]
    IoUring {
        /// Which shard, from 0.
        shard: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Too little memory may be locked.
    #[error(
        "the memlock limit of {limit_bytes} bytes is too low for shard {shard}; raise it with: ulimit -l 8192, or \
         LimitMEMLOCK=8M in the service's unit"
    )]
    Memlock {
        /// Which shard, from 0.
        shard: usize,
        /// The limit that is in force.
        limit_bytes: u64,
        /// What was refused.
        #[source]
        source: io::Error,
    },
    /// The executor could not be made for another reason.
    #[error("shard {shard} could not be started")]
    Start {
        /// Which shard, from 0.
        shard: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The shard's thread panicked.
    #[error("shard {shard} has panicked: {message}")]
    Panicked {
        /// Which shard, from 0.
        shard: usize,
        /// The panic's message.
        message: String,
    },
}

/// Which shard a task runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSeat {
    /// From 0 to `count - 1`.
    pub index: usize,
    /// How many shards there are.
    pub count: usize,
    /// The core it is pinned to.
    pub core: usize,
}

/// The cores this process may run on, in order.
pub fn available_cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return vec![0] };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

/// Running shards.
#[derive(Debug)]
pub struct Shards<T> {
    threads: Vec<JoinHandle<Option<T>>>,
}

impl<T: Send + 'static> Shards<T> {
    /// Starts one shard per core, at most `limit` of them if given, and runs `main` on each.
    ///
    /// A shard ends when its `main` does; how it learns that it should is `main`'s business (a
    /// [`doorbell`](crate::doorbell) that closes, most often).
    ///
    /// # Errors
    /// One shard could not be started: those that were have ended without running `main`.
    pub fn start<F, M>(limit: Option<usize>, main: M) -> Result<Self, ShardError>
    where
        M: Fn(ShardSeat) -> F + Clone + Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let mut cores = available_cores();
        cores.truncate(limit.unwrap_or(usize::MAX).max(1));
        let count = cores.len();
        let mut starting = Vec::with_capacity(count);
        for (index, core) in cores.into_iter().enumerate() {
            let seat = ShardSeat { index, count, core };
            starting.push(begin(seat, main.clone())?);
        }
        // First all reports, then all permissions: a shard that is refused must find the others idle.
        for start in &starting {
            start.wait_ready()?;
        }
        let threads = starting.into_iter().map(Starting::go).collect();
        Ok(Self { threads })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Waits for all shards to end, in the order of their index.
    pub fn join(self) -> Vec<Result<T, ShardError>> {
        self.threads
            .into_iter()
            .enumerate()
            .map(|(shard, thread)| match thread.join() {
                Ok(Some(value)) => Ok(value),
                Ok(None) => {
                    Err(ShardError::Start { shard, source: io::Error::other("it was never started") })
                }
                Err(panic) => Err(ShardError::Panicked { shard, message: panic_message(&*panic) }),
            })
            .collect()
    }
}

/// A thread whose executor is being made; it runs nothing before `go`.
struct Starting<T> {
    shard: usize,
    ready: mpsc::Receiver<Result<(), ShardError>>,
    permission: mpsc::Sender<()>,
    thread: JoinHandle<Option<T>>,
}

impl<T> Starting<T> {
    fn wait_ready(&self) -> Result<(), ShardError> {
        self.ready.recv().unwrap_or_else(|_| {
            let source = io::Error::other("its thread ended early");
            Err(ShardError::Start { shard: self.shard, source })
        })
    }
}

impl<T> Starting<T> {
    fn go(self) -> JoinHandle<Option<T>> {
        // A thread that is gone says why when it is joined.
        let _ = self.permission.send(());
        self.thread
    }
}

/// Starts the thread of a shard, which makes its executor, reports, and waits for permission.
fn begin<F, M, T>(seat: ShardSeat, main: M) -> Result<Starting<T>, ShardError>
where
    M: FnOnce(ShardSeat) -> F + Send + 'static,
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    let (report, ready) = mpsc::channel();
    let (permission, permitted) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(format!("shard-{}", seat.index))
        .spawn(move || match make(seat.index, seat.count, Placement::Fixed(seat.core)) {
            Ok(executor) => {
                let _ = report.send(Ok(()));
                permitted.recv().ok()?;
                Some(run(executor, main(seat)))
            }
            Err(error) => {
                let _ = report.send(Err(error));
                None
            }
        })
        .map_err(|source| ShardError::Start { shard: seat.index, source })?;
    Ok(Starting { shard: seat.index, ready, permission, thread })
}

/// Runs `main` on a shard of its own on the calling thread, not pinned to a core. For tools and tests;
/// hosts use [`Shards::start`].
///
/// # Errors
/// The executor could not be made.
///
/// # Panics
/// When the thread runs an executor already.
pub fn run_here<T: 'static>(main: impl Future<Output = T> + 'static) -> Result<T, ShardError> {
    Ok(run(make(0, 1, Placement::Unbound)?, main))
}

fn make(shard: usize, count: usize, placement: Placement) -> Result<(LocalExecutor, Pulse), ShardError> {
    let limit_bytes = getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
    let shares = RINGS * 2 * u64::try_from(count).unwrap_or(1);
    let io_memory = (limit_bytes / shares).clamp(IO_MEMORY_MIN, IO_MEMORY_MAX);
    let pulse = Pulse::start().map_err(|source| ShardError::Start { shard, source })?;
    let executor = LocalExecutorBuilder::new(placement)
        .name("shard")
        .preempt_timer(PREEMPT_TIMER_AT_START)
        .io_memory(usize::try_from(io_memory).unwrap_or(usize::MAX))
        .make()
        .map_err(|error| explain(shard, limit_bytes, error))?;
    Ok((executor, pulse))
}

/// Runs `main` in a queue with the short preempt timer, with the pulse beside it.
fn run<T: 'static>((executor, pulse): (LocalExecutor, Pulse), main: impl Future<Output = T> + 'static) -> T {
    executor.run(async move {
        let queue = glommio::executor().create_task_queue(
            Shares::default(),
            Latency::Matters(PREEMPT_TIMER),
            "shard",
        );
        let follower = glommio::spawn_local(pulse.follow());
        let value = match glommio::spawn_local_into(main, queue) {
            Ok(task) => task.await,
            // The queue was made four lines up and nobody can have removed it.
            Err(error) => unreachable!("{error}"),
        };
        follower.cancel().await;
        // While the executor stands: a waker of its tasks must not outlive it.
        drop(pulse);
        value
    })
}

/// Finds out which of the two usual reasons it was.
fn explain(shard: usize, limit_bytes: u64, error: GlommioError<()>) -> ShardError {
    let memlock = matches!(&error, GlommioError::ReactorError(glommio::ReactorErrorKind::MemLockLimit(..)));
    let source = io::Error::from(error);
    match source.raw_os_error() {
        _ if memlock => ShardError::Memlock { shard, limit_bytes, source },
        Some(libc::ENOMEM) => ShardError::Memlock { shard, limit_bytes, source },
        Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => ShardError::IoUring { shard, source },
        _ => ShardError::Start { shard, source },
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pinned_named_shard_per_core_and_a_panic_is_reported() {
        let shards = Shards::start(None, |seat| async move {
            let affinity = sched_getaffinity(None).unwrap();
            assert!(affinity.is_set(seat.core) && affinity.count() == 1);
            assert_eq!(std::thread::current().name(), Some(format!("shard-{}", seat.index).as_str()));
            seat.index
        })
        .unwrap();
        assert_eq!(shards.count(), available_cores().len());
        for (index, value) in shards.join().into_iter().enumerate() {
            assert_eq!(value.unwrap(), index);
        }

        let broken = Shards::start(Some(1), |_| async { panic!("on purpose") }).unwrap();
        let ended: Vec<Result<(), _>> = broken.join();
        assert!(
            matches!(&ended[..], [Err(ShardError::Panicked { shard: 0, message })] if message == "on purpose")
        );
    }
}
