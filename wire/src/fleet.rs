//! What hosts and the control plane say to each other.
//!
//! A host dials in (QUIC, mutual TLS) and opens one bidirectional stream: it sends [`FromHost::Hello`], the control plane answers
//! [`ToHost::Welcome`], and from then on reports flow one way and commands the other. A command carries an `op` number that its
//! [`FromHost::Answer`] repeats. Every command is idempotent: after a reconnect or a restart the control plane sends
//! again whatever it has no answer for, and the host gives the answer that is true now.

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]
#![allow(
    clippy::large_enum_variant,
    reason = "messages are built once, archived and dropped; none is stored in numbers"
)]

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{Epoch, HostName, MachineId, MigrationId, StateId};
use crate::vmm::{GuestEnd, MachineSpec};

/// Version of this protocol.
/// * 1: first.
/// * 2: disks, blobs and streams beside the commands, power button.
/// * 3: a target's [`StateId`], in [`Answer::Prepared`] and [`Command::Fence`].
pub const VERSION: u16 = 3;

/// What a host has and what of it is free.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Capacity {
    /// RAM that machines may use in all, in bytes.
    pub ram_bytes: u64,
    /// RAM that neither a machine nor a reservation has, in bytes.
    pub ram_free_bytes: u64,
    /// Physical CPUs.
    pub cpus: u32,
    /// vCPUs of the machines here.
    pub vcpus_used: u32,
    /// CPU features (names as in `/proc/cpuinfo`), sorted.
    pub cpu_features: Vec<String>,
    /// Host TSC frequency, in kHz.
    pub tsc_khz: u32,
}

/// What the control plane says to a host.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum ToHost {
    /// Answer to [`FromHost::Hello`].
    Welcome {
        /// Version that both ends use from here on.
        version: u16,
        /// How often to send a heartbeat, in milliseconds.
        heartbeat_ms: u32,
    },
    /// The host cannot join; it ends the connection, says why to its operator and tries again later.
    Rejected {
        /// For people.
        detail: String,
    },
    /// Something to do.
    Command {
        /// Repeated in the answer.
        op: u64,
        /// What.
        command: Command,
    },
}

/// Commands. Machines that the host does not know are answered with [`Answer::Unknown`].
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Command {
    /// Create and boot a machine. Answer: [`Answer::Done`] when its vCPUs run, also if they did already.
    Launch {
        /// The machine.
        spec: MachineSpec,
        /// Epoch under which the host owns it.
        epoch: Epoch,
        /// Where its disks come from.
        disks: DiskStart,
    },
    /// End the machine: its VMM, tap, routes and memory are gone afterwards. Refused (`Stale`) if it runs here under a higher epoch. Also clears away a copy that was given away. Answer: [`Answer::Done`], also if there was none.
    Destroy {
        /// The machine.
        machine: MachineId,
        /// Highest epoch that may be destroyed.
        epoch: Epoch,
        /// Whether its disks stay on this host, for the next launch. Those of a copy that was given away go in any case.
        keep_disks: bool,
    },
    /// To the target: reserve RAM and expect an incoming migration. Answer: [`Answer::Prepared`] or [`Answer::Refused`].
    Prepare {
        /// The migration.
        migration: MigrationId,
        /// The machine as it is.
        spec: MachineSpec,
        /// The epoch under which this host will own it.
        epoch: Epoch,
        /// Who will dial in.
        source: HostName,
    },
    /// To the source: move the machine. Answer: [`Answer::Done`] once begun (also if it was already); [`FromHost::Progress`] and [`FromHost::Ended`] follow.
    Migrate {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        machine: MachineId,
        /// The epoch under which the target will own it.
        epoch: Epoch,
        /// The target.
        target: HostName,
        /// Socket addresses (`ip:port`) of the target's shards, the first for the control stream.
        addresses: Vec<String>,
        /// The target's fabric address, for the forward route.
        forward_to: ForwardAddress,
        /// Longest pause to aim for, in microseconds.
        downtime_budget_us: u64,
        /// Rate limit for the pre-copy in bytes per second, 0 for none.
        bandwidth_limit: u64,
    },
    /// Press the power button: the guest is asked to end by itself, and [`FromHost::GuestEnded`] follows if it does. Answer: [`Answer::Done`] once pressed.
    PowerButton {
        /// The machine.
        machine: MachineId,
    },
    /// To the source: cancel. Answer: `Done` if it was cancelled or had ended without moving the machine; `Refused` (`Committed`) once Commit has left.
    Cancel {
        /// The migration.
        migration: MigrationId,
    },
    /// To the target: drop the reservation or the half-received copy, unless it already owns the machine. Answer: `Done` (also if there was nothing to drop) or `Refused` (`Committed`).
    Forget {
        /// The migration.
        migration: MigrationId,
    },
    /// Promise never to run the machine under `epoch` or a lower one. A copy that waits for its Commit is dropped. Answer: `Done`, or [`Answer::Owns`] if it already runs under it, or may have run; never `Unknown`: a host that
    /// does not know the machine gives the promise all the same, unless `state` says that it has forgotten, and must keep it across a restart of the daemon (dropping every uncommitted copy at start does).
    Fence {
        /// The machine.
        machine: MachineId,
        /// The epoch that must never run here.
        epoch: Epoch,
        /// What the host remembered with when it was prepared; `None` if it never answered.
        state: Option<StateId>,
    },
    /// Take a machine back that was given away, after the target was fenced. Answer: `Done` when it runs again under `epoch` (also if it already did);
    /// a source that never gave it away (it still pauses or runs under a lower epoch) takes the new epoch, resumes and answers `Done` as well.
    Reclaim {
        /// The machine.
        machine: MachineId,
        /// New epoch.
        epoch: Epoch,
    },
    /// How does the migration stand here. Answer: [`Answer::Migration`].
    Inquire {
        /// The migration.
        migration: MigrationId,
    },
    /// Read serial output from an absolute offset. Works until the machine is destroyed, so also after its guest ended. Answer: [`Answer::Console`].
    ReadConsole {
        /// The machine.
        machine: MachineId,
        /// First byte wanted; older than the ring holds: the oldest it has.
        offset: u64,
        /// Most bytes wanted, at most 1 MiB.
        bytes_max: u32,
    },
}

