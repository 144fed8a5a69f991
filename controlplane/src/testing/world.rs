//! All fake hosts together: machines, migrations between them, and faults.
//!
//! A migration goes through its steps one [`World::step`] at a time, so that a test can stop it anywhere. The rules are those of
//! the real thing: the source gives the machine away before the target may run it, a fence is kept for ever, and what a host says of
//! itself is true.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wire::fleet::{
    Answer, Capacity, Command, ForwardAddress, FromHost, HostPhase, MachineReport, MigrationPhase,
    MigrationStanding, Outcome, Progress, RefusalCode, Timings,
};
use wire::ids::{Epoch, HostName, MachineId, MigrationId, StateId};
use wire::vmm::{GuestEnd, MachineSpec};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Commit never reaches the target.
    LoseCommit,
    /// Commit arrives; the target's answer does not.
    LoseRunning,
    /// Migrations do not get beyond pre-copy.
    HoldInPrecopy,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Told to move.
    Begun,
    /// Copying.
    Precopy,
    /// The guest is paused.
    Switchover,
    /// Given away; Commit is on its way.
    Committed,
    /// It runs on the target, and the source knows.
    Ended,
}

#[derive(Debug, Clone)]
struct Machine {
    spec: MachineSpec,
    epoch: Epoch,
    phase: HostPhase,
    console: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Outgoing {
    machine: MachineId,
    epoch: Epoch,
    target: HostName,
    step: Step,
    outcome: Option<Outcome>,
}

#[derive(Debug, Default)]
struct Host {
    ram_bytes: u64,
    machines: BTreeMap<MachineId, Machine>,
    outgoing: BTreeMap<MigrationId, Outgoing>,
    /// Migrations expected or received: machine and epoch.
    incoming: BTreeMap<MigrationId, (MachineId, Epoch)>,
    fences: BTreeMap<MachineId, Epoch>,
    /// How often it has lost all that it knew.
    losses: u64,
    refuse: VecDeque<(RefusalCode, String)>,
    outbox: VecDeque<FromHost>,
}

#[derive(Debug, Default)]
struct Inner {
    hosts: BTreeMap<HostName, Host>,
    faults: BTreeSet<Fault>,
    violations: Vec<String>,
}

/// All fake hosts. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct World(Arc<Mutex<Inner>>);

/// Physical CPUs of a fake host.
const CPUS: u32 = 4;

impl World {
    /// A world with these hosts, each with `ram_bytes`.
    pub fn new(hosts: &[HostName], ram_bytes: u64) -> Self {
        let world = Self::default();
        for name in hosts {
            world.lock().hosts.insert(name.clone(), Host { ram_bytes, ..Host::default() });
        }
        world
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked has said why already.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns a fault on or off.
    pub fn fault(&self, fault: Fault, on: bool) {
        let mut inner = self.lock();
        if on {
            inner.faults.insert(fault);
        } else {
            inner.faults.remove(&fault);
        }
    }

    /// Makes a host refuse the next `Launch` or `Prepare`.
    pub fn refuse_next(&self, host: &HostName, code: RefusalCode, detail: &str) {
        if let Some(host) = self.lock().hosts.get_mut(host) {
            host.refuse.push_back((code, detail.to_owned()));
        }
    }

    /// The host loses its memory and its state, as in a power cut.
    pub fn lose_power(&self, name: &HostName) {
        if let Some(host) = self.lock().hosts.get_mut(name) {
            let (ram_bytes, losses) = (host.ram_bytes, host.losses + 1);
            *host = Host { ram_bytes, losses, ..Host::default() };
        }
    }

    /// Ends a guest from within.
    pub fn end_guest(&self, machine: MachineId, end: GuestEnd) {
        for host in self.lock().hosts.values_mut() {
            if let Some(found) = host.machines.get_mut(&machine)
                && runs(found.phase)
            {
                found.phase = HostPhase::Ended;
                let epoch = found.epoch;
                host.outbox.push_back(FromHost::GuestEnded { machine, epoch, end: end.clone() });
            }
        }
    }

    /// The guest writes to its console, wherever it runs.
    pub fn write_console(&self, machine: MachineId, text: &str) {
        for host in self.lock().hosts.values_mut() {
            if let Some(found) = host.machines.get_mut(&machine)
                && runs(found.phase)
            {
                found.console.extend_from_slice(text.as_bytes());
            }
        }
    }

    /// Puts a running copy on a host behind the control plane's back.
    pub fn plant(&self, host: &HostName, from: &HostName, machine: MachineId, epoch: Epoch) {
        let mut inner = self.lock();
        let found = inner.hosts.get(from).and_then(|host| host.machines.get(&machine)).cloned();
        if let (Some(mut copy), Some(host)) = (found, inner.hosts.get_mut(host)) {
            copy.epoch = epoch;
            copy.phase = HostPhase::Running;
            host.machines.insert(machine, copy);
        }
    }

    /// Where copies of the machine run, and under which epoch.
    pub fn running(&self, machine: MachineId) -> Vec<(HostName, Epoch)> {
        let inner = self.lock();
        let on = |(name, host): (&HostName, &Host)| {
            let found = host.machines.get(&machine).filter(|found| runs(found.phase))?;
            Some((name.clone(), found.epoch))
        };
        inner.hosts.iter().filter_map(on).collect()
    }

    /// Hosts that have anything of the machine.
    pub fn traces(&self, machine: MachineId) -> Vec<HostName> {
        let inner = self.lock();
        let has = |host: &&HostName| {
            inner.hosts.get(*host).is_some_and(|host| {
                let live = |(id, _): &(MachineId, Epoch)| *id == machine;
                host.machines.contains_key(&machine) || host.incoming.values().any(live)
            })
        };
        inner.hosts.keys().filter(has).cloned().collect()
    }

    /// Broken rules seen so far; empty in a healthy world.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// What the host has to say unasked.
    pub fn take_notices(&self, host: &HostName) -> Vec<FromHost> {
        self.lock().hosts.get_mut(host).map(|host| host.outbox.drain(..).collect()).unwrap_or_default()
    }

    /// The host's heartbeat.
    pub fn heartbeat(&self, host: &HostName) -> FromHost {
        let inner = self.lock();
        let Some(host) = inner.hosts.get(host) else {
            return FromHost::Heartbeat { capacity: capacity(0, 0, 0), machines: Vec::new() };
        };
        let used: u64 = host.machines.values().map(|machine| machine.spec.ram.bytes()).sum();
        let vcpus = host.machines.values().map(|machine| machine.spec.vcpus).sum();
        let report = |machine: &Machine| MachineReport {
            machine: machine.spec.id,
            epoch: machine.epoch,
            phase: machine.phase,
            vmm_pid: 1,
            running_ms: 0,
        };
        FromHost::Heartbeat {
            capacity: capacity(host.ram_bytes, used, vcpus),
            machines: host.machines.values().map(report).collect(),
        }
    }

    /// Carries out a command as the host would.
    pub fn command(&self, host: &HostName, command: Command) -> Answer {
        let mut inner = self.lock();
        let answer = inner.command(host, command);
        inner.check();
        answer
    }

    /// Moves every migration on by one step. Notices end up in the sources' outboxes.
    pub fn step(&self) {
        let mut inner = self.lock();
        let moving: Vec<(HostName, MigrationId)> = inner
            .hosts
            .iter()
            .flat_map(|(name, host)| {
                let open = host.outgoing.iter().filter(|(_, outgoing)| outgoing.outcome.is_none());
                open.map(|(id, _)| (name.clone(), *id)).collect::<Vec<_>>()
            })
            .collect();
        for (source, id) in moving {
            inner.step(&source, id);
            inner.check();
        }
    }
}

const fn runs(phase: HostPhase) -> bool {
    matches!(phase, HostPhase::Running | HostPhase::MigratingOut | HostPhase::Paused)
}

fn capacity(ram_bytes: u64, used: u64, vcpus_used: u32) -> Capacity {
    Capacity {
        ram_bytes,
        ram_free_bytes: ram_bytes.saturating_sub(used),
        cpus: CPUS,
        vcpus_used,
        cpu_features: vec!["sse2".to_owned(), "sse4_2".to_owned()],
        tsc_khz: 2_000_000,
    }
}

impl Inner {
    fn check(&mut self) {
        let mut running: BTreeMap<MachineId, Vec<HostName>> = BTreeMap::new();
        for (name, host) in &self.hosts {
            for (id, machine) in &host.machines {
                if runs(machine.phase) {
                    running.entry(*id).or_default().push(name.clone());
                }
            }
        }
        for (id, hosts) in running {
            if hosts.len() > 1 {
                self.violations.push(format!("{id} runs on {hosts:?}"));
            }
        }
    }

