//! Commands to hosts, derived from the records.
//!
//! A record's state says which commands it calls for ([`Core::wants`]); they are sent when the host is connected and nothing else is
//! under way for the same machine or migration on that host, and sent again after a reconnect or a restart for as long as the
//! state calls for them. Nothing about a command is kept but the state that calls for it. A host never has more than
//! [`IN_FLIGHT_MAX`] unanswered commands.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::oneshot;
use wire::fleet::{Answer, Command, DiskStart, ToHost};
use wire::ids::{Epoch, HostName, MachineId, MigrationId};
use wire::vmm::FileRef;

use super::Core;
use super::model::Model;
use crate::saga::State;
use crate::store::Batch;
use crate::store::records::{DiskRecord, Ending, Lifecycle, MachineRecord, MigrationRecord};

/// Unanswered commands per host. Commands are answered within milliseconds to seconds; this many keep a host busy.
pub(super) const IN_FLIGHT_MAX: usize = 64;

/// What a command is for. Orders and identifies commands; the record behind it gives the rest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Purpose {
    Launch(MachineId),
    PowerButton(MachineId),
    SaveConsole(MachineId),
    Stop(MachineId),
    Cleanup(MachineId, HostName),
    Prepare(MigrationId),
    Migrate(MigrationId),
    Cancel(MigrationId),
    Forget(MigrationId),
    AskSource(MigrationId),
    AskTarget(MigrationId),
    Fence(MigrationId),
    Reclaim(MigrationId),
}

/// What a command concerns; one command at a time per subject and host, so that a host need not order them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    Machine(MachineId),
    Migration(MigrationId),
}

impl Purpose {
    fn subject(&self) -> Subject {
        match self {
            Self::Launch(id)
            | Self::PowerButton(id)
            | Self::SaveConsole(id)
            | Self::Stop(id)
            | Self::Cleanup(id, _) => Subject::Machine(*id),
            Self::Prepare(id)
            | Self::Migrate(id)
            | Self::Cancel(id)
            | Self::Forget(id)
            | Self::AskSource(id)
            | Self::AskTarget(id)
            | Self::Fence(id)
            | Self::Reclaim(id) => Subject::Migration(*id),
        }
    }
}

/// A command that has no answer yet.
#[derive(Debug)]
pub(super) enum InFlight {
    /// Called for by a record.
    Purpose(Purpose),
    /// Somebody waits for the answer; not repeated when the link breaks.
    Query(oneshot::Sender<Answer>),
}

impl InFlight {
    fn subject(&self) -> Option<Subject> {
        match self {
            Self::Purpose(purpose) => Some(purpose.subject()),
            Self::Query(_) => None,
        }
    }
}

/// Which records may call for commands, and which commands must wait.
#[derive(Debug)]
pub(super) struct Dispatch {
    generation: u32,
    sent: u32,
    machines: BTreeSet<MachineId>,
    migrations: BTreeSet<MigrationId>,
    /// Not before this monotonic time, in milliseconds.
    deferred: BTreeMap<Purpose, u64>,
}

impl Dispatch {
    pub(super) fn new(generation: u32, model: &Model) -> Self {
        Self {
            generation,
            sent: 0,
            machines: model.machines().map(|machine| machine.id).collect(),
            migrations: model.migrations().map(|migration| migration.id).collect(),
            deferred: BTreeMap::new(),
        }
    }

    /// Looks again at the records of a batch.
    pub(super) fn wake(&mut self, batch: &Batch) {
        self.machines.extend(batch.machines.iter().map(|(id, _)| *id));
        self.migrations.extend(batch.migrations.iter().map(|(id, _)| *id));
    }

    /// Holds a command back until `mono_ms`.
    pub(super) fn defer(&mut self, purpose: Purpose, mono_ms: u64) {
        self.deferred.insert(purpose, mono_ms);
    }

    /// Lets a command that was held back go.
    pub(super) fn expedite(&mut self, purpose: &Purpose) {
        self.deferred.remove(purpose);
    }

    /// A number never used before, also by earlier runs of the control plane.
    pub(super) fn number(&mut self) -> u64 {
        self.sent = self.sent.wrapping_add(1);
        (u64::from(self.generation) << 32) | u64::from(self.sent)
    }
}

