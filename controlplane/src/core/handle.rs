//! The thread that owns the core, and the handle by which async code reaches it.
//!
//! The store blocks (each commit waits for the disk), so the core has a thread of its own instead of a place on the
//! async runtime. Requests wait in one bounded queue; when it is full, callers wait, which is the back-pressure that clients
//! and hosts feel.

use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{Config, Core, HostInput, Now};
use crate::api::{Event, Problem, ProblemCode};
use crate::store::{Store, StoreError};

/// Requests that may wait. One is a few microseconds of work, or one disk write.
const QUEUE: usize = 1024;
/// How often time is made to pass: deferred commands and lost hosts are noticed this much late.
const TICK: Duration = Duration::from_millis(100);

type Job = Box<dyn FnOnce(&mut Core) + Send>;

/// Reaches the core from async code. Cheap to clone; the core ends when the last one is dropped.
#[derive(Clone)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    events: broadcast::Sender<Event>,
    revision: watch::Receiver<u64>,
    start: Instant,
}

/// Resolves when the core has ended: with the store's error, or without one when all handles are gone.
pub type Stopped = oneshot::Receiver<Option<StoreError>>;

impl Handle {
    /// Opens the core and starts its thread. Must be called within a tokio runtime, which runs the clock.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read.
    pub fn start(store: Box<dyn Store>, config: Config) -> Result<(Self, Stopped), StoreError> {
        let start = Instant::now();
        let mut core = Core::open(store, config, Now::since(start))?;
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        let (stopped, on_stop) = oneshot::channel();
        let handle = Self { jobs, events: core.events(), revision: core.revision(), start };
        let clock = handle.jobs.downgrade();
        std::thread::spawn(move || {
            while core.dead.is_none()
                && let Some(job) = queue.blocking_recv()
            {
                job(&mut core);
            }
            let error = core.dead.take();
            // Closes the store, so that whoever hears of the end can open it again.
            drop(core);
            // Nobody may be waiting for the end.
            let _ = stopped.send(error);
        });
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            loop {
                interval.tick().await;
                let Some(jobs) = clock.upgrade() else { break };
                let tick = Box::new(move |core: &mut Core| {
                    // A dead core says so by ending.
                    let _ = core.call(Now::since(start), |core| {
                        core.tick();
                        Ok(())
                    });
                });
                if jobs.send(tick).await.is_err() {
                    break;
                }
            }
        });
        Ok((handle, on_stop))
    }

    /// Runs `change` on the core; the result comes after it was kept.
    ///
    /// # Errors
    /// What `change` returns; [`ProblemCode::Internal`] when the core has ended.
    pub async fn call<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Core) -> Result<R, Problem> + Send + 'static,
    ) -> Result<R, Problem> {
        let ended = || {
            Problem::new(
                ProblemCode::Internal,
                "the control plane is stopping",
                "start mashines-control again and look before you repeat the request",
            )
        };
        let (reply, result) = oneshot::channel();
        let start = self.start;
        let job: Job = Box::new(move |core| {
            // The caller may have gone away; the change stands all the same.
            let _ = reply.send(core.call(Now::since(start), change));
        });
        self.jobs.send(job).await.map_err(|_| ended())?;
        result.await.map_err(|_| ended())?
    }

    /// Gives the core a host's message.
    ///
    /// # Errors
    /// As [`Handle::call`].
    pub async fn host(&self, input: HostInput) -> Result<(), Problem> {
        self.call(move |core| {
            core.host_input(input);
            Ok(())
        })
        .await
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Changes whenever anything that a client can see may have changed.
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.clone()
    }
}
