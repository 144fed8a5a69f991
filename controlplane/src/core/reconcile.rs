//! Heartbeats against the records: what a host has, and what it should have.
//!
//! The record of a machine's owner is never changed because of what a lower epoch claims. A host that reports
//!
//! * a machine placed on it: fine;
//! * not a machine placed on it, twice in a row: the machine is lost with the host's memory, `failed`, and can be started again;
//! * a copy that is not its own under an epoch that was given out: told to destroy it, if nothing under way explains the copy;
//! * a higher epoch than was ever given out: the records are older than the fleet (restored from a backup). The epoch is taken over, and so is the
//!   owner, since only the control plane gives out epochs and the highest one wins;
//! * a machine that is not on record: left alone, with an event. Its records may exist elsewhere.

use wire::fleet::{Capacity, HostPhase, MachineReport};
use wire::ids::{HostName, MachineId};
use wire::vmm::GuestEnd;

use super::Core;
use crate::api::EventKind;
use crate::saga::State;
use crate::store::records::{Cleanup, Lifecycle};

/// Heartbeats in a row without a machine before it counts as lost: one may have been put together before the machine came.
const MISSING_MAX: u32 = 2;

/// Foreign machines that are told about: a host that makes them up gets no further.
const FOREIGN_MAX: usize = 10_000;

impl Core {
    pub(super) fn heartbeat(&mut self, host: &HostName, capacity: Capacity, machines: Vec<MachineReport>) {
        let Some(runtime) = self.hosts.get_mut(host) else { return };
        runtime.capacity = Some(capacity);
        runtime.machines = machines.iter().map(|report| (report.machine, report.clone())).collect();
        for report in &machines {
            self.reported(host, report);
        }
        self.look_for_missing(host);
    }

    fn reported(&mut self, host: &HostName, report: &MachineReport) {
        let id = report.machine;
        let Some(record) = self.model.machine(id) else {
            let room = self.foreign_seen.len() < FOREIGN_MAX;
            if room && self.foreign_seen.insert((host.clone(), id)) {
                let message =
                    format!("host {host} has machine {id}, which is not on record; it is left alone");
                self.machine_event(id, EventKind::MachineForeign, message);
            }
            return;
        };
        if report.epoch > record.epoch_burnt {
            self.epoch_ahead(host, report);
            return;
        }
        if record.host.as_ref() == Some(host) {
            let ended = report.phase == HostPhase::Ended && record.lifecycle == Lifecycle::Started;
            if ended && record.migration.is_none() && report.epoch == record.epoch {
                // The host says how with the same Hello; if that was lost, the fact remains.
                self.guest_ended(host, id, report.epoch, &GuestEnd::PowerOff);
            }
            return;
        }
        let cleaning = record.cleanups.iter().any(|cleanup| cleanup.host == *host);
        let migration = record.migration.and_then(|migration| self.model.migration(migration));
        let arriving = migration.is_some_and(|migration| migration.target == *host);
        let forgetting =
            self.model.migrations().any(|m| m.machine == id && m.forget_target && m.target == *host);
        if cleaning || arriving || forgetting {
            return;
        }
        let epoch = report.epoch;
        if let Some(record) = self.model.machine_mut(id) {
            record.cleanups.push(Cleanup { host: host.clone(), epoch, forwarding: false });
        }
        let message = format!(
            "host {host} has a copy under epoch {epoch} that is not its own to run; it is told to drop it"
        );
        self.machine_event(id, EventKind::MachineStray, message);
    }

    /// The fleet knows a later epoch than the records do.
    fn epoch_ahead(&mut self, host: &HostName, report: &MachineReport) {
        let id = report.machine;
        let runs = matches!(report.phase, HostPhase::Running | HostPhase::MigratingOut | HostPhase::Paused);
        let Some(record) = self.model.machine_mut(id) else { return };
        record.epoch_burnt = report.epoch;
        let old = record.host.clone().filter(|old| old != host);
        let adopt = runs
            && record.migration.is_none()
            && matches!(record.lifecycle, Lifecycle::Started | Lifecycle::Stopped | Lifecycle::Failed);
        if adopt {
            if let Some(old) = old {
                let epoch = record.epoch;
                record.cleanups.push(Cleanup { host: old, epoch, forwarding: false });
            }
            record.cleanups.retain(|cleanup| cleanup.host != *host);
            record.host = Some(host.clone());
            record.epoch = report.epoch;
            record.lifecycle = Lifecycle::Started;
            record.reason = None;
        }
        let message =
            format!("host {host} reports {}, which is above every epoch on record; it counts", report.epoch);
        self.machine_event(id, EventKind::MachineEpochAhead, message);
    }

    /// Machines that should be here and are not.
    fn look_for_missing(&mut self, host: &HostName) {
        let Some(runtime) = self.hosts.get(host) else { return };
        let missing: Vec<MachineId> = self
            .model
            .machines()
            .filter(|record| {
                record.host.as_ref() == Some(host)
                    && record.lifecycle == Lifecycle::Started
                    && !runtime.machines.contains_key(&record.id)
            })
            .map(|record| record.id)
            .collect();
        let Some(runtime) = self.hosts.get_mut(host) else { return };
        runtime.missing.retain(|id, _| missing.contains(id));
        let mut lost = Vec::new();
        for id in missing {
            let times = runtime.missing.entry(id).or_insert(0);
            *times += 1;
            if *times >= MISSING_MAX {
                lost.push(id);
            }
        }
        for id in lost {
            self.machine_missing(host, id);
        }
    }

    fn machine_missing(&mut self, host: &HostName, id: MachineId) {
        let migration = self.model.machine(id).and_then(|record| record.migration);
        match migration.and_then(|id| self.model.migration(id)).map(|migration| &migration.state) {
            None => self.fail_machine(id, "lost_with_host", format!("it was lost with host {host}")),
            // Fenced off the target and gone from the source: nobody has it.
            Some(
                State::Pending
                | State::Preparing
                | State::Moving { begun: false, .. }
                | State::Reclaiming { .. },
            ) => self.migrating_machine_gone(id),
            // It may have moved: the saga finds out.
            Some(_) => {}
        }
    }
}
