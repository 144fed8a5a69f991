//! The one owner of the fleet's records.
//!
//! All changes go through a [`Core`], which one thread owns: requests of clients, messages of hosts and the clock come in
//! one after the other. Each is applied to the records in memory, kept by the [`Store`] as one batch, and only then made
//! visible: answers, events, and the commands that the new state calls for. Nothing else holds state that matters, there are no
//! locks, and a test can drive the whole control plane step by step.
//!
//! When the store fails the core is dead: it answers nothing and commands nothing from then on, and the process
//! ends. The next start finds the last kept state and goes on from it; see [`crate::saga`].

mod addresses;
mod console;
mod dispatch;
mod guest_config;
mod handle;
mod hosts;
mod idempotency;
mod images;
mod launch;
mod machines;
mod metrics;
mod migration_news;
mod migrations;
mod model;
mod reconcile;
mod views;

pub use addresses::{BadPool, Ipv4Pool, Ipv6Pool, Pools};
pub use console::{LogAnswer, LogRead};
pub use handle::{Handle, Stopped};
pub use hosts::HostInput;
pub use idempotency::{Answered, IdempotencyKey};
pub use machines::MachineRef;
pub use views::{MachineFilter, MigrationFilter};

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{broadcast, watch};
use wire::fleet::Progress;
use wire::ids::{HostName, MigrationId};

use crate::api::{Event, Problem, ProblemCode};
use crate::store::{Store, StoreError};
use dispatch::Dispatch;
use hosts::HostRuntime;
use model::Model;

/// A point in time, from both clocks. Handlers are told the time; they never ask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, in milliseconds.
    pub mono_ms: u64,
    /// Since the Unix epoch, in milliseconds.
    pub unix_ms: u64,
}

impl Now {
    /// The time, with the monotonic clock counted from `start`.
    pub fn since(start: std::time::Instant) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { mono_ms: millis(start.elapsed()), unix_ms: millis(unix) }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What an operator sets.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where addresses come from.
    pub pools: Pools,
    /// Kernel used when a launch names none.
    pub default_kernel: Option<String>,
    /// How often hosts send heartbeats, in milliseconds; silent for three of them they count as lost.
    pub heartbeat_ms: u32,
    /// After a start of the control plane: how long known hosts have to dial in before they can count as lost, in milliseconds.
    pub join_ms: u64,
    /// Migrations that one host takes part in at once; more wait.
    pub migrations_per_host: usize,
    /// vCPUs that a host takes per physical CPU.
    pub vcpus_per_cpu: u32,
    /// How long a source passes on late packets before its copy is cleared away, in milliseconds.
    pub forward_ms: u64,
    /// How long a source may wait for the answer to its Commit before the control plane steps in, in milliseconds.
    pub doubt_ms: u64,
    /// How long to wait before a command that did not help is sent again, in milliseconds.
    pub retry_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            pools: Pools::default(),
            default_kernel: None,
            heartbeat_ms: 1000,
            join_ms: 15_000,
            migrations_per_host: 4,
            vcpus_per_cpu: 16,
            forward_ms: 2000,
            doubt_ms: 3000,
            retry_ms: 1000,
        }
    }
}

/// Ended migrations that are kept.
const ENDED_MIGRATIONS_MAX: usize = 1000;
/// Events that a slow reader may fall behind before it is sent to the store for them.
const EVENT_BACKLOG: usize = 1024;

/// The fleet's records, and what is known of its hosts at this moment.
pub struct Core {
    store: Box<dyn Store>,
    config: Config,
    now: Now,
    model: Model,
    hosts: BTreeMap<HostName, HostRuntime>,
    dispatch: Dispatch,
    /// Last report of each running migration; not kept, because the next one comes within a moment.
    progress: BTreeMap<MigrationId, Progress>,
    /// Since when a source has been waiting for the answer to its Commit, in monotonic milliseconds.
    doubt_since: BTreeMap<MigrationId, u64>,
    /// Migrations whose source must be asked how it stands, because a message may have been lost with a link.
    ask_source: BTreeSet<MigrationId>,
    /// Copies already told about in an event, so that each heartbeat does not repeat it.
    foreign_seen: BTreeSet<(HostName, wire::ids::MachineId)>,
    events: broadcast::Sender<Event>,
    revision: watch::Sender<u64>,
    dead: Option<StoreError>,
}