/// A command that a record calls for.
pub(super) struct Want {
    pub(super) host: HostName,
    pub(super) purpose: Purpose,
    pub(super) command: Command,
}

impl Core {
    /// Sends whatever is called for and can be sent now.
    pub(super) fn send_commands(&mut self) {
        let now = self.now.mono_ms;
        self.dispatch.deferred.retain(|_, due| *due > now);
        let mut wants = Vec::new();
        let machines: Vec<_> = self.dispatch.machines.iter().copied().collect();
        for id in machines {
            let called_for = self.model.machine(id).map(machine_wants).unwrap_or_default();
            if called_for.is_empty() {
                self.dispatch.machines.remove(&id);
            }
            wants.extend(called_for);
        }
        let migrations: Vec<_> = self.dispatch.migrations.iter().copied().collect();
        for id in migrations {
            let called_for = self.model.migration(id).map(|m| self.migration_wants(m)).unwrap_or_default();
            if called_for.is_empty() && self.model.migration(id).is_none_or(|m| m.state.is_ended()) {
                self.dispatch.migrations.remove(&id);
            }
            wants.extend(called_for);
        }
        for want in wants {
            self.send(want);
        }
    }

    fn send(&mut self, want: Want) {
        if self.dispatch.deferred.contains_key(&want.purpose) {
            return;
        }
        let Some(link) = self.hosts.get_mut(&want.host).and_then(|host| host.link.as_mut()) else { return };
        let subject = Some(want.purpose.subject());
        let busy = link.in_flight.values().any(|other| other.subject() == subject);
        if busy || link.in_flight.len() >= IN_FLIGHT_MAX {
            return;
        }
        let op = self.dispatch.number();
        // A full or closed queue means that the link is ending; what it carried is sent again on the next one.
        if link.sender.try_send(ToHost::Command { op, command: want.command }).is_ok() {
            tracing::debug!(host = %want.host, op, purpose = ?want.purpose, "command sent");
            link.in_flight.insert(op, InFlight::Purpose(want.purpose));
        }
    }

    fn migration_wants(&self, migration: &MigrationRecord) -> Vec<Want> {
        let id = migration.id;
        let mut wants = Vec::new();
        let mut source = |purpose, command| {
            wants.push(Want { host: migration.source.clone(), purpose, command });
        };
        let ask = self.ask_source.contains(&id);
        match &migration.state {
            State::Moving { begun: false, .. } if !migration.cancel_requested => {
                if let Some(command) = migrate_command(migration) {
                    source(Purpose::Migrate(id), command);
                }
            }
            State::Moving { .. } if migration.cancel_requested => {
                source(Purpose::Cancel(id), Command::Cancel { migration: id });
            }
            State::Moving { .. } if ask => {
                source(Purpose::AskSource(id), Command::Inquire { migration: id });
            }
            State::InDoubt { .. } | State::Fencing => {
                source(Purpose::AskSource(id), Command::Inquire { migration: id });
            }
            State::Reclaiming { epoch } => {
                source(Purpose::Reclaim(id), Command::Reclaim { machine: migration.machine, epoch: *epoch });
            }
            State::Pending | State::Preparing | State::Moving { .. } | State::Ended { .. } => {}
        }
        if let Some((purpose, command)) = self.target_want(migration) {
            wants.push(Want { host: migration.target.clone(), purpose, command });
        }
        wants
    }

    fn target_want(&self, migration: &MigrationRecord) -> Option<(Purpose, Command)> {
        let id = migration.id;
        match &migration.state {
            State::Preparing => {
                let spec = self.model.machine(migration.machine).and_then(MachineRecord::spec)?;
                let command = Command::Prepare {
                    migration: id,
                    spec,
                    epoch: migration.to_epoch,
                    source: migration.source.clone(),
                };
                Some((Purpose::Prepare(id), command))
            }
            State::InDoubt { .. } => Some((Purpose::AskTarget(id), Command::Inquire { migration: id })),
            State::Fencing => Some((
                Purpose::Fence(id),
                Command::Fence {
                    machine: migration.machine,
                    epoch: migration.to_epoch,
                    state: migration.target_state,
                },
            )),
            State::Ended { .. } if migration.forget_target => {
                Some((Purpose::Forget(id), Command::Forget { migration: id }))
            }
            State::Pending | State::Moving { .. } | State::Reclaiming { .. } | State::Ended { .. } => None,
        }
    }
}

