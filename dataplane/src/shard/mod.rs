//! What runs on a shard: the QUIC endpoint, the control sockets of the machines whose home it is, and migration sessions.
//!
//! The agent's orders come through the shard's [`doorbell`](crate::doorbell); what shards have to say goes to the agent through an
//! unbounded channel, the one queue here without a bound of its own, because a shard must not wait for another thread: what is in it
//! is bounded by its producers, each of which has a handful of messages outstanding (progress is limited to ten a second).

mod accept;
pub mod stream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use wire::fleet::{Outcome, Progress, RefusalCode};
use wire::ids::{Epoch, MachineId, MigrationId};
use wire::migration::target::TargetOutcome;
use wire::units::Instant;

use crate::doorbell::{Doorbell, Ringer};
use crate::migrate::source::SourceJob;
use crate::migrate::source_lane::{self, SourceLaneJob};
use crate::migrate::target::{TargetJob, TargetSession};
use crate::migrate::target_lane::LaneSink;
use crate::quic::{Endpoint, QuicError, TransportOptions};
use crate::shards::ShardSeat;
use crate::vm::VmmError;
use crate::vm::client::{VmmClient, VmmEvent};

/// Orders a shard may have waiting: more than all machines of a host can need at once.
pub const ORDERS_MAX: usize = 4096;

/// What the agent (or another shard) has a shard do.
pub enum ShardOrder {
    /// Become a machine's home: take charge of its VMM's control socket.
    Attach {
        /// The machine.
        machine: MachineId,
        /// Process id of the VMM, which its events carry.
        pid: u32,
        /// The socket.
        socket: OwnedFd,
        /// Whether it worked.
        answer: oneshot::Sender<io::Result<()>>,
    },
    /// Ask a machine's VMM for something.
    Vmm {
        /// The machine.
        machine: MachineId,
        /// What.
        request: VmmRequest,
        /// The answer.
        answer: oneshot::Sender<Result<(), VmmError>>,
    },
    /// Let go of a machine.
    Detach {
        /// The machine.
        machine: MachineId,
    },
    /// Move a machine out; this shard is its home.
    Source(Box<SourceJob>),
    /// Run one lane of a migration whose session is on another shard.
    SourceLane(Box<SourceLaneJob>),
    /// Receive a machine; this shard becomes its home.
    Target(Box<TargetJob>),
    /// Take lanes of this migration.
    ExpectLanes(Arc<LaneSink>),
    /// Take none any more, and answer its source no more.
    Forget {
        /// The migration.
        migration: MigrationId,
    },
    /// The daemon ends: tell the peers and end, too.
    End,
}

/// What the agent asks of a VMM outside of migrations.
#[derive(Debug, Clone, Copy)]
pub enum VmmRequest {
    /// Run under this epoch.
    Run(Epoch),
    /// Take it back under this epoch.
    Reclaim(Epoch),
    /// Switch dirty logging off, left on by an earlier `mashined`.
    StopDirtyLog,
    /// Press the power button.
    PowerButton,
    /// End.
    Quit,
}

/// What a shard tells the agent.
pub enum ShardReport {
    /// Something about a machine's VMM.
    Vmm {
        /// The machine.
        machine: MachineId,
        /// Process id of that VMM.
        pid: u32,
        /// What.
        event: VmmEvent,
    },
    /// About a migration out of this host.
    Source {
        /// The migration.
        migration: MigrationId,
        /// What.
        report: SourceReport,
    },
    /// About a migration into this host.
    Target {
        /// The migration.
        migration: MigrationId,
        /// What.
        report: TargetReport,
    },
    /// A session needs something that only the agent can do.
    Work {
        /// The machine it is for.
        machine: MachineId,
        /// What.
        work: Work,
        /// To be called when it is done.
        done: WorkDone,
    },
}

/// Called with the outcome of a [`Work`]; `Err` is one line for people.
pub type WorkDone = Box<dyn FnOnce(Result<u64, String>) + Send>;