    fn command(&mut self, name: &HostName, command: Command) -> Answer {
        let Some(host) = self.hosts.get_mut(name) else { return Answer::Unknown };
        match command {
            Command::Launch { spec, epoch, .. } => host.launch(spec, epoch),
            Command::Destroy { machine, epoch, .. } => host.destroy(machine, epoch),
            Command::Prepare { migration, spec, epoch, source: _ } => host.prepare(migration, spec, epoch),
            Command::Migrate { migration, machine, epoch, target, .. } => {
                host.migrate(migration, machine, epoch, target)
            }
            Command::PowerButton { machine } => host.power_button(machine),
            Command::Cancel { migration } => self.cancel(name, migration),
            Command::Forget { migration } => host.forget(migration),
            Command::Fence { machine, epoch, state } => host.fence(machine, epoch, state),
            Command::Reclaim { machine, epoch } => host.reclaim(machine, epoch),
            Command::Inquire { migration } => host.inquire(migration),
            Command::ReadConsole { machine, offset, bytes_max } => {
                host.read_console(machine, offset, bytes_max)
            }
        }
    }

    fn cancel(&mut self, name: &HostName, id: MigrationId) -> Answer {
        let Some(outgoing) = self.hosts.get_mut(name).and_then(|host| host.outgoing.get_mut(&id)) else {
            return Answer::Unknown;
        };
        if outgoing.step >= Step::Committed {
            return Answer::Refused { code: RefusalCode::Committed, detail: "Commit has left".to_owned() };
        }
        if outgoing.outcome.is_none() {
            outgoing.outcome = Some(Outcome::Cancelled);
            let machine = outgoing.machine;
            if let Some(host) = self.hosts.get_mut(name) {
                host.set_phase(machine, HostPhase::Running);
                host.outbox.push_back(FromHost::Ended { migration: id, outcome: Outcome::Cancelled });
            }
        }
        Answer::Done
    }

