//! The records in memory, and which of them changed since they were last kept.

use std::collections::{BTreeMap, BTreeSet};

use wire::ids::{HostName, MachineId, MachineName, MigrationId};

use crate::api::{Event, EventKind};
use crate::store::records::{HostRecord, IdempotencyRecord, Lifecycle, MachineRecord, Meta, MigrationRecord};
use crate::store::{Batch, Snapshot};

/// What an event is about.
#[derive(Debug, Clone, Default)]
pub(super) struct About {
    pub machine: Option<MachineId>,
    pub host: Option<HostName>,
    pub migration: Option<MigrationId>,
}

#[derive(Debug, Default)]
struct Dirty {
    meta: bool,
    machines: BTreeSet<MachineId>,
    hosts: BTreeSet<HostName>,
    migrations: BTreeSet<MigrationId>,
    addresses: BTreeSet<u32>,
    idempotency: BTreeSet<String>,
    consoles: BTreeMap<MachineId, Option<Vec<u8>>>,
    events: Vec<Event>,
}

/// All records. A record is changed through `*_mut`, which notes it for the next batch.
#[derive(Debug, Default)]
pub(super) struct Model {
    meta: Meta,
    machines: BTreeMap<MachineId, MachineRecord>,
    /// Names of machines that their owners can still see.
    names: BTreeMap<MachineName, MachineId>,
    hosts: BTreeMap<HostName, HostRecord>,
    migrations: BTreeMap<MigrationId, MigrationRecord>,
    by_sequence: BTreeMap<u64, MigrationId>,
    addresses: BTreeMap<u32, MachineId>,
    idempotency: BTreeMap<String, IdempotencyRecord>,
    dirty: Dirty,
}

impl Model {
    pub(super) fn from_snapshot(snapshot: Snapshot) -> Self {
        let mut model = Self { meta: snapshot.meta, ..Self::default() };
        for machine in snapshot.machines {
            if machine.lifecycle != Lifecycle::Gone {
                model.names.insert(machine.name.clone(), machine.id);
            }
            model.machines.insert(machine.id, machine);
        }
        for migration in snapshot.migrations {
            model.by_sequence.insert(migration.sequence, migration.id);
            model.migrations.insert(migration.id, migration);
        }
        model.hosts = snapshot.hosts.into_iter().map(|host| (host.name.clone(), host)).collect();
        model.addresses = snapshot.addresses.into_iter().collect();
        model.idempotency = snapshot.idempotency.into_iter().collect();
        model
    }

    pub(super) fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(super) fn meta_mut(&mut self) -> &mut Meta {
        self.dirty.meta = true;
        &mut self.meta
    }

    pub(super) fn machine(&self, id: MachineId) -> Option<&MachineRecord> {
        self.machines.get(&id)
    }

    pub(super) fn machine_mut(&mut self, id: MachineId) -> Option<&mut MachineRecord> {
        let machine = self.machines.get_mut(&id)?;
        self.dirty.machines.insert(id);
        Some(machine)
    }

    pub(super) fn machine_named(&self, name: &MachineName) -> Option<MachineId> {
        self.names.get(name).copied()
    }

    pub(super) fn machines(&self) -> impl Iterator<Item = &MachineRecord> {
        self.machines.values()
    }

    pub(super) fn machines_from(&self, after: Option<MachineId>) -> impl Iterator<Item = &MachineRecord> {
        let from = match after {
            Some(id) => std::ops::Bound::Excluded(id),
            None => std::ops::Bound::Unbounded,
        };
        self.machines.range((from, std::ops::Bound::Unbounded)).map(|(_, machine)| machine)
    }

    pub(super) fn insert_machine(&mut self, machine: MachineRecord) {
        self.names.insert(machine.name.clone(), machine.id);
        self.addresses.insert(machine.address_index, machine.id);
        self.dirty.addresses.insert(machine.address_index);
        self.dirty.machines.insert(machine.id);
        self.machines.insert(machine.id, machine);
    }

    /// Frees the name; the record stays until no host has a copy.
    pub(super) fn forget_name(&mut self, id: MachineId) {
        if let Some(machine) = self.machines.get(&id)
            && self.names.get(&machine.name) == Some(&id)
        {
            self.names.remove(&machine.name);
        }
    }