/// Work for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Route the machine to its tap here and answer for it.
    InstallRoute,
    /// Take that back.
    RemoveRoute,
    /// Forward it to the migration's target; the outcome is how many packets were held.
    Forward {
        /// The migration.
        migration: MigrationId,
    },
    /// Take the route back from a target that will never run it.
    Unforward,
    /// End the VMM and free the RAM of a machine that was given away; keep forwarding.
    Release,
    /// End a half-received copy: VMM, RAM, tap, routes.
    Discard,
    /// Replace the VMM of a half-received copy by a fresh one over the same RAM.
    RenewVmm,
}

/// News of a migration out of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceReport {
    /// How far it is.
    Progress(Progress),
    /// The machine was given away: it is not this host's any more.
    GivenAway,
    /// The machine is this host's again, under this epoch.
    Reclaimed(Epoch),
    /// Asked to cancel: too late.
    CancelRefused,
    /// Asked to reclaim: no.
    ReclaimRefused(RefusalCode),
    /// It has ended.
    Ended(Outcome),
}

/// News of a migration into this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetReport {
    /// Everything is here; Commit has not come.
    Ready,
    /// Settled.
    Ended(TargetOutcome),
    /// Asked to forget: too late.
    ForgetRefused,
    /// Asked to forget: gone.
    Forgotten,
    /// Asked to fence: done.
    Fenced(Epoch),
    /// Asked to fence: it is owned here.
    Owns(Epoch),
}

/// What every task of a shard can reach. One per shard.
pub struct ShardContext {
    /// Which shard this is.
    pub seat: ShardSeat,
    /// Its QUIC endpoint.
    pub endpoint: Endpoint,
    /// All shards of this host.
    pub shards: ShardHandles,
    /// To the agent.
    pub agent: mpsc::UnboundedSender<ShardReport>,
    /// Machines whose home this is.
    pub machines: RefCell<HashMap<MachineId, VmmClient>>,
    /// Migrations into this host whose session is here.
    pub targets: RefCell<HashMap<MigrationId, TargetSession>>,
    /// Migrations into this host, all of them.
    pub sinks: RefCell<HashMap<MigrationId, Arc<LaneSink>>>,
    /// Epochs of machines that an earlier `mashined` received: about their commits nothing may be said from memory.
    pub adopted_epochs: Vec<Epoch>,
    sessions: Cell<u64>,
}

impl ShardContext {
    /// Tells the agent. An agent that is gone is about to end the process.
    pub fn report(&self, report: ShardReport) {
        let _agent_gone = self.agent.send(report);
    }

    /// Has the agent do something; `done` is called on the agent's thread.
    pub fn work(&self, machine: MachineId, work: Work, done: WorkDone) {
        self.report(ShardReport::Work { machine, work, done });
    }

    /// A number for a connection, unique on this shard.
    pub fn next_session(&self) -> u64 {
        self.sessions.set(self.sessions.get() + 1);
        self.sessions.get()
    }
}

/// The shards of this host, for those who give them orders.
#[derive(Clone)]
pub struct ShardHandles {
    shards: Arc<[ShardHandle]>,
}

/// One shard.
pub struct ShardHandle {
    /// Where its orders go.
    pub orders: Ringer<ShardOrder>,
}

impl ShardHandles {
    /// Makes it of the ringers of all shards, in their order.
    pub fn new(ringers: Vec<Ringer<ShardOrder>>) -> Self {
        Self { shards: ringers.into_iter().map(|orders| ShardHandle { orders }).collect() }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.shards.len()
    }

    /// The shard with this index, counted round and round.
    pub fn at(&self, index: usize) -> &Ringer<ShardOrder> {
        &self.shards[index % self.shards.len()].orders
    }

    /// A machine's home.
    pub fn home_of(&self, machine: MachineId) -> usize {
        // Ids are random, so any of their bits spread machines evenly.
        usize::try_from(machine.as_u64() % self.shards.len() as u64).unwrap_or(0)
    }
}

