//! Events: what happened, in order, as `/v1/events` streams it.

use serde::{Deserialize, Serialize};
use wire::ids::{HostName, MachineId, MigrationId};

use super::text_option;

/// What happened. New kinds may appear; clients show those they do not know as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventKind {
    /// A machine was created; its launch begins.
    #[serde(rename = "machine.created")]
    MachineCreated,
    /// A stopped or failed machine is started again.
    #[serde(rename = "machine.starting")]
    MachineStarting,
    /// A machine's guest runs.
    #[serde(rename = "machine.started")]
    MachineStarted,
    /// A machine is being stopped.
    #[serde(rename = "machine.stopping")]
    MachineStopping,
    /// A machine is stopped.
    #[serde(rename = "machine.stopped")]
    MachineStopped,
    /// A machine failed.
    #[serde(rename = "machine.failed")]
    MachineFailed,
    /// A machine is gone.
    #[serde(rename = "machine.destroyed")]
    MachineDestroyed,
    /// A host has a copy of a machine that is not its own to run; it is told to drop it.
    #[serde(rename = "machine.stray")]
    MachineStray,
    /// A host runs a machine that this control plane never knew; it is left alone.
    #[serde(rename = "machine.foreign")]
    MachineForeign,
    /// A host reported a higher ownership epoch than was on record.
    #[serde(rename = "machine.epoch_ahead")]
    MachineEpochAhead,
    /// A host joined or came back.
    #[serde(rename = "host.online")]
    HostOnline,
    /// A host fell silent.
    #[serde(rename = "host.lost")]
    HostLost,
    /// A migration was asked for.
    #[serde(rename = "migration.requested")]
    MigrationRequested,
    /// A migration's turn came.
    #[serde(rename = "migration.started")]
    MigrationStarted,
    /// It is not known where the machine runs.
    #[serde(rename = "migration.in_doubt")]
    MigrationInDoubt,
    /// The target runs the machine.
    #[serde(rename = "migration.succeeded")]
    MigrationSucceeded,
    /// The machine did not move.
    #[serde(rename = "migration.failed")]
    MigrationFailed,
    /// The migration was cancelled.
    #[serde(rename = "migration.cancelled")]
    MigrationCancelled,
    /// Sent to a client only: events between the one it had and the next are no longer kept.
    #[serde(rename = "events.gap")]
    Gap,
}

impl EventKind {
    /// The text used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MachineCreated => "machine.created",
            Self::MachineStarting => "machine.starting",
            Self::MachineStarted => "machine.started",
            Self::MachineStopping => "machine.stopping",
            Self::MachineStopped => "machine.stopped",
            Self::MachineFailed => "machine.failed",
            Self::MachineDestroyed => "machine.destroyed",
            Self::MachineStray => "machine.stray",
            Self::MachineForeign => "machine.foreign",
            Self::MachineEpochAhead => "machine.epoch_ahead",
            Self::HostOnline => "host.online",
            Self::HostLost => "host.lost",
            Self::MigrationRequested => "migration.requested",
            Self::MigrationStarted => "migration.started",
            Self::MigrationInDoubt => "migration.in_doubt",
            Self::MigrationSucceeded => "migration.succeeded",
            Self::MigrationFailed => "migration.failed",
            Self::MigrationCancelled => "migration.cancelled",
            Self::Gap => "events.gap",
        }
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with each event, for ever.
    pub id: u64,
    /// When.
    pub at_unix_ms: u64,
    /// What.
    pub kind: EventKind,
    /// Which machine, if it is about one.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// Which host, if it is about one.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// Which migration, if it is about one.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// For people.
    pub message: String,
}