/// Where the disks of a machine come from when it is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum DiskStart {
    /// Made anew: the base, with nothing written yet. What this host still has of the machine's disks is removed.
    Fresh,
    /// As an earlier run of the machine left them on this host; `Refused` (`NoDisk`) if they are not here.
    Kept,
}

/// Where late packets are forwarded to: the target's addresses on the fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ForwardAddress {
    /// IPv4, network order.
    pub ip4: [u8; 4],
    /// IPv6, network order.
    pub ip6: [u8; 16],
}

/// What a host says to the control plane.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FromHost {
    /// First on the stream.
    Hello {
        /// Newest version it speaks.
        version: u16,
        /// Its name; must be the one in its certificate.
        host: HostName,
        /// Changes with each start of the daemon.
        boot_nonce: u64,
        /// Release, for `host ls`.
        release: String,
    },
    /// Sent every `heartbeat_ms` and after each change. Silence for three intervals means the host is lost from sight (not that its machines are dead).
    Heartbeat {
        /// Capacity now.
        capacity: Capacity,
        /// All machines here, whatever their phase.
        machines: Vec<MachineReport>,
    },
    /// Answer to a command.
    Answer {
        /// The command's number.
        op: u64,
        /// The answer.
        answer: Answer,
    },
    /// A migration this host is the source of moves on; at most ten a second, and one at each change of phase.
    Progress(Progress),
    /// A migration this host was the source of has ended. May be lost with the link: the control plane then asks with [`Command::Inquire`], so a
    /// source keeps the outcome of a machine's latest migration at least until that machine is destroyed or migrates again.
    Ended {
        /// The migration.
        migration: MigrationId,
        /// How.
        outcome: Outcome,
    },
    /// A machine ended by itself. Said when it happens, and again after each [`FromHost::Hello`] for every machine still here in [`HostPhase::Ended`].
    GuestEnded {
        /// The machine.
        machine: MachineId,
        /// Its epoch here.
        epoch: Epoch,
        /// How.
        end: GuestEnd,
    },
}

/// Answers to commands.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Answer {
    /// It is so.
    Done,
    /// To `Prepare`: where to dial.
    Prepared {
        /// `ip:port` of each shard, the first for the control stream.
        addresses: Vec<String>,
        /// For the forward route.
        forward_to: ForwardAddress,
        /// What it remembers with that it was prepared, and everything that follows.
        state: StateId,
    },
    /// To `Fence`: too late, it runs here under this epoch, or nobody knows that it did not.
    Owns {
        /// The epoch.
        epoch: Epoch,
    },
    /// To `Inquire`.
    Migration(MigrationStanding),
    /// To `ReadConsole`.
    Console {
        /// Offset of the first byte returned.
        offset: u64,
        /// The bytes; empty if there are none yet.
        bytes: Vec<u8>,
        /// Whether the machine is here and may write more.
        live: bool,
    },
    /// No such machine or migration here.
    Unknown,
    /// No, and why.
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people: one line, naming what is missing and the remedy.
        detail: String,
    },
}

/// How a migration stands on one of its two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum MigrationStanding {
    /// Source, before Commit: it owns the machine.
    Moving(Progress),
    /// Source, Commit has left, no answer yet: neither it nor anyone else may assume anything; see `Fence`.
    InDoubt,
    /// Source: ended.
    Ended(Outcome),
    /// Target: expected or being received.
    Receiving,
    /// Target: everything is here, Commit has not come.
    Ready,
    /// Target: it runs here.
    Owns {
        /// Under this epoch.
        epoch: Epoch,
    },
}