/// How to start a shard.
pub struct ShardStart {
    /// Address to bind; port 0.
    pub bind: SocketAddr,
    /// Keys.
    pub trust: Arc<pki::Trust>,
    /// QUIC settings.
    pub options: TransportOptions,
    /// Its orders.
    pub orders: Doorbell<ShardOrder>,
    /// All shards.
    pub shards: ShardHandles,
    /// To the agent.
    pub agent: mpsc::UnboundedSender<ShardReport>,
    /// See [`ShardContext::adopted_epochs`].
    pub adopted_epochs: Vec<Epoch>,
    /// Told where the endpoint is.
    pub bound: oneshot::Sender<Result<SocketAddr, QuicError>>,
}

/// Runs a shard until the agent ends it.
pub async fn run(seat: ShardSeat, start: ShardStart) {
    let endpoint = match Endpoint::bind(start.bind, &start.trust, start.options) {
        Ok(endpoint) => endpoint,
        Err(error) => return drop(start.bound.send(Err(error))),
    };
    let _agent_gone = start.bound.send(Ok(endpoint.local_addr()));
    let context = Rc::new(ShardContext {
        seat,
        endpoint,
        shards: start.shards,
        agent: start.agent,
        machines: RefCell::default(),
        targets: RefCell::default(),
        sinks: RefCell::default(),
        adopted_epochs: start.adopted_epochs,
        sessions: Cell::new(0),
    });
    let accepting = glommio::spawn_local(accept::accept_all(context.clone()));
    let mut orders = start.orders.attach();
    loop {
        match orders.recv().await {
            None | Some(ShardOrder::End) => break,
            Some(order) => apply(&context, order),
        }
    }
    accepting.cancel().await;
    context.endpoint.shutdown(0, "host daemon ends").await;
}

fn apply(context: &Rc<ShardContext>, order: ShardOrder) {
    match order {
        ShardOrder::Attach { machine, pid, socket, answer } => {
            drop(answer.send(attach(context, machine, pid, socket)));
        }
        ShardOrder::Vmm { machine, request, answer } => {
            let client = context.machines.borrow().get(&machine).cloned();
            glommio::spawn_local(async move { drop(answer.send(ask(client, request).await)) }).detach();
        }
        ShardOrder::Detach { machine } => drop(context.machines.borrow_mut().remove(&machine)),
        ShardOrder::Source(job) => crate::migrate::source::start(context, *job),
        ShardOrder::SourceLane(job) => {
            glommio::spawn_local(source_lane::run(context.clone(), *job)).detach();
        }
        ShardOrder::Target(job) => crate::migrate::target::start(context, *job),
        ShardOrder::ExpectLanes(sink) => drop(context.sinks.borrow_mut().insert(sink.migration(), sink)),
        ShardOrder::Forget { migration } => {
            context.sinks.borrow_mut().remove(&migration);
            context.targets.borrow_mut().remove(&migration);
        }
        // The loop that calls this ends instead.
        ShardOrder::End => {}
    }
}

fn attach(context: &Rc<ShardContext>, machine: MachineId, pid: u32, socket: OwnedFd) -> io::Result<()> {
    let for_watcher = context.clone();
    let client = VmmClient::start(machine, socket, move |event| {
        for_watcher.report(ShardReport::Vmm { machine, pid, event });
    })?;
    context.machines.borrow_mut().insert(machine, client);
    Ok(())
}

async fn ask(client: Option<VmmClient>, request: VmmRequest) -> Result<(), VmmError> {
    let client = client.ok_or(VmmError::Gone { waiting_for: "anything", source: None })?;
    match request {
        VmmRequest::Run(epoch) => client.run(epoch).await,
        VmmRequest::Reclaim(epoch) => client.reclaim(epoch).await,
        VmmRequest::StopDirtyLog => client.dirty_log(false).await,
        VmmRequest::PowerButton => client.power_button().await,
        VmmRequest::Quit => client.quit().await,
    }
}

/// The protocol's clock: microseconds since this process first asked.
pub fn now() -> Instant {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    let start = START.get_or_init(std::time::Instant::now);
    Instant(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX))
}