fn migrate_command(migration: &MigrationRecord) -> Option<Command> {
    let State::Moving { route, .. } = &migration.state else { return None };
    Some(Command::Migrate {
        migration: migration.id,
        machine: migration.machine,
        epoch: migration.to_epoch,
        target: migration.target.clone(),
        addresses: route.addresses.clone(),
        forward_to: wire::fleet::ForwardAddress {
            ip4: route.forward_ip4.octets(),
            ip6: route.forward_ip6.octets(),
        },
        downtime_budget_us: migration.downtime_budget_us,
        bandwidth_limit: migration.bandwidth_limit_bytes_per_s,
    })
}

fn machine_wants(machine: &MachineRecord) -> Vec<Want> {
    let id = machine.id;
    let mut wants = Vec::new();
    for cleanup in &machine.cleanups {
        let keep_disks =
            machine.lifecycle != Lifecycle::Gone && machine.disks_on.as_ref() == Some(&cleanup.host);
        wants.push(Want {
            host: cleanup.host.clone(),
            purpose: Purpose::Cleanup(id, cleanup.host.clone()),
            command: Command::Destroy { machine: id, epoch: cleanup.epoch, keep_disks },
        });
    }
    let Some(host) = &machine.host else { return wants };
    let (purpose, command) = match &machine.lifecycle {
        Lifecycle::Creating | Lifecycle::Starting => match machine.spec() {
            Some(spec) => {
                let disks = if machine.disks_on.is_some() { DiskStart::Kept } else { DiskStart::Fresh };
                (Purpose::Launch(id), Command::Launch { spec, epoch: machine.epoch, disks })
            }
            None => return wants,
        },
        Lifecycle::Stopping { console_saved: false, .. } => (
            Purpose::SaveConsole(id),
            Command::ReadConsole { machine: id, offset: 0, bytes_max: crate::api::LOG_BYTES_MAX },
        ),
        Lifecycle::Stopping { then, .. } => {
            let keep_disks = *then != Ending::Gone;
            (Purpose::Stop(id), Command::Destroy { machine: id, epoch: machine.epoch_burnt, keep_disks })
        }
        Lifecycle::Started if machine.button.is_some_and(|button| !button.pressed) => {
            (Purpose::PowerButton(id), Command::PowerButton { machine: id })
        }
        Lifecycle::Started | Lifecycle::Stopped | Lifecycle::Failed | Lifecycle::Gone => return wants,
    };
    wants.push(Want { host: host.clone(), purpose, command });
    wants
}

/// A file as the records name it: by its digest, or by a path on the host.
fn file_ref(text: &str) -> FileRef {
    text.parse().map_or_else(|_| FileRef::Path(text.to_owned()), FileRef::Blob)
}

impl MachineRecord {
    /// What hosts are told of the machine. `None` only for a record whose RAM size no machine can have, which is never kept.
    pub(super) fn spec(&self) -> Option<wire::vmm::MachineSpec> {
        Some(wire::vmm::MachineSpec {
            id: self.id,
            name: self.name.clone(),
            vcpus: self.vcpus,
            ram: wire::units::RamSize::from_bytes(self.ram_bytes).ok()?,
            mac: self.mac,
            ip4: self.ip4.octets(),
            ip6: self.ip6.octets(),
            boot: wire::vmm::BootSpec {
                kernel: file_ref(&self.boot.kernel),
                initrd: self.boot.initrd.as_deref().map(file_ref),
                cmdline: self.boot.cmdline.clone(),
                guest_config: self.guest_config(),
            },
            cpu: wire::vmm::CpuProfile {
                name: self.cpu.profile.clone(),
                features: self.cpu.features.clone(),
                tsc_khz: self.cpu.tsc_khz,
            },
            disks: self.disks.iter().map(DiskRecord::spec).collect::<Option<_>>()?,
        })
    }

    /// Gives out the next epoch.
    pub(super) fn burn_epoch(&mut self) -> Epoch {
        self.epoch_burnt = self.epoch_burnt.next();
        self.epoch_burnt
    }
}
