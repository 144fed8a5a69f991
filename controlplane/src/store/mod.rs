//! What must survive a crash of the control plane, and the small interface to whatever keeps it.
//!
//! The control plane has one writer (the [core](crate::core)), which holds all records in memory and hands over each
//! change as one [`Batch`]. A batch is kept whole or not at all, and once [`Store::commit`] has returned it survives power loss.
//! Only then does the core act on it: commands to hosts and answers to clients leave after the commit of the
//! batch that calls for them. When a commit fails the core stops; whether the batch was kept is found out by
//! opening the store again, and both outcomes are states that recovery handles.
//!
//! Values are JSON in a versioned envelope. Records are small and few writes are hot, so that the speed of
//! rkyv would gain nothing here, while JSON can be read with ordinary tools on the worst day, and gains fields without migration.

mod codec;
pub mod records;
mod redb_store;

pub use codec::CodecError;
pub use redb_store::{RedbStore, StoreOptions};

use wire::ids::{HostName, MachineId, MigrationId};

use crate::api::Event;
use records::{HostRecord, IdempotencyRecord, MachineRecord, Meta, MigrationRecord};

/// Version of the tables. A store of a newer one is refused.
/// * 1: first.
pub const SCHEMA_VERSION: u32 = 1;

/// Events that are kept.
pub const EVENTS_MAX: u64 = 10_000;

/// A store that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed.
    #[error("the store's database failed")]
    Database(#[source] Box<redb::Error>),
    /// Its file cannot be made.
    #[error("making the store {}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A value cannot be read or written.
    #[error("the store's table `{table}`, key {key}")]
    Value {
        /// The table.
        table: &'static str,
        /// The key, as text.
        key: String,
        /// Why.
        #[source]
        source: CodecError,
    },
    /// Written by a newer release.
    #[error(
        "the store has schema version {found}, this release knows up to {SCHEMA_VERSION}: run the newer release that wrote it"
    )]
    Newer {
        /// Its version.
        found: u32,
    },
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// Everything a control plane starts from.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counters.
    pub meta: Meta,
    /// Machines, in no order.
    pub machines: Vec<MachineRecord>,
    /// Hosts.
    pub hosts: Vec<HostRecord>,
    /// Migrations, ended ones included as far as they are kept.
    pub migrations: Vec<MigrationRecord>,
    /// Addresses that are in use: index within the pools, and whose.
    pub addresses: Vec<(u32, MachineId)>,
    /// Answers given under an idempotency key.
    pub idempotency: Vec<(String, IdempotencyRecord)>,
}

/// A change, kept whole or not at all. `None` deletes.
#[derive(Debug, Default)]
pub struct Batch {
    /// Counters, if changed.
    pub meta: Option<Meta>,
    /// Machines.
    pub machines: Vec<(MachineId, Option<MachineRecord>)>,
    /// Hosts.
    pub hosts: Vec<(HostName, HostRecord)>,
    /// Migrations.
    pub migrations: Vec<(MigrationId, Option<MigrationRecord>)>,
    /// Addresses.
    pub addresses: Vec<(u32, Option<MachineId>)>,
    /// Idempotency keys.
    pub idempotency: Vec<(String, Option<IdempotencyRecord>)>,
    /// Console output of machines that were stopped.
    pub consoles: Vec<(MachineId, Option<Vec<u8>>)>,
    /// New events; the oldest beyond [`EVENTS_MAX`] go.
    pub events: Vec<Event>,
}

impl Batch {
    /// Whether there is nothing to keep.
    pub fn is_empty(&self) -> bool {
        self.meta.is_none()
            && self.machines.is_empty()
            && self.hosts.is_empty()
            && self.migrations.is_empty()
            && self.addresses.is_empty()
            && self.idempotency.is_empty()
            && self.consoles.is_empty()
            && self.events.is_empty()
    }
}

/// Keeps batches.
pub trait Store: Send + 'static {
    /// Everything but events and consoles, as of the last commit.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    fn load(&self) -> Result<Snapshot, StoreError>;

    /// Keeps `batch` durably, whole or not at all.
    ///
    /// # Errors
    /// [`StoreError`]; whether the batch was kept is then unknown, and the store must not be used again.
    fn commit(&mut self, batch: &Batch) -> Result<(), StoreError>;

    /// Up to `limit` events with an id above `after`, in order.
    ///
    /// # Errors
    /// [`StoreError`] when they cannot be read.
    fn events_after(&self, after: u64, limit: usize) -> Result<Vec<Event>, StoreError>;

    /// Console output kept of a stopped machine.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    fn console(&self, machine: MachineId) -> Result<Option<Vec<u8>>, StoreError>;
}
