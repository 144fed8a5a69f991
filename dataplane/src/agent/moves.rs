//! Migrations as the agent sees them: preparing to receive, sending, cancelling, and settling doubts.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use wire::fleet::{Answer, DiskStart, ForwardAddress, HostPhase, MigrationStanding, Outcome, RefusalCode};
use wire::ids::{Epoch, HostName, MachineId, MigrationId, StateId};
use wire::migration::messages::{VERSIONS, VersionRange};
use wire::migration::source::{SourceConfig, SourceEvent};
use wire::migration::target::{TargetConfig, TargetEvent, TargetOutcome};
use wire::vmm::MachineSpec;

use super::commands::Refusal;
use super::lifecycle::lacking;
use super::machine::Machine;
use super::{Host, disks};
use crate::doorbell::{Ringer, doorbell};
use crate::migrate::source::{self, SourceInput, SourceJob};
use crate::migrate::target::{self, Outside, TargetJob};
use crate::migrate::target_lane::LaneSink;
use crate::shard::{ShardOrder, SourceReport, TargetReport, VmmRequest, Work};
use crate::vm::process::MachineDir;

/// Lanes for each shard that both ends have. One stream keeps a core busy.
const LANES_PER_SHARD: usize = 1;

/// How many times the silence that ends a connection the target may be out of reach, before the migration fails.
const PEER_TIMEOUTS_UNREACHABLE: u64 = 10;

/// What the control plane says of a migration out of this host.
pub(super) struct MoveOrder {
    pub migration: MigrationId,
    pub epoch: Epoch,
    pub target: HostName,
    pub addresses: Vec<String>,
    pub forward_to: ForwardAddress,
    pub downtime_budget_us: u64,
    pub bytes_per_s_max: u64,
}

/// A migration out of this host: kept, with its outcome, until the machine is gone or moves again.
pub(super) struct Outgoing {
    pub machine: MachineId,
    /// Epoch under which the target owns the machine once it was given away.
    pub to_epoch: Epoch,
    pub forward_to: ForwardAddress,
    pub standing: RefCell<MigrationStanding>,
    pub session: Ringer<SourceInput>,
    /// Packets that were held and then forwarded.
    pub held: std::cell::Cell<u64>,
    /// What the session last said, for commands that wait for it.
    pub news: RefCell<Option<SourceReport>>,
    pub changed: Notify,
}

/// A migration into this host.
pub(super) struct Incoming {
    pub machine: MachineId,
    pub standing: RefCell<MigrationStanding>,
    pub session: Ringer<Outside>,
    pub news: RefCell<Option<TargetReport>>,
    pub changed: Notify,
}

