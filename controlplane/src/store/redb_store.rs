//! The store on redb: one file, one writer, every commit synced.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wire::ids::{HostName, MachineId, MigrationId};

use super::records::{HostRecord, IdempotencyRecord, MachineRecord, Meta, MigrationRecord};
use super::{Batch, EVENTS_MAX, SCHEMA_VERSION, Snapshot, Store, StoreError, codec};
use crate::api::Event;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const MACHINES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("machines");
const HOSTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("hosts");
const MIGRATIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("migrations");
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
const IDEMPOTENCY: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("idempotency");
const ADDRESSES: TableDefinition<'_, u32, u64> = TableDefinition::new("addresses");
const CONSOLES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("consoles");

const SCHEMA_KEY: &str = "schema_version";
const META_KEY: &str = "meta";

/// How the database is opened.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Memory for cached pages, in bytes. All records live in the core's memory as well, so this stays small.
    pub cache_bytes: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { cache_bytes: 16 << 20 }
    }
}

/// A [`Store`] in a redb database.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
}

impl RedbStore {
    /// Opens the file `path`, or makes it. A database that is only half made cannot be told from a damaged one, so a new one is
    /// made under another name and takes its place when it is whole.
    ///
    /// # Errors
    /// [`StoreError`] when it is in use by another process, damaged, or of a newer release.
    pub fn open(path: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let mut builder = Database::builder();
        builder.set_cache_size(options.cache_bytes);
        let file = |source| StoreError::File { path: path.to_owned(), source };
        if !path.try_exists().map_err(file)? {
            let draft = path.with_extension("draft");
            if draft.try_exists().map_err(file)? {
                std::fs::remove_file(&draft).map_err(file)?;
            }
            drop(Self::prepare(builder.create(&draft)?)?);
            std::fs::rename(&draft, path).map_err(file)?;
            if let Some(directory) = path.parent() {
                std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(file)?;
            }
        }
        Self::prepare(builder.open(path)?)
    }

    /// Opens or makes a store on any backend; for tests that inject faults.
    ///
    /// # Errors
    /// As [`RedbStore::open`].
    pub fn on_backend(backend: impl StorageBackend, options: StoreOptions) -> Result<Self, StoreError> {
        let database =
            Database::builder().set_cache_size(options.cache_bytes).create_with_backend(backend)?;
        Self::prepare(database)
    }

    /// Creates all tables, so that readers need not handle their absence, and checks the schema version.
    fn prepare(database: Database) -> Result<Self, StoreError> {
        let transaction = database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let found = meta.get(SCHEMA_KEY)?.map(|value| decode::<u32>("meta", SCHEMA_KEY, value.value()));
            match found.transpose()? {
                Some(found) if found > SCHEMA_VERSION => return Err(StoreError::Newer { found }),
                Some(_) => {}
                None => {
                    let bytes = encode("meta", SCHEMA_KEY, &SCHEMA_VERSION)?;
                    meta.insert(SCHEMA_KEY, bytes.as_slice())?;
                }
            }
            for table in [MACHINES, MIGRATIONS, EVENTS, CONSOLES] {
                transaction.open_table(table)?;
            }
            for table in [HOSTS, IDEMPOTENCY] {
                transaction.open_table(table)?;
            }
            transaction.open_table(ADDRESSES)?;
        }
        transaction.commit()?;
        Ok(Self { database })
    }
}

impl Store for RedbStore {
    fn load(&self) -> Result<Snapshot, StoreError> {
        let read = self.database.begin_read()?;
        let numbered = |table: TableDefinition<'static, u64, &'static [u8]>| read.open_table(table);
        let mut snapshot = Snapshot::default();
        if let Some(value) = read.open_table(META)?.get(META_KEY)? {
            snapshot.meta = decode("meta", META_KEY, value.value())?;
        }
        for item in numbered(MACHINES)?.iter()? {
            let (key, value) = item?;
            snapshot.machines.push(decode("machines", key.value(), value.value())?);
        }
        for item in numbered(MIGRATIONS)?.iter()? {
            let (key, value) = item?;
            snapshot.migrations.push(decode("migrations", key.value(), value.value())?);
        }
        for item in read.open_table(HOSTS)?.iter()? {
            let (key, value) = item?;
            snapshot.hosts.push(decode("hosts", key.value(), value.value())?);
        }
        for item in read.open_table(ADDRESSES)?.iter()? {
            let (key, value) = item?;
            snapshot.addresses.push((key.value(), MachineId::from_u64(value.value())));
        }
        for item in read.open_table(IDEMPOTENCY)?.iter()? {
            let (key, value) = item?;
            let record = decode("idempotency", key.value(), value.value())?;
            snapshot.idempotency.push((key.value().to_owned(), record));
        }
        Ok(snapshot)
    }

    fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        write_records(&transaction, batch)?;
        write_small(&transaction, batch)?;
        append_events(&transaction, &batch.events)?;
        transaction.commit()?;
        Ok(())
    }

    fn events_after(&self, after: u64, limit: usize) -> Result<Vec<Event>, StoreError> {
        let read = self.database.begin_read()?;
        let table = read.open_table(EVENTS)?;
        let range = table.range(after.saturating_add(1)..)?;
        range
            .take(limit)
            .map(|item| {
                let (key, value) = item?;
                decode("events", key.value(), value.value())
            })
            .collect()
    }

    fn console(&self, machine: MachineId) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.database.begin_read()?;
        let table = read.open_table(CONSOLES)?;
        Ok(table.get(machine.as_u64())?.map(|bytes| bytes.value().to_vec()))
    }
}

fn write_records(transaction: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    if let Some(meta) = &batch.meta {
        let bytes = encode::<Meta>("meta", META_KEY, meta)?;
        transaction.open_table(META)?.insert(META_KEY, bytes.as_slice())?;
    }
    let machines = batch.machines.iter().map(|(id, record)| (id.as_u64(), record.as_ref()));
    write_numbered::<MachineRecord>(transaction, MACHINES, "machines", machines)?;
    let migrations = batch.migrations.iter().map(|(id, record)| (id.as_u64(), record.as_ref()));
    write_numbered::<MigrationRecord>(transaction, MIGRATIONS, "migrations", migrations)?;
    let mut hosts = transaction.open_table(HOSTS)?;
    for (name, record) in &batch.hosts {
        let bytes = encode::<HostRecord>("hosts", HostName::as_str(name), record)?;
        hosts.insert(name.as_str(), bytes.as_slice())?;
    }
    Ok(())
}

fn write_numbered<'a, T: Serialize + 'a>(
    transaction: &WriteTransaction,
    definition: TableDefinition<'static, u64, &'static [u8]>,
    name: &'static str,
    items: impl Iterator<Item = (u64, Option<&'a T>)>,
) -> Result<(), StoreError> {
    let mut table = transaction.open_table(definition)?;
    for (key, value) in items {
        match value {
            Some(value) => drop(table.insert(key, encode(name, key, value)?.as_slice())?),
            None => drop(table.remove(key)?),
        }
    }
    Ok(())
}

fn write_small(transaction: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    let mut addresses = transaction.open_table(ADDRESSES)?;
    for (index, machine) in &batch.addresses {
        match machine {
            Some(machine) => drop(addresses.insert(index, machine.as_u64())?),
            None => drop(addresses.remove(index)?),
        }
    }
    let mut idempotency = transaction.open_table(IDEMPOTENCY)?;
    for (key, record) in &batch.idempotency {
        match record {
            Some(record) => {
                let bytes = encode::<IdempotencyRecord>("idempotency", key, record)?;
                drop(idempotency.insert(key.as_str(), bytes.as_slice())?);
            }
            None => drop(idempotency.remove(key.as_str())?),
        }
    }
    let mut consoles = transaction.open_table(CONSOLES)?;
    for (machine, bytes) in &batch.consoles {
        match bytes {
            Some(bytes) => drop(consoles.insert(machine.as_u64(), bytes.as_slice())?),
            None => drop(consoles.remove(machine.as_u64())?),
        }
    }
    Ok(())
}

/// Ids rise by one, so that the ring's end follows from its newest id alone.
fn append_events(transaction: &WriteTransaction, events: &[Event]) -> Result<(), StoreError> {
    let Some(newest) = events.last() else { return Ok(()) };
    let mut table = transaction.open_table(EVENTS)?;
    for event in events {
        table.insert(event.id, encode("events", event.id, event)?.as_slice())?;
    }
    let keep_from = newest.id.saturating_sub(EVENTS_MAX - 1);
    table.retain_in(..keep_from, |_, _| false)?;
    Ok(())
}

fn encode<T: Serialize>(
    table: &'static str,
    key: impl std::fmt::Display,
    value: &T,
) -> Result<Vec<u8>, StoreError> {
    codec::encode(value).map_err(|source| StoreError::Value { table, key: key.to_string(), source })
}

fn decode<T: DeserializeOwned>(
    table: &'static str,
    key: impl std::fmt::Display,
    bytes: &[u8],
) -> Result<T, StoreError> {
    codec::decode(bytes).map_err(|source| StoreError::Value { table, key: key.to_string(), source })
}

impl Snapshot {
    /// The migration of this id.
    pub fn migration(&self, id: MigrationId) -> Option<&MigrationRecord> {
        self.migrations.iter().find(|record| record.id == id)
    }
}