    pub(super) fn remove_machine(&mut self, id: MachineId) {
        self.forget_name(id);
        let Some(machine) = self.machines.remove(&id) else { return };
        self.dirty.machines.insert(id);
        self.addresses.remove(&machine.address_index);
        self.dirty.addresses.insert(machine.address_index);
        self.dirty.consoles.insert(id, None);
    }

    pub(super) fn address_taken(&self, index: u32) -> bool {
        self.addresses.contains_key(&index)
    }

    pub(super) fn hosts(&self) -> impl Iterator<Item = &HostRecord> {
        self.hosts.values()
    }

    pub(super) fn host(&self, name: &HostName) -> Option<&HostRecord> {
        self.hosts.get(name)
    }

    pub(super) fn put_host(&mut self, host: HostRecord) {
        self.dirty.hosts.insert(host.name.clone());
        self.hosts.insert(host.name.clone(), host);
    }

    pub(super) fn migration(&self, id: MigrationId) -> Option<&MigrationRecord> {
        self.migrations.get(&id)
    }

    pub(super) fn migration_mut(&mut self, id: MigrationId) -> Option<&mut MigrationRecord> {
        let migration = self.migrations.get_mut(&id)?;
        self.dirty.migrations.insert(id);
        Some(migration)
    }

    pub(super) fn migrations(&self) -> impl DoubleEndedIterator<Item = &MigrationRecord> {
        self.by_sequence.values().filter_map(|id| self.migrations.get(id))
    }

    pub(super) fn insert_migration(&mut self, migration: MigrationRecord) {
        self.dirty.migrations.insert(migration.id);
        self.by_sequence.insert(migration.sequence, migration.id);
        self.migrations.insert(migration.id, migration);
    }

    /// Drops the oldest ended migrations beyond `keep`, except those whose target must still be told.
    pub(super) fn drop_old_migrations(&mut self, keep: usize) {
        let excess = self.migrations.len().saturating_sub(keep);
        if excess == 0 {
            return;
        }
        let done = |record: &&MigrationRecord| record.state.is_ended() && !record.forget_target;
        let old: Vec<_> =
            self.migrations().filter(done).take(excess).map(|record| (record.sequence, record.id)).collect();
        for (sequence, id) in old {
            self.by_sequence.remove(&sequence);
            self.migrations.remove(&id);
            self.dirty.migrations.insert(id);
        }
    }

    pub(super) fn idempotency(&self, key: &str) -> Option<&IdempotencyRecord> {
        self.idempotency.get(key)
    }

    pub(super) fn idempotency_keys(&self) -> &BTreeMap<String, IdempotencyRecord> {
        &self.idempotency
    }

    pub(super) fn put_idempotency(&mut self, key: String, record: Option<IdempotencyRecord>) {
        self.dirty.idempotency.insert(key.clone());
        match record {
            Some(record) => drop(self.idempotency.insert(key, record)),
            None => drop(self.idempotency.remove(&key)),
        }
    }

    pub(super) fn put_console(&mut self, machine: MachineId, bytes: Option<Vec<u8>>) {
        self.dirty.consoles.insert(machine, bytes);
    }

    pub(super) fn event(&mut self, at_unix_ms: u64, kind: EventKind, about: About, message: String) {
        let meta = self.meta_mut();
        meta.event_id += 1;
        let id = meta.event_id;
        let About { machine, host, migration } = about;
        self.dirty.events.push(Event { id, at_unix_ms, kind, machine, host, migration, message });
    }

    /// Everything that changed since the last call, as it is now.
    pub(super) fn take_batch(&mut self) -> Batch {
        let dirty = std::mem::take(&mut self.dirty);
        let host = |name: HostName| self.hosts.get(&name).cloned().map(|record| (name, record));
        Batch {
            meta: dirty.meta.then(|| self.meta.clone()),
            machines: dirty.machines.into_iter().map(|id| (id, self.machines.get(&id).cloned())).collect(),
            hosts: dirty.hosts.into_iter().filter_map(host).collect(),
            migrations: dirty
                .migrations
                .into_iter()
                .map(|id| (id, self.migrations.get(&id).cloned()))
                .collect(),
            addresses: dirty
                .addresses
                .into_iter()
                .map(|index| (index, self.addresses.get(&index).copied()))
                .collect(),
            idempotency: dirty
                .idempotency
                .into_iter()
                .map(|key| (key.clone(), self.idempotency.get(&key).cloned()))
                .collect(),
            consoles: dirty.consoles.into_iter().collect(),
            events: dirty.events,
        }
    }
}