    fn step(&mut self, source: &HostName, id: MigrationId) {
        let Some(outgoing) = self.hosts.get(source).and_then(|host| host.outgoing.get(&id)).cloned() else {
            return;
        };
        let machine = outgoing.machine;
        let (step, phase) = match outgoing.step {
            Step::Begun => (Step::Precopy, HostPhase::MigratingOut),
            Step::Precopy if self.faults.contains(&Fault::HoldInPrecopy) => return,
            Step::Precopy => (Step::Switchover, HostPhase::Paused),
            Step::Switchover => (Step::Committed, HostPhase::GivenAway),
            Step::Committed | Step::Ended => return self.arrive(source, id, &outgoing),
        };
        let Some(host) = self.hosts.get_mut(source) else { return };
        host.set_phase(machine, phase);
        if let Some(outgoing) = host.outgoing.get_mut(&id) {
            outgoing.step = step;
        }
        let progress = host.progress(id);
        host.outbox.extend(progress.map(FromHost::Progress));
        // The target holds a copy from the first page on.
        if step == Step::Precopy {
            let spec = host.machines.get(&machine).cloned();
            if let (Some(mut copy), Some(target)) = (spec, self.hosts.get_mut(&outgoing.target))
                && target.incoming.contains_key(&id)
            {
                copy.phase = HostPhase::Incoming;
                copy.epoch = outgoing.epoch;
                target.machines.insert(machine, copy);
            }
        }
    }