impl Core {
    /// Loads what the store has and takes up all unfinished work.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read, or the first write fails.
    pub fn open(store: Box<dyn Store>, config: Config, now: Now) -> Result<Self, StoreError> {
        let mut model = Model::from_snapshot(store.load()?);
        model.meta_mut().generation += 1;
        let dispatch = Dispatch::new(model.meta().generation, &model);
        let unfinished = model.migrations().filter(|m| !m.state.is_ended()).map(|m| m.id).collect();
        let mut hosts = BTreeMap::new();
        let join_by = now.mono_ms.saturating_add(config.join_ms);
        for record in model.hosts() {
            hosts.insert(record.name.clone(), HostRuntime::known(join_by));
        }
        let mut core = Self {
            store,
            config,
            now,
            model,
            hosts,
            dispatch,
            progress: BTreeMap::new(),
            doubt_since: BTreeMap::new(),
            ask_source: unfinished,
            foreign_seen: BTreeSet::new(),
            events: broadcast::Sender::new(EVENT_BACKLOG),
            revision: watch::Sender::new(0),
            dead: None,
        };
        core.settle();
        match core.dead.take() {
            Some(error) => Err(error),
            None => Ok(core),
        }
    }

    /// Runs `change` at the time `now`, keeps what it changed, and only then hands out its result and what follows
    /// from it. A `change` that fails must not have changed anything.
    ///
    /// # Errors
    /// What `change` returns; [`ProblemCode::Internal`] when the store failed or had failed before.
    pub fn call<R>(
        &mut self,
        now: Now,
        change: impl FnOnce(&mut Self) -> Result<R, Problem>,
    ) -> Result<R, Problem> {
        if self.dead.is_none() {
            self.now = now;
            let result = change(self);
            self.settle();
            if self.dead.is_none() {
                return result;
            }
        }
        Err(Problem::new(
            ProblemCode::Internal,
            "the store failed; whether this request was kept is not known",
            "look at the log of mashines-control, make room or repair the disk, and start it again; then look before you repeat the request",
        ))
    }

    /// The store's error, once it failed. The core does nothing from then on.
    pub fn dead(&self) -> Option<&StoreError> {
        self.dead.as_ref()
    }

    /// Lets time pass: hosts fall silent, deferred commands come due.
    pub fn tick(&mut self) {
        self.notice_lost_hosts();
        self.notice_doubt();
        self.notice_overdue_guests();
        self.expire_idempotency_keys();
    }

    /// Receives each event after it was kept.
    pub fn events(&self) -> broadcast::Sender<Event> {
        self.events.clone()
    }

    /// Changes whenever anything that a client can see may have changed.
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Kept events with an id above `after`.
    ///
    /// # Errors
    /// [`ProblemCode::Internal`] when the store cannot be read.
    pub fn events_after(&self, after: u64, limit: usize) -> Result<Vec<Event>, Problem> {
        self.store.events_after(after, limit).map_err(|error| self.internal(&error))
    }

    /// Id of the newest event.
    pub fn newest_event(&self) -> u64 {
        self.model.meta().event_id
    }

    fn internal(&self, error: &StoreError) -> Problem {
        tracing::error!(error = %chain(error), "the store cannot be read");
        Problem::new(ProblemCode::Internal, "the store cannot be read", "look at the log of mashines-control")
    }

    /// Keeps what changed, then makes it visible.
    fn settle(&mut self) {
        self.schedule_migrations();
        self.model.drop_old_migrations(ENDED_MIGRATIONS_MAX);
        let batch = self.model.take_batch();
        if !batch.is_empty()
            && let Err(error) = self.store.commit(&batch)
        {
            tracing::error!(error = %chain(&error), "the store failed; stopping");
            self.dead = Some(error);
            return;
        }
        self.dispatch.wake(&batch);
        for event in batch.events {
            tracing::info!(id = event.id, kind = event.kind.as_str(), "{}", event.message);
            // No subscriber is fine.
            let _ = self.events.send(event);
        }
        self.send_commands();
        self.revision.send_modify(|revision| *revision = revision.wrapping_add(1));
    }
}

/// An error with its causes, for a log line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
