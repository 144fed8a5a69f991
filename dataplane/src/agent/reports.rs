//! What shards report, and what follows from it.

use std::rc::Rc;

use wire::fleet::{FromHost, HostPhase, MigrationPhase, MigrationStanding, Outcome};
use wire::ids::{MachineId, MigrationId};
use wire::migration::target::TargetOutcome;
use wire::vmm::Notice;

use super::Host;
use super::machine::Machine;
use crate::shard::{ShardReport, SourceReport, TargetReport};
use crate::vm::client::VmmEvent;

impl Host {
    pub(super) fn take_report(self: &Rc<Self>, report: ShardReport) {
        match report {
            ShardReport::Vmm { machine, pid, event } => self.vmm_event(machine, pid, event),
            ShardReport::Source { migration, report } => self.source_report(migration, report),
            ShardReport::Target { migration, report } => self.target_report(migration, report),
            ShardReport::Work { machine, work, done } => {
                let host = self.clone();
                tokio::task::spawn_local(async move {
                    let outcome = match host.machine(machine) {
                        Some(machine) => host.do_work(&machine, work).await,
                        None => Err(format!("{machine} is gone")),
                    };
                    if let Err(error) = &outcome {
                        tracing::warn!(%machine, ?work, error, "work for a migration failed");
                    }
                    done(outcome);
                });
            }
        }
    }

    fn vmm_event(self: &Rc<Self>, id: MachineId, pid: u32, event: VmmEvent) {
        // A VMM that was replaced or taken leave of has nothing to say any more.
        let current = |m: &Rc<Machine>| m.vm().is_some_and(|vm| vm.process.pid() == pid);
        let Some(machine) = self.machine(id).filter(current) else { return };
        match event {
            VmmEvent::Notice(Notice::GuestEnded(end)) => self.guest_ended(&machine, end),
            VmmEvent::Gone => {
                let host = self.clone();
                tokio::task::spawn_local(async move { host.bury(machine).await });
            }
        }
    }

    fn source_report(self: &Rc<Self>, migration: MigrationId, report: SourceReport) {
        let Some(outgoing) = self.outgoing.borrow().get(&migration).cloned() else { return };
        let Some(machine) = self.machine(outgoing.machine) else { return };
        outgoing.news.replace(Some(report.clone()));
        match report {
            SourceReport::Progress(progress) => {
                let paused = progress.phase == MigrationPhase::Switchover;
                if matches!(machine.phase(), HostPhase::MigratingOut | HostPhase::Paused) {
                    machine.set_phase(if paused { HostPhase::Paused } else { HostPhase::MigratingOut });
                }
                if progress.phase != MigrationPhase::InDoubt && machine.phase() != HostPhase::GivenAway {
                    outgoing.standing.replace(MigrationStanding::Moving(progress.clone()));
                }
                self.say(FromHost::Progress(progress));
            }
            SourceReport::GivenAway => {
                machine.set_phase(HostPhase::GivenAway);
                outgoing.standing.replace(MigrationStanding::InDoubt);
                self.note_change();
            }
            SourceReport::Reclaimed(epoch) => {
                machine.set_epoch(epoch);
                machine.set_phase(HostPhase::Running);
                self.note_change();
            }
            SourceReport::CancelRefused | SourceReport::ReclaimRefused(_) => {}
            SourceReport::Ended(mut outcome) => {
                match &mut outcome {
                    Outcome::Succeeded(timings) => timings.packets_held = outgoing.held.get(),
                    Outcome::Failed { .. } | Outcome::Cancelled => {
                        if matches!(machine.phase(), HostPhase::MigratingOut | HostPhase::Paused) {
                            machine.set_phase(HostPhase::Running);
                        }
                    }
                }
                outgoing.standing.replace(MigrationStanding::Ended(outcome.clone()));
                self.say(FromHost::Ended { migration, outcome });
                self.note_change();
            }
        }
        outgoing.changed.notify_waiters();
    }

    fn target_report(self: &Rc<Self>, migration: MigrationId, report: TargetReport) {
        let Some(incoming) = self.incoming.borrow().get(&migration).cloned() else { return };
        incoming.news.replace(Some(report.clone()));
        match report {
            TargetReport::Ready => drop(incoming.standing.replace(MigrationStanding::Ready)),
            TargetReport::Ended(TargetOutcome::Owned { epoch }) => {
                incoming.standing.replace(MigrationStanding::Owns { epoch });
                if let Some(machine) = self.machine(incoming.machine) {
                    machine.set_epoch(epoch);
                    machine.set_phase(HostPhase::Running);
                    self.own_disks(machine.spec());
                    self.arrive(machine);
                }
                self.note_change();
            }
            TargetReport::Ended(TargetOutcome::Dropped { code, detail }) => {
                tracing::info!(%migration, ?code, detail, "an incoming machine was dropped");
                self.forget_incoming(migration);
                self.note_change();
            }
            TargetReport::ForgetRefused
            | TargetReport::Forgotten
            | TargetReport::Fenced(_)
            | TargetReport::Owns(_) => {}
        }
        incoming.changed.notify_waiters();
    }

    /// A machine runs here now: answer for it and say so to the fabric.
    fn arrive(self: &Rc<Self>, machine: Rc<Machine>) {
        let host = self.clone();
        tokio::task::spawn_local(async move {
            let _order = machine.net_turn.lock().await;
            if let Err(error) = host.net.answer_for(&machine.addresses()).await {
                tracing::warn!(machine = %machine.id(), error = format!("{error:#}"), "cannot answer for a machine");
            }
            host.announce(machine.addresses());
        });
    }
}