/// Why a host refused or a migration failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum RefusalCode {
    /// Not enough free RAM.
    NoRam,
    /// A CPU feature that the machine needs is missing; the detail names it.
    CpuFeature,
    /// The guest's TSC frequency cannot be kept.
    Tsc,
    /// No common protocol version.
    Version,
    /// A lower epoch than already seen.
    Stale,
    /// Busy with another migration of the same machine.
    Busy,
    /// Too late: committed.
    Committed,
    /// Not expected here (no `Prepare`), or from the wrong host.
    NotExpected,
    /// The machine is here already, or the source and target are the same.
    SameHost,
    /// The machine is not in a state for it.
    WrongState,
    /// The kernel, initial RAM disk or command line cannot be booted.
    BadBoot,
    /// The peer broke the protocol.
    Protocol,
    /// The peer cannot be reached, or was lost for longer than the limit.
    PeerLost,
    /// Cancelled.
    Cancelled,
    /// KVM, memory, disk or network of the host failed; the detail says which.
    HostError,
    /// The guest ended while it was moved.
    GuestEnded,
    /// A blob (an image, a kernel) that nobody has, or whose bytes are not what its digest says.
    NoBlob,
    /// No room on the host's disk.
    NoDisk,
}

/// A machine on a host.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct MachineReport {
    /// The machine.
    pub machine: MachineId,
    /// Highest epoch this host has seen of it.
    pub epoch: Epoch,
    /// What it does here.
    pub phase: HostPhase,
    /// Process id of its VMM in the host's namespace.
    pub vmm_pid: u32,
    /// Since the machine's vCPUs last began to run on this host, in milliseconds.
    pub running_ms: u64,
}

/// What a machine does on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum HostPhase {
    /// Being created or booted.
    Starting,
    /// Runs.
    Running,
    /// Runs, and is being copied to another host.
    MigratingOut,
    /// Stopped for the switch-over, still owned here.
    Paused,
    /// Being received.
    Incoming,
    /// Given away; late packets are forwarded.
    GivenAway,
    /// The guest ended.
    Ended,
}

/// Phase of a migration as its source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum MigrationPhase {
    /// Dialling, offering.
    Connecting,
    /// Pre-copy rounds.
    Precopy,
    /// The link is broken, the guest runs, the source tries again.
    Reconnecting,
    /// Paused: last pages, state, commit.
    Switchover,
    /// Commit has left, the answer has not come.
    InDoubt,
    /// The target runs; late packets are forwarded, the copy is released.
    Completing,
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Progress {
    /// The migration.
    pub migration: MigrationId,
    /// Phase.
    pub phase: MigrationPhase,
    /// Round of the pre-copy, from 1.
    pub round: u32,
    /// RAM of the machine, in bytes.
    pub ram_bytes: u64,
    /// Sent over all rounds, on the lanes, in bytes (headers included).
    pub sent_bytes: u64,
    /// Left to send in this round, in bytes of guest RAM and disks.
    pub remaining_bytes: u64,
    /// Pages dirtied per second in the last round.
    pub dirty_pages_per_s: u64,
    /// Goodput over the last round, bytes per second.
    pub bytes_per_s: u64,
    /// Pause if it began now, in microseconds; 0 while unknown.
    pub predicted_downtime_us: u64,
    /// Until the switch-over, in milliseconds; 0 while unknown.
    pub eta_ms: u64,
    /// Since the start, in milliseconds.
    pub elapsed_ms: u64,
}

/// How a migration ended on its source.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Outcome {
    /// The target runs the machine.
    Succeeded(Timings),
    /// It did not move; the machine runs on here.
    Failed {
        /// For programs.
        code: RefusalCode,
        /// For people.
        detail: String,
    },
    /// It was cancelled; the machine runs on here.
    Cancelled,
}

/// Where the time of a migration went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Timings {
    /// From the command to the target running, in milliseconds.
    pub total_ms: u64,
    /// Rounds, the final one included.
    pub rounds: u32,
    /// Bytes on the lanes, headers included.
    pub sent_bytes: u64,
    /// Pages sent with their content.
    pub pages_sent: u64,
    /// Pages sent as a reference to zero.
    pub pages_zero: u64,
    /// From the request to pause until the target reported the vCPUs running, in microseconds: the whole pause.
    pub pause_us: u64,
    /// Part of it: vCPUs and devices stopped.
    pub stop_us: u64,
    /// Part of it: last dirty log harvested.
    pub harvest_us: u64,
    /// Part of it: last dirty pages sent and acknowledged as received.
    pub final_copy_us: u64,
    /// Part of it: state saved (runs beside the final copy).
    pub save_us: u64,
    /// Part of it: state loaded on the target.
    pub restore_us: u64,
    /// Part of it: from Commit received to vCPUs running, on the target.
    pub resume_us: u64,
    /// Pages in the final copy.
    pub final_pages: u64,
    /// Packets that reached the source while paused and were forwarded.
    pub packets_held: u64,
}
