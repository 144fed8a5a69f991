//! What the target machine is told ([`TargetEvent`]) and what it asks for ([`TargetAction`]).

use crate::fleet::RefusalCode;
use crate::ids::{Epoch, HostName, MigrationId};
use crate::migration::messages::{
    ConsoleBytes, LanePoint, SourceMessage, TargetMessage, VERSIONS, VersionRange,
};
use crate::units::Instant;
use crate::vmm::MachineSpec;

/// Most actions that one event can cause: a caller's buffer of this size never grows.
pub const ACTIONS_MAX: usize = 12;

/// What the target expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetConfig {
    /// The migration.
    pub migration: MigrationId,
    /// The machine, as the control plane described it.
    pub spec: MachineSpec,
    /// Epoch under which this host will own it.
    pub epoch: Epoch,
    /// Who may offer it.
    pub source: HostName,
    /// Most lanes to accept, 1 to [`crate::migration::messages::LANES_MAX`].
    pub lanes_max: u16,
    /// Versions of the protocol to accept.
    pub versions: VersionRange,
    /// Versions of the state archive to accept.
    pub state_versions: VersionRange,
    /// Bounds in time.
    pub limits: TargetLimits,
}

impl TargetConfig {
    /// All versions of this release and the default limits.
    pub fn new(
        migration: MigrationId,
        spec: MachineSpec,
        epoch: Epoch,
        source: HostName,
        lanes_max: u16,
    ) -> Self {
        Self {
            migration,
            spec,
            epoch,
            source,
            lanes_max,
            versions: VERSIONS,
            state_versions: VersionRange { oldest: 1, newest: 1 },
            limits: TargetLimits::default(),
        }
    }
}

/// How long the target keeps what nobody asks for, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetLimits {
    /// From `Start` until the source's offer.
    pub expect_us: u64,
    /// From the loss of the link until the half-received copy, or one that waits for its Commit, is dropped.
    pub keep_us: u64,
}

impl Default for TargetLimits {
    fn default() -> Self {
        Self { expect_us: 60_000_000, keep_us: 60_000_000 }
    }
}

/// What happens to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetEvent {
    /// Begin to wait for the source. Given once, first.
    Start,
    /// A message of the authenticated source. `session` counts the connections that this host accepted, of whatever migration.
    Message {
        /// The connection's number.
        session: u64,
        /// The message.
        message: SourceMessage,
    },
    /// A connection is gone. Nothing of it is received after this, lanes included.
    LinkLost {
        /// The connection's number.
        session: u64,
    },
    /// Answers [`TargetAction::Reserve`].
    Reserved,
    /// Answers [`TargetAction::HaltLanes`].
    LanesHalted {
        /// How far each lane got, over all attempts, in the order of the lanes.
        lanes: Vec<LanePoint>,
    },
    /// A lane's round ended, and all its batches are in guest memory ([`crate::migration::lane::LaneReceiver`] checks the count and digest).
    LaneRoundDone {
        /// Which lane, from 0.
        lane: u16,
        /// Which round.
        round: u32,
        /// The lane's digest of it.
        digest: u32,
    },
    /// Answers [`TargetAction::LoadState`].
    StateLoaded {
        /// As in the action.
        round: u32,
        /// Loading, in microseconds.
        us: u64,
    },
    /// Answers [`TargetAction::InstallRoute`].
    RouteInstalled {
        /// As in the action.
        round: u32,
    },
    /// Answers [`TargetAction::Run`]: the vCPUs run.
    Running {
        /// Since the action, in microseconds.
        us: u64,
    },
    /// Answers [`TargetAction::Discard`].
    Discarded,
    /// The answer to an action that could not be done. For [`TargetOperation::Run`] it is given only if the VMM said that it did *not* run.
    OperationFailed {
        /// Which.
        operation: TargetOperation,
        /// For programs.
        code: RefusalCode,
        /// For people; names what is missing, for example the CPU feature.
        detail: String,
    },
    /// The VMM process is dead and reaped, or the guest ended. After [`TargetAction::Run`] was given this counts as a machine that ran and ended here, because
    /// it may have; a host that knows that `Run` never reached the VMM gives `OperationFailed` instead, and the source's copy is saved.
    GuestEnded,
    /// The control plane: drop it, unless it is owned here. Answered by [`TargetAction::Forgotten`] or [`TargetAction::ForgetRefused`].
    Forget,
    /// The control plane: never run it under `epoch` or below. Answered by [`TargetAction::Fenced`] or [`TargetAction::Owns`].
    Fence {
        /// The epoch.
        epoch: Epoch,
    },
    /// The time set by [`TargetAction::SetTimer`] has come. Harmless when given early or twice.
    Timer,
}