    /// Commit reaches the target, and its answer the source, unless a fault says otherwise.
    fn arrive(&mut self, source: &HostName, id: MigrationId, outgoing: &Outgoing) {
        if self.faults.contains(&Fault::LoseCommit) {
            return;
        }
        let console = self
            .hosts
            .get(source)
            .and_then(|host| host.machines.get(&outgoing.machine))
            .map(|machine| machine.console.clone());
        let Some(target) = self.hosts.get_mut(&outgoing.target) else { return };
        let fenced = target.fences.get(&outgoing.machine).is_some_and(|fence| *fence >= outgoing.epoch);
        let Some(copy) = target.machines.get_mut(&outgoing.machine) else { return };
        let mine = copy.epoch == outgoing.epoch;
        if fenced || !mine {
            return;
        }
        if copy.phase == HostPhase::Incoming {
            copy.phase = HostPhase::Running;
            copy.console = console.unwrap_or_default();
        }
        if self.faults.contains(&Fault::LoseRunning) {
            return;
        }
        let outcome =
            Outcome::Succeeded(Timings { total_ms: 12, rounds: 2, pause_us: 3400, ..Timings::default() });
        if let Some(host) = self.hosts.get_mut(source) {
            if let Some(outgoing) = host.outgoing.get_mut(&id) {
                outgoing.step = Step::Ended;
                outgoing.outcome = Some(outcome.clone());
            }
            host.outbox.push_back(FromHost::Ended { migration: id, outcome });
        }
    }
}

impl Host {
    fn set_phase(&mut self, machine: MachineId, phase: HostPhase) {
        if let Some(machine) = self.machines.get_mut(&machine) {
            machine.phase = phase;
        }
    }

    fn refusal(&mut self) -> Option<Answer> {
        self.refuse.pop_front().map(|(code, detail)| Answer::Refused { code, detail })
    }

    fn launch(&mut self, spec: MachineSpec, epoch: Epoch) -> Answer {
        if let Some(found) = self.machines.get(&spec.id) {
            return if found.epoch == epoch && runs(found.phase) {
                Answer::Done
            } else {
                refused(RefusalCode::WrongState, "there is an old copy here")
            };
        }
        if let Some(refusal) = self.refusal() {
            return refusal;
        }
        let console = format!("boot under {epoch}\n").into_bytes();
        self.machines.insert(spec.id, Machine { spec, epoch, phase: HostPhase::Running, console });
        Answer::Done
    }

    /// Its guest listens to the button, and ends.
    fn power_button(&mut self, id: MachineId) -> Answer {
        let Some(machine) = self.machines.get_mut(&id) else { return Answer::Unknown };
        machine.phase = HostPhase::Ended;
        let epoch = machine.epoch;
        self.outbox.push_back(FromHost::GuestEnded { machine: id, epoch, end: GuestEnd::PowerOff });
        Answer::Done
    }

    fn destroy(&mut self, machine: MachineId, epoch: Epoch) -> Answer {
        match self.machines.get(&machine) {
            Some(found) if runs(found.phase) && found.epoch > epoch => {
                refused(RefusalCode::Stale, "it runs here under a higher epoch")
            }
            Some(_) => {
                self.machines.remove(&machine);
                self.incoming.retain(|_, (id, at)| *id != machine || *at > epoch);
                self.outgoing.retain(|_, outgoing| outgoing.machine != machine);
                Answer::Done
            }
            None => Answer::Done,
        }
    }

    fn prepare(&mut self, migration: MigrationId, spec: MachineSpec, epoch: Epoch) -> Answer {
        if let Some(refusal) = self.refusal() {
            return refusal;
        }
        if self.machines.get(&spec.id).is_some_and(|found| found.phase != HostPhase::Incoming) {
            return refused(RefusalCode::SameHost, "there is a copy here");
        }
        self.incoming.insert(migration, (spec.id, epoch));
        Answer::Prepared {
            addresses: vec!["198.18.0.9:7000".to_owned()],
            forward_to: ForwardAddress { ip4: [198, 18, 0, 9], ip6: [0; 16] },
            state: StateId::from_u64(self.losses),
        }
    }

    fn migrate(&mut self, id: MigrationId, machine: MachineId, epoch: Epoch, target: HostName) -> Answer {
        if self.outgoing.contains_key(&id) {
            return Answer::Done;
        }
        match self.machines.get(&machine) {
            Some(found) if found.phase == HostPhase::Running => {
                let outgoing = Outgoing { machine, epoch, target, step: Step::Begun, outcome: None };
                self.outgoing.insert(id, outgoing);
                Answer::Done
            }
            Some(_) => refused(RefusalCode::WrongState, "it does not run here"),
            None => Answer::Unknown,
        }
    }