impl Host {
    /// Reserves everything for a machine that will come, and tells where to send it.
    pub(super) async fn prepare(
        self: &Rc<Self>,
        migration: MigrationId,
        spec: MachineSpec,
        epoch: Epoch,
        source: HostName,
    ) -> Result<Answer, Refusal> {
        let id = spec.id;
        if source == self.config.name {
            return Err(Refusal::new(RefusalCode::SameHost, format!("{} is on this host", spec.name)));
        }
        if self.incoming.borrow().get(&migration).is_some_and(|i| i.machine == id) {
            return Ok(self.prepared(id));
        }
        self.check_fence(id, epoch)?;
        if let Some(old) = self.machine(id) {
            // What is left of a machine that was here once gives way, but for its forward route: packets go on to
            // where it runs now until it runs here.
            let passed = old.phase() == HostPhase::GivenAway && old.epoch() < epoch;
            if !passed {
                let detail =
                    format!("{} is here already ({:?}, {})", old.spec().name, old.phase(), old.epoch());
                return Err(Refusal::new(RefusalCode::SameHost, detail));
            }
            self.end_vm(&old).await;
            self.ledger.borrow_mut().release(id);
        }
        self.ledger.borrow_mut().hold(&spec).map_err(lacking)?;
        self.lost.borrow_mut().forget_below(id, epoch);
        let machine = Rc::new(Machine::new(spec, epoch, HostPhase::Incoming));
        machine.set_migration(Some(migration));
        self.machines.borrow_mut().insert(id, machine.clone());
        let _turn = machine.turn.lock().await;
        let created = async {
            let disks = self.open_disks(machine.spec(), DiskStart::Fresh, disks::INCOMING).await?;
            self.create(&machine, disks, |_| Ok(())).await
        };
        let expected = match created.await {
            Ok(()) => self.expect(&machine, migration, epoch, source).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = expected {
            self.clear_away(&machine).await;
            return Err(refusal);
        }
        self.note_change();
        Ok(self.prepared(id))
    }

    /// Starts the session that receives the machine, and has all shards take its lanes.
    async fn expect(
        &self,
        machine: &Machine,
        migration: MigrationId,
        epoch: Epoch,
        source: HostName,
    ) -> Result<(), Refusal> {
        let vm = machine.vm().ok_or_else(|| Refusal::new(RefusalCode::HostError, "the VMM has died"))?;
        let (session, events) = doorbell(target::EVENTS_MAX).map_err(Refusal::host)?;
        let memory = vm.memory;
        let dir = MachineDir::of(&self.config.state, machine.id());
        let claim = tokio::task::spawn_blocking(move || dir.claim(epoch)).await;
        let claim = claim.map_err(Refusal::host)?.map_err(Refusal::host)?;
        let sink = Arc::new(LaneSink::new(migration, source.clone(), memory.clone(), session.clone()));
        for index in 0..self.shards.count() {
            let order = ShardOrder::ExpectLanes(sink.clone());
            self.shards.at(index).send(order).await.map_err(Refusal::host)?;
        }
        let lanes = u16::try_from(self.shards.count() * LANES_PER_SHARD).unwrap_or(1);
        let mut config = TargetConfig::new(migration, machine.spec().clone(), epoch, source, lanes);
        config.versions = self.versions();
        let job = TargetJob { config, memory, sink, claim, events, session: session.clone() };
        let home = self.shards.at(self.shards.home_of(machine.id()));
        home.send(ShardOrder::Target(Box::new(job))).await.map_err(Refusal::host)?;
        let incoming = Incoming {
            machine: machine.id(),
            standing: RefCell::new(MigrationStanding::Receiving),
            session,
            news: RefCell::default(),
            changed: Notify::new(),
        };
        self.incoming.borrow_mut().insert(migration, Rc::new(incoming));
        Ok(())
    }

    fn prepared(&self, id: MachineId) -> Answer {
        let home = self.shards.home_of(id);
        let count = self.data_addresses.len();
        let addresses = (0..count)
            .filter_map(|i| self.data_addresses.get((home + i) % count))
            .map(SocketAddr::to_string)
            .collect();
        Answer::Prepared { addresses, forward_to: self.net.fabric_addresses(), state: self.state }
    }

    fn versions(&self) -> VersionRange {
        let newest = self.config.migration_version_max.unwrap_or(VERSIONS.newest).min(VERSIONS.newest);
        VersionRange { oldest: VERSIONS.oldest.min(newest), newest }
    }

    /// Begins to move a machine out.
    pub(super) fn migrate(self: &Rc<Self>, id: MachineId, order: MoveOrder) -> Result<(), Refusal> {
        if self.outgoing.borrow().contains_key(&order.migration) {
            return Ok(());
        }
        let unknown = || Refusal::new(RefusalCode::WrongState, format!("{id} is not on this host"));
        let machine = self.machine(id).ok_or_else(unknown)?;
        let vm = machine.vm().ok_or_else(unknown)?;
        match machine.phase() {
            HostPhase::Running => {}
            HostPhase::MigratingOut | HostPhase::Paused => {
                let other = machine.migration().map_or_else(String::new, |m| format!(" ({m})"));
                return Err(Refusal::new(
                    RefusalCode::Busy,
                    format!("another migration of it is under way{other}"),
                ));
            }
            phase => return Err(Refusal::new(RefusalCode::WrongState, format!("it is {phase:?} here"))),
        }
        if order.target == self.config.name {
            return Err(Refusal::new(RefusalCode::SameHost, "it is on that host already"));
        }
        if order.epoch <= machine.epoch() {
            let detail = format!("{} is not above {}, under which it runs", order.epoch, machine.epoch());
            return Err(Refusal::new(RefusalCode::Stale, detail));
        }
        let addresses = parse_addresses(&order.addresses)?;
        let (session, inputs) = doorbell(source::INPUTS_MAX).map_err(Refusal::host)?;
        let lanes = self.shards.count().min(addresses.len()) * LANES_PER_SHARD;
        let mut config = SourceConfig::new(
            order.migration,
            machine.spec().clone(),
            (machine.epoch(), order.epoch),
            (self.config.name.clone(), order.target),
            u16::try_from(lanes).unwrap_or(1),
        );
        config.versions = self.versions();
        config.incarnation = self.boot_nonce;
        config.limits.unreachable_us =
            PEER_TIMEOUTS_UNREACHABLE * 1_000_000 * u64::from(self.config.peer_timeout);
        config.policy.downtime_budget_us = order.downtime_budget_us;
        let job = SourceJob {
            config,
            addresses,
            memory: vm.memory,
            bytes_per_s_max: order.bytes_per_s_max,
            inputs,
            session: session.clone(),
        };
        let home = self.shards.at(self.shards.home_of(id));
        home.try_send(ShardOrder::Source(Box::new(job)))
            .map_err(|_| Refusal::new(RefusalCode::Busy, "the shard has too much to do; try again"))?;
        self.forget_departure(&machine);
        machine.set_phase(HostPhase::MigratingOut);
        machine.set_migration(Some(order.migration));
        let outgoing = Outgoing {
            machine: id,
            to_epoch: order.epoch,
            forward_to: order.forward_to,
            standing: RefCell::new(MigrationStanding::Moving(not_begun(order.migration, &machine))),
            session,
            held: std::cell::Cell::new(0),
            news: RefCell::default(),
            changed: Notify::new(),
        };
        self.outgoing.borrow_mut().insert(order.migration, Rc::new(outgoing));
        Ok(())
    }

    /// Cancels; answers when it has taken effect.
    pub(super) async fn cancel(&self, migration: MigrationId) -> Result<Answer, Refusal> {
        let Some(outgoing) = self.outgoing.borrow().get(&migration).cloned() else {
            return Ok(Answer::Unknown);
        };
        let committed =
            || Refusal::new(RefusalCode::Committed, "too late: the machine has been given to the target");
        loop {
            let changed = outgoing.changed.notified();
            match &*outgoing.standing.borrow() {
                MigrationStanding::Ended(Outcome::Succeeded(_)) | MigrationStanding::InDoubt => {
                    return Err(committed());
                }
                MigrationStanding::Ended(_) => return Ok(Answer::Done),
                _ => {}
            }
            if outgoing.news.take() == Some(SourceReport::CancelRefused) {
                return Err(committed());
            }
            let input = SourceInput::Event(SourceEvent::Cancel);
            if outgoing.session.send(input).await.is_ok() {
                changed.await;
            } else {
                // It has just ended: its last report waits for this thread.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Drops a copy that is not owned here.
    pub(super) async fn forget(&self, migration: MigrationId) -> Result<(), Refusal> {
        let Some(incoming) = self.incoming.borrow().get(&migration).cloned() else { return Ok(()) };
        match self.ask_target(&incoming, TargetEvent::Forget).await? {
            TargetReport::ForgetRefused => {
                Err(Refusal::new(RefusalCode::Committed, "too late: the machine is owned here"))
            }
            _ => Ok(()),
        }
    }

    /// Promises that the machine will never run here under `epoch` or below, unless it does already, or may have done so and is lost.
    pub(super) async fn fence(&self, id: MachineId, epoch: Epoch, state: Option<StateId>) -> Answer {
        let fence = self.fences.borrow().get(&id).copied().unwrap_or_default().max(epoch);
        self.fences.borrow_mut().insert(id, fence);
        if let Some(lost) = self.lost.borrow().get(id).filter(|lost| *lost >= epoch) {
            return Answer::Owns { epoch: lost };
        }
        let Some(machine) = self.machine(id) else {
            let forgotten = state.is_some_and(|state| state != self.state);
            return if forgotten { Answer::Owns { epoch } } else { Answer::Done };
        };
        let incoming = machine.migration().and_then(|m| self.incoming.borrow().get(&m).cloned());
        let owns = |machine: &Machine| {
            matches!(
                machine.phase(),
                HostPhase::Running | HostPhase::MigratingOut | HostPhase::Paused | HostPhase::Ended
            )
        };
        if machine.phase() == HostPhase::Incoming
            && let Some(incoming) = incoming
        {
            return match self.ask_target(&incoming, TargetEvent::Fence { epoch }).await {
                Ok(TargetReport::Owns(epoch)) => Answer::Owns { epoch },
                Ok(_) => Answer::Done,
                Err(Refusal { code, detail }) => Answer::Refused { code, detail },
            };
        }
        if owns(&machine) && machine.epoch() >= epoch {
            Answer::Owns { epoch: machine.epoch() }
        } else {
            Answer::Done
        }
    }

    /// Tells a target session something and waits for what it says to it.
    async fn ask_target(&self, incoming: &Incoming, event: TargetEvent) -> Result<TargetReport, Refusal> {
        incoming.news.take();
        let changed = incoming.changed.notified();
        incoming.session.send(Outside::Event(event)).await.map_err(Refusal::host)?;
        changed.await;
        loop {
            let changed = incoming.changed.notified();
            match incoming.news.take() {
                // News of the migration itself; a copy that was dropped, though, answers every question.
                None | Some(TargetReport::Ready | TargetReport::Ended(TargetOutcome::Owned { .. })) => {
                    changed.await
                }
                Some(report) => return Ok(report),
            }
        }
    }

    /// Takes a machine back that was given away; the control plane has fenced the target.
    pub(super) async fn reclaim(self: &Rc<Self>, id: MachineId, epoch: Epoch) -> Result<(), Refusal> {
        let unknown = || Refusal::new(RefusalCode::WrongState, format!("{id} is not on this host"));
        let machine = self.machine(id).ok_or_else(unknown)?;
        if machine.phase() == HostPhase::Running && machine.epoch() >= epoch {
            return Ok(());
        }
        let outgoing = machine.migration().and_then(|m| self.outgoing.borrow().get(&m).cloned());
        let in_doubt = outgoing.filter(|o| *o.standing.borrow() == MigrationStanding::InDoubt);
        let Some(outgoing) = in_doubt else { return self.reclaim_alone(&machine, epoch).await };
        let input = SourceInput::Event(SourceEvent::Reclaim { epoch });
        outgoing.session.send(input).await.map_err(Refusal::host)?;
        loop {
            let changed = outgoing.changed.notified();
            if machine.phase() == HostPhase::Running && machine.epoch() >= epoch {
                return Ok(());
            }
            if let Some(SourceReport::ReclaimRefused(code)) = outgoing.news.take() {
                return Err(Refusal::new(code, "the machine was not given away under a lower epoch"));
            }
            changed.await;
        }
    }

    /// Without a session: this daemon was restarted since, or the machine was never given away.
    async fn reclaim_alone(self: &Rc<Self>, machine: &Rc<Machine>, epoch: Epoch) -> Result<(), Refusal> {
        if machine.phase() == HostPhase::GivenAway {
            self.ask_vmm(machine.id(), VmmRequest::Reclaim(epoch)).await.map_err(Refusal::host)?;
            self.do_work(machine, Work::Unforward)
                .await
                .map_err(|e| Refusal::new(RefusalCode::HostError, e))?;
        }
        self.ask_vmm(machine.id(), VmmRequest::Run(epoch)).await.map_err(Refusal::host)?;
        machine.set_epoch(epoch);
        machine.set_phase(HostPhase::Running);
        Ok(())
    }

    /// How a migration stands here.
    pub(super) fn inquire(&self, migration: MigrationId) -> Answer {
        if let Some(outgoing) = self.outgoing.borrow().get(&migration) {
            return Answer::Migration(outgoing.standing.borrow().clone());
        }
        if let Some(incoming) = self.incoming.borrow().get(&migration) {
            return Answer::Migration(incoming.standing.borrow().clone());
        }
        let given_away = self
            .machines
            .borrow()
            .values()
            .any(|m| m.migration() == Some(migration) && m.phase() == HostPhase::GivenAway);
        if given_away { Answer::Migration(MigrationStanding::InDoubt) } else { Answer::Unknown }
    }

    /// The machine moves again or is gone: what is known of how it came here is of no use any more.
    pub(super) fn forget_arrival(&self, machine: &Machine) {
        let arrivals: Vec<MigrationId> = self
            .incoming
            .borrow()
            .iter()
            .filter(|(_, i)| i.machine == machine.id())
            .map(|(m, _)| *m)
            .collect();
        arrivals.into_iter().for_each(|migration| self.forget_incoming(migration));
    }

    /// Ends the session of a migration into this host. Whoever asks about it from here on is told that nothing is known.
    pub(super) fn forget_incoming(&self, migration: MigrationId) {
        let Some(incoming) = self.incoming.borrow_mut().remove(&migration) else { return };
        let _ended_already = incoming.session.try_send(Outside::End);
        for index in 0..self.shards.count() {
            let _shard_gone = self.shards.at(index).try_send(ShardOrder::Forget { migration });
        }
    }

    /// The machine moves again: the outcome of its earlier migrations is of no use any more.
    fn forget_departure(&self, machine: &Machine) {
        self.outgoing.borrow_mut().retain(|_, o| o.machine != machine.id());
    }

    /// The control plane has a copy destroyed that was given away: it knows who owns the machine, and the source's session need not ask any more.
    pub(super) fn settle_doubt(&self, machine: &Machine) {
        for outgoing in self.outgoing.borrow().values().filter(|o| o.machine == machine.id()) {
            if *outgoing.standing.borrow() == MigrationStanding::InDoubt {
                let event = SourceEvent::TargetOwns { epoch: outgoing.to_epoch };
                let _session_ended = outgoing.session.try_send(SourceInput::Event(event));
            }
        }
    }

    /// Tells the machine's sessions that its VMM is dead.
    pub(super) fn tell_sessions_of_end(&self, machine: &Machine) {
        for outgoing in self.outgoing.borrow().values().filter(|o| o.machine == machine.id()) {
            let _session_ended = outgoing.session.try_send(SourceInput::Event(SourceEvent::GuestEnded));
        }
        for incoming in self.incoming.borrow().values().filter(|i| i.machine == machine.id()) {
            let _session_ended = incoming.session.try_send(Outside::Event(TargetEvent::GuestEnded));
        }
    }
}

fn parse_addresses(texts: &[String]) -> Result<Vec<SocketAddr>, Refusal> {
    let bad =
        |text: &String| Refusal::new(RefusalCode::Protocol, format!("`{text}` is no address of a shard"));
    let parsed: Result<Vec<SocketAddr>, _> = texts.iter().map(|t| t.parse().map_err(|_| bad(t))).collect();
    let addresses = parsed?;
    if addresses.is_empty() {
        return Err(Refusal::new(RefusalCode::Protocol, "the target named no address"));
    }
    Ok(addresses)
}

fn not_begun(migration: MigrationId, machine: &Machine) -> wire::fleet::Progress {
    wire::fleet::Progress {
        migration,
        phase: wire::fleet::MigrationPhase::Connecting,
        round: 0,
        ram_bytes: machine.spec().ram.bytes(),
        sent_bytes: 0,
        remaining_bytes: machine.spec().ram.bytes(),
        dirty_pages_per_s: 0,
        bytes_per_s: 0,
        predicted_downtime_us: 0,
        eta_ms: 0,
        elapsed_ms: 0,
    }
}
