//! All fake hosts together: machines, migrations between them, and faults.
//!
//! A migration goes through its steps one [`World::step`] at a time, so that a test can stop it anywhere. The rules are those of
//! the real thing: the source gives the machine away before the target may run it, a fence is kept for ever, and what a host says of
//! itself is true.

mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wire::fleet::{
    Answer, Capacity, Command, FromHost, HostPhase, MachineReport, Outcome, RefusalCode, Timings,
};
use wire::ids::{Epoch, HostName, MachineId, MigrationId};
use wire::vmm::GuestEnd;

use host::{Host, Machine, Outgoing, runs};

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
