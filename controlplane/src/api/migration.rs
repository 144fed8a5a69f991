//! Migrations as the API shows and takes them.

use serde::{Deserialize, Serialize};
use wire::ids::{HostName, MachineId, MachineName, MigrationId};

use super::{text, text_option};

/// Body of `POST /v1/machines/{id}/migrate`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where to; chosen by free RAM and vCPUs when absent.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub target: Option<HostName>,
    /// Longest pause to aim for, in microseconds (default 10,000; 100 to 60,000,000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_budget_us: Option<u64>,
    /// Rate limit of the pre-copy in bytes per second; 0 or absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit_bytes_per_s: Option<u64>,
}

/// Phase of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits for its turn: each host takes a bounded number at once.
    Pending,
    /// The target reserves what the machine needs.
    PreparingTarget,
    /// It moves; `progress.stage` says how far.
    Running,
    /// Commit left the source and it is not known whether the target runs; `message` says what is being done.
    InDoubt,
    /// The target runs the machine.
    Succeeded,
    /// It did not move; `error` says why.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::PreparingTarget,
        Self::Running,
        Self::InDoubt,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether nothing will change any more.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The text used in JSON and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::PreparingTarget => "preparing_target",
            Self::Running => "running",
            Self::InDoubt => "in_doubt",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Stage within [`Phase::Running`], as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Dialling the target and agreeing with it.
    Connecting,
    /// Copying while the guest runs.
    Precopy,
    /// The link is broken; the guest runs, the source tries again.
    Reconnecting,
    /// The guest is paused for the last pages.
    Switchover,
    /// Commit has left; the answer has not come.
    Committing,
    /// The target runs; late packets are forwarded.
    Completing,
}

impl Stage {
    /// The text used in JSON and on terminals.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Precopy => "precopy",
            Self::Reconnecting => "reconnecting",
            Self::Switchover => "switchover",
            Self::Committing => "committing",
            Self::Completing => "completing",
        }
    }
}

/// How far a migration is; live only, not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Stage.
    pub stage: Stage,
    /// Round of the pre-copy, from 1.
    pub round: u32,
    /// RAM of the machine.
    pub ram_bytes: u64,
    /// Sent so far, over all rounds.
    pub sent_bytes: u64,
    /// Left in this round.
    pub remaining_bytes: u64,
    /// Pages that the guest dirtied per second in the last round.
    pub dirty_pages_per_s: u64,
    /// Goodput over the last round.
    pub bytes_per_s: u64,
    /// Pause if it began now; 0 while unknown.
    pub predicted_downtime_us: u64,
    /// Until the switch-over; 0 while unknown.
    pub eta_ms: u64,
    /// Since the source began.
    pub elapsed_ms: u64,
}

/// Where the time of a finished migration went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From the command to the target running.
    pub total_ms: u64,
    /// Rounds, the final one included.
    pub rounds: u32,
    /// Bytes sent, headers included.
    pub sent_bytes: u64,
    /// Pages sent with their content.
    pub pages_sent: u64,
    /// Pages sent as a reference to zero.
    pub pages_zero: u64,
    /// The whole pause.
    pub pause_us: u64,
    /// Part of it: stopping vCPUs and devices.
    pub stop_us: u64,
    /// Part of it: the last dirty log.
    pub harvest_us: u64,
    /// Part of it: the last dirty pages.
    pub final_copy_us: u64,
    /// Part of it: saving state (beside the final copy).
    pub save_us: u64,
    /// Part of it: loading state on the target.
    pub restore_us: u64,
    /// Part of it: from Commit to vCPUs running.
    pub resume_us: u64,
    /// Pages of the final copy.
    pub final_pages: u64,
    /// Packets held and forwarded.
    pub packets_held: u64,
}

/// Why a migration failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationError {
    /// For programs: snake case, stable.
    pub code: String,
    /// For people, with the remedy where there is one.
    pub detail: String,
}

/// A migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Migration {
    /// Its id.
    #[serde(with = "text")]
    pub id: MigrationId,
    /// The machine.
    #[serde(with = "text")]
    pub machine: MachineId,
    /// The machine's name.
    #[serde(with = "text")]
    pub machine_name: MachineName,
    /// Where it comes from.
    #[serde(with = "text")]
    pub source: HostName,
    /// Where it goes.
    #[serde(with = "text")]
    pub target: HostName,
    /// Epoch under which the target owns the machine, if it succeeds.
    pub epoch: u64,
    /// Phase.
    pub phase: Phase,
    /// What it waits for, in words.
    pub message: Option<String>,
    /// Whether somebody asked to cancel it.
    pub cancel_requested: bool,
    /// Longest pause aimed for.
    pub downtime_budget_us: u64,
    /// How far it is, while it runs.
    pub progress: Option<Progress>,
    /// Where the time went, once it succeeded and the source said so.
    pub timings: Option<Timings>,
    /// Why it failed.
    pub error: Option<MigrationError>,
    /// When it was asked for.
    pub requested_unix_ms: u64,
    /// When its turn came.
    pub started_unix_ms: Option<u64>,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
}

/// A page of migrations, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationList {
    /// The migrations.
    pub migrations: Vec<Migration>,
    /// Give it as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl std::str::FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|phase| phase.as_str()).collect();
            format!("`{text}` is not a phase; use one of {}", known.join(", "))
        })
    }
}