/// Actions that can fail on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetOperation {
    /// [`TargetAction::Reserve`].
    Reserve,
    /// Reading the lanes: a broken record, or the memory.
    Lanes,
    /// [`TargetAction::LoadState`].
    LoadState,
    /// [`TargetAction::InstallRoute`].
    InstallRoute,
    /// [`TargetAction::Run`].
    Run,
}

/// What the target's host is to do, in the order given. Requests to the VMM and to the network keep their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetAction {
    /// Send on the control stream of this session; if it is gone, drop it.
    Send {
        /// The connection's number.
        session: u64,
        /// The message.
        message: TargetMessage,
    },
    /// Check that the machine can run here (CPU features, TSC) and make RAM, VMM and tap for it. Answer: `Reserved` or `OperationFailed`.
    Reserve {
        /// The machine, as the source offered it.
        spec: Box<MachineSpec>,
    },
    /// Read lanes of this attempt into guest memory, and no others.
    AcceptLanes {
        /// As in the offer.
        attempt: u32,
        /// How many.
        lanes: u16,
        /// Version they are written in.
        version: u16,
    },
    /// Stop reading lanes; when the answer is given nothing more of them reaches guest memory. Answer: `LanesHalted`.
    HaltLanes,
    /// Put serial output into the console at its offset.
    WriteConsole(ConsoleBytes),
    /// Load a state archive, into a fresh VMM (on the same RAM) if this one has been given a state before. Answer: `StateLoaded` or `OperationFailed`.
    LoadState {
        /// The final round it belongs to; repeated in the answer.
        round: u32,
        /// The archive.
        state: Vec<u8>,
        /// Version it is written in.
        state_version: u16,
    },
    /// Route the machine's addresses to its tap, announce them. Answer: `RouteInstalled` or `OperationFailed`.
    InstallRoute {
        /// Repeated in the answer.
        round: u32,
    },
    /// Take the route back. No answer.
    RemoveRoute,
    /// The machine is this host's: run it. Answer: `Running`, or `OperationFailed` if it surely did not run.
    Run {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// End the VMM and free RAM, tap and routes. Answer: `Discarded`, when the process is dead. Must succeed; a host that crashes here discards when it
    /// starts again, as it does with every incoming VMM that does not run.
    Discard,
    /// Close this connection once what was sent before is handed over (best effort).
    Close {
        /// The connection's number.
        session: u64,
    },
    /// Give `Timer` at this time; replaces the time set before.
    SetTimer {
        /// When.
        at: Instant,
    },
    /// Answers `Fence`: it will never run here under this epoch.
    Fenced {
        /// The epoch fenced.
        epoch: Epoch,
    },
    /// Answers `Fence`: too late, it is owned here.
    Owns {
        /// The epoch.
        epoch: Epoch,
    },
    /// Answers `Forget`: it is gone.
    Forgotten,
    /// Answers `Forget`: too late, it is owned here.
    ForgetRefused,
    /// The migration is settled on this host. Given once; the machine still answers what comes.
    Done(TargetOutcome),
}

/// How the migration ended on the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetOutcome {
    /// The machine runs here.
    Owned {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// Nothing of it is here any more.
    Dropped {
        /// For programs.
        code: RefusalCode,
        /// For people.
        detail: String,
    },
}