    fn forget(&mut self, id: MigrationId) -> Answer {
        let Some((machine, epoch)) = self.incoming.get(&id).copied() else { return Answer::Done };
        let found = self.machines.get(&machine).filter(|found| found.epoch == epoch).map(|found| found.phase);
        match found {
            Some(phase) if runs(phase) => refused(RefusalCode::Committed, "it runs here"),
            Some(HostPhase::Incoming) => {
                self.machines.remove(&machine);
                self.incoming.remove(&id);
                Answer::Done
            }
            _ => {
                self.incoming.remove(&id);
                Answer::Done
            }
        }
    }

    fn fence(&mut self, machine: MachineId, epoch: Epoch, state: Option<StateId>) -> Answer {
        if state.is_some_and(|state| state.as_u64() != self.losses) && !self.machines.contains_key(&machine) {
            return Answer::Owns { epoch };
        }
        if let Some(found) = self.machines.get(&machine)
            && found.epoch == epoch
        {
            if runs(found.phase) {
                return Answer::Owns { epoch };
            }
            self.machines.remove(&machine);
        }
        let fence = self.fences.entry(machine).or_insert(epoch);
        *fence = (*fence).max(epoch);
        self.incoming.retain(|_, entry| *entry != (machine, epoch));
        Answer::Done
    }

    fn reclaim(&mut self, machine: MachineId, epoch: Epoch) -> Answer {
        match self.machines.get_mut(&machine) {
            Some(found) if found.epoch < epoch => {
                found.epoch = epoch;
                found.phase = HostPhase::Running;
                self.outgoing.retain(|_, outgoing| outgoing.machine != machine);
                Answer::Done
            }
            Some(found) if found.epoch == epoch && runs(found.phase) => Answer::Done,
            Some(_) => refused(RefusalCode::Stale, "a higher epoch is here"),
            None => Answer::Unknown,
        }
    }

    fn inquire(&self, id: MigrationId) -> Answer {
        if let Some(outgoing) = self.outgoing.get(&id) {
            if let Some(outcome) = &outgoing.outcome {
                return Answer::Migration(MigrationStanding::Ended(outcome.clone()));
            }
            if outgoing.step == Step::Committed {
                return Answer::Migration(MigrationStanding::InDoubt);
            }
            return match self.progress(id) {
                Some(progress) => Answer::Migration(MigrationStanding::Moving(progress)),
                None => Answer::Unknown,
            };
        }
        let Some((machine, epoch)) = self.incoming.get(&id) else { return Answer::Unknown };
        match self.machines.get(machine).filter(|found| found.epoch == *epoch) {
            Some(found) if runs(found.phase) => Answer::Migration(MigrationStanding::Owns { epoch: *epoch }),
            Some(_) => Answer::Migration(MigrationStanding::Ready),
            None => Answer::Migration(MigrationStanding::Receiving),
        }
    }

    fn read_console(&self, machine: MachineId, offset: u64, bytes_max: u32) -> Answer {
        let Some(found) = self.machines.get(&machine) else { return Answer::Unknown };
        let length = found.console.len();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(length);
        let until = from.saturating_add(usize::try_from(bytes_max).unwrap_or(usize::MAX)).min(length);
        Answer::Console {
            offset: u64::try_from(from).unwrap_or(u64::MAX),
            bytes: found.console[from..until].to_vec(),
            live: runs(found.phase),
        }
    }

    fn progress(&self, id: MigrationId) -> Option<Progress> {
        let outgoing = self.outgoing.get(&id)?;
        let (phase, done) = match outgoing.step {
            Step::Begun => (MigrationPhase::Connecting, 0),
            Step::Precopy => (MigrationPhase::Precopy, 50),
            Step::Switchover => (MigrationPhase::Switchover, 99),
            Step::Committed => (MigrationPhase::InDoubt, 100),
            Step::Ended => (MigrationPhase::Completing, 100),
        };
        let ram_bytes = self.machines.get(&outgoing.machine)?.spec.ram.bytes();
        Some(Progress {
            migration: id,
            phase,
            round: 1,
            ram_bytes,
            sent_bytes: ram_bytes / 100 * done,
            remaining_bytes: ram_bytes - ram_bytes / 100 * done,
            dirty_pages_per_s: 1000,
            bytes_per_s: 1 << 30,
            predicted_downtime_us: 4000,
            eta_ms: 20,
            elapsed_ms: 10,
        })
    }
}

fn refused(code: RefusalCode, detail: &str) -> Answer {
    Answer::Refused { code, detail: detail.to_owned() }
}
