//! What one fake host knows, and how it answers commands.

use std::collections::{BTreeMap, VecDeque};

use wire::fleet::{
    Answer, ForwardAddress, FromHost, HostPhase, MigrationPhase, MigrationStanding, Outcome, Progress,
    RefusalCode,
};
use wire::ids::{Epoch, HostName, MachineId, MigrationId, StateId};
use wire::vmm::{GuestEnd, MachineSpec};

use super::Step;

#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) spec: MachineSpec,
    pub(super) epoch: Epoch,
    pub(super) phase: HostPhase,
    pub(super) console: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(super) struct Outgoing {
    pub(super) machine: MachineId,
    pub(super) epoch: Epoch,
    pub(super) target: HostName,
    pub(super) step: Step,
    pub(super) outcome: Option<Outcome>,
}

#[derive(Debug, Default)]
pub(super) struct Host {
    pub(super) ram_bytes: u64,
    pub(super) machines: BTreeMap<MachineId, Machine>,
    pub(super) outgoing: BTreeMap<MigrationId, Outgoing>,
    /// Migrations expected or received: machine and epoch.
    pub(super) incoming: BTreeMap<MigrationId, (MachineId, Epoch)>,
    pub(super) fences: BTreeMap<MachineId, Epoch>,
    /// How often it has lost all that it knew.
    pub(super) losses: u64,
    pub(super) refuse: VecDeque<(RefusalCode, String)>,
    pub(super) outbox: VecDeque<FromHost>,
}

impl Host {
    pub(super) fn set_phase(&mut self, machine: MachineId, phase: HostPhase) {
        if let Some(machine) = self.machines.get_mut(&machine) {
            machine.phase = phase;
        }
    }

    pub(super) fn refusal(&mut self) -> Option<Answer> {
        self.refuse.pop_front().map(|(code, detail)| Answer::Refused { code, detail })
    }

    pub(super) fn launch(&mut self, spec: MachineSpec, epoch: Epoch) -> Answer {
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
    pub(super) fn power_button(&mut self, id: MachineId) -> Answer {
        let Some(machine) = self.machines.get_mut(&id) else { return Answer::Unknown };
        machine.phase = HostPhase::Ended;
        let epoch = machine.epoch;
        self.outbox.push_back(FromHost::GuestEnded { machine: id, epoch, end: GuestEnd::PowerOff });
        Answer::Done
    }

    pub(super) fn destroy(&mut self, machine: MachineId, epoch: Epoch) -> Answer {
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

    pub(super) fn prepare(&mut self, migration: MigrationId, spec: MachineSpec, epoch: Epoch) -> Answer {
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

    pub(super) fn migrate(
        &mut self,
        id: MigrationId,
        machine: MachineId,
        epoch: Epoch,
        target: HostName,
    ) -> Answer {
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

    pub(super) fn forget(&mut self, id: MigrationId) -> Answer {
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

    pub(super) fn fence(&mut self, machine: MachineId, epoch: Epoch, state: Option<StateId>) -> Answer {
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

    pub(super) fn reclaim(&mut self, machine: MachineId, epoch: Epoch) -> Answer {
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

    pub(super) fn inquire(&self, id: MigrationId) -> Answer {
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

    pub(super) fn read_console(&self, machine: MachineId, offset: u64, bytes_max: u32) -> Answer {
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

    pub(super) fn progress(&self, id: MigrationId) -> Option<Progress> {
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

pub(super) const fn runs(phase: HostPhase) -> bool {
    matches!(phase, HostPhase::Running | HostPhase::MigratingOut | HostPhase::Paused)
}
