//! What the source machine is told ([`SourceEvent`]) and what it asks for ([`SourceAction`]).

use crate::fleet::{Outcome, Progress, RefusalCode};
use crate::ids::{Epoch, HostName, MigrationId};
use crate::migration::convergence::Policy;
use crate::migration::messages::{
    ConsoleBytes, Resume, SourceMessage, TargetMessage, VERSIONS, VersionRange,
};
use crate::units::Instant;
use crate::vmm::MachineSpec;

/// Most actions that one event can cause: a caller's buffer of this size never grows.
pub const ACTIONS_MAX: usize = 12;

/// What the source is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceConfig {
    /// The migration.
    pub migration: MigrationId,
    /// A number that changes each time the host's daemon starts, such as its boot nonce. 0 only where that cannot happen.
    pub incarnation: u64,
    /// The machine.
    pub spec: MachineSpec,
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Epoch under which the target will.
    pub to_epoch: Epoch,
    /// This host.
    pub source: HostName,
    /// The other host.
    pub target: HostName,
    /// Lanes to ask for, 1 to [`crate::migration::messages::LANES_MAX`].
    pub lanes: u16,
    /// Versions of the protocol to offer.
    pub versions: VersionRange,
    /// Versions of the state archive to offer.
    pub state_versions: VersionRange,
    /// When to switch over.
    pub policy: Policy,
    /// Bounds in time.
    pub limits: SourceLimits,
}

impl SourceConfig {
    /// All versions of this release, the default policy and limits. A host sets `incarnation` besides.
    pub fn new(
        migration: MigrationId,
        spec: MachineSpec,
        (epoch, to_epoch): (Epoch, Epoch),
        (source, target): (HostName, HostName),
        lanes: u16,
    ) -> Self {
        Self {
            migration,
            incarnation: 0,
            spec,
            epoch,
            to_epoch,
            source,
            target,
            lanes,
            versions: VERSIONS,
            state_versions: VersionRange { oldest: 1, newest: 1 },
            policy: Policy::default(),
            limits: SourceLimits::default(),
        }
    }
}

/// How long the source waits for what, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceLimits {
    /// Without an accepted connection, before the migration fails. Not applied once the machine was given away: then it tries for ever.
    pub unreachable_us: u64,
    /// Before the second try to connect; doubles with each further one.
    pub retry_first_us: u64,
    /// Between two tries at most.
    pub retry_most_us: u64,
    /// From the request to pause until `Ready`, before the guest is resumed and the link is given up: a link that dies in the pause must not
    /// freeze the guest until the transport notices.
    pub switchover_us: u64,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            unreachable_us: 30_000_000,
            retry_first_us: 50_000,
            retry_most_us: 2_000_000,
            switchover_us: 3_000_000,
        }
    }
}

/// What a round put on the lanes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// The round.
    pub round: u32,
    /// Pages with content.
    pub pages: u64,
    /// Pages as a reference to zero.
    pub zero_pages: u64,
    /// Bytes on the lanes, headers included.
    pub bytes: u64,
    /// From [`SourceAction::SendRound`] until the transport had taken the last byte, in microseconds.
    pub us: u64,
}

/// What happens to the source.
///
/// Events that answer an action are given exactly once for each action, unless [`SourceAction::Disconnect`] or the end of the link made the
/// action moot; a late one is told apart by its round or attempt and ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// Begin. Given once, first, to a machine made by [`super::Source::new`] or [`super::Source::recover`].
    Start,
    /// The control stream of this attempt is open, and lanes can be opened.
    Connected {
        /// As in [`SourceAction::Connect`].
        attempt: u32,
    },
    /// This attempt failed to connect, or its connection (any shard's) is gone. No message or lane of it is sent or received after this.
    LinkLost {
        /// As in [`SourceAction::Connect`].
        attempt: u32,
    },
    /// A message of the target, received on this attempt's connection.
    Message {
        /// As in [`SourceAction::Connect`].
        attempt: u32,
        /// The message.
        message: TargetMessage,
    },
    /// Answers [`SourceAction::StartDirtyLog`].
    DirtyLogStarted,
    /// Answers [`SourceAction::SendRound`]: the transport has taken the last byte; received need it not be.
    RoundSent(Sent),
    /// Answers [`SourceAction::CountDirty`].
    Dirty {
        /// As in the action.
        round: u32,
        /// Pages to send now, in the dirty log and the shared bitmap together.
        pages: u64,
    },
    /// Answers [`SourceAction::ReadConsole`].
    ConsoleRead(ConsoleBytes),
    /// Answers [`SourceAction::Pause`]: vCPUs and devices have stopped, the dirty log is in the shared bitmap.
    Paused {
        /// Until all had stopped, in microseconds.
        stop_us: u64,
        /// Harvesting, in microseconds.
        harvest_us: u64,
        /// Pages to send now.
        dirty_pages: u64,
    },
    /// Answers [`SourceAction::SendFinal`]: the transport has taken the last byte.
    FinalSent {
        /// What was sent.
        sent: Sent,
        /// [`crate::migration::lane::LaneSender::digest`] of each lane's final round, in the order of the lanes.
        lane_digests: Vec<u32>,
    },
    /// Answers [`SourceAction::Save`].
    Saved {
        /// The state archive.
        state: Vec<u8>,
        /// Serial output from the offset the action gave.
        console: ConsoleBytes,
        /// Saving, in microseconds.
        us: u64,
    },
    /// Answers [`SourceAction::Disown`]: the VMM has recorded it.
    Disowned,
    /// Answers [`SourceAction::ResumeGuest`]: the guest runs.
    Resumed,
    /// Answers [`SourceAction::Reclaim`]: the guest runs here again under the new epoch.
    Reclaimed,
    /// Answers [`SourceAction::Release`].
    Released,
    /// The answer to an action that could not be done. For [`SourceOperation::Disown`] it is given only if the VMM said that it did *not* record it.
    OperationFailed {
        /// Which.
        operation: SourceOperation,
        /// Why, for people.
        detail: String,
    },
    /// The guest ended by itself, or its VMM process is dead (and reaped: it can run nothing any more).
    GuestEnded,
    /// Cancel. Answered by [`SourceAction::Done`] or [`SourceAction::CancelRefused`].
    Cancel,
    /// The control plane says: the target was fenced (or is known to have dropped its copy under that fence), take the machine back. Answered by [`SourceAction::Done`]
    /// or [`SourceAction::ReclaimRefused`].
    Reclaim {
        /// The new epoch, above the target's.
        epoch: Epoch,
    },
    /// The control plane says: the target owns and runs the machine. Settles a doubt when the two hosts cannot reach each other.
    TargetOwns {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// The time set by [`SourceAction::SetTimer`] has come. Harmless when given early or twice.
    Timer,
}

/// Actions that can fail on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceOperation {
    /// [`SourceAction::StartDirtyLog`].
    StartDirtyLog,
    /// [`SourceAction::SendRound`], [`SourceAction::SendFinal`] or [`SourceAction::CountDirty`], for another reason than the link.
    Send,
    /// [`SourceAction::Pause`].
    Pause,
    /// [`SourceAction::Save`].
    Save,
    /// [`SourceAction::Disown`].
    Disown,
    /// [`SourceAction::ResumeGuest`].
    ResumeGuest,
    /// [`SourceAction::Reclaim`].
    Reclaim,
}

/// What the source's host is to do, in the order given.
///
/// Requests to the VMM keep their order. Sends on the control stream keep their order. [`SourceAction::SendRound`] and
/// [`SourceAction::SendFinal`] run on the lanes, beside what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceAction {
    /// Dial all shards of the target and open the control stream. Answer: `Connected` or `LinkLost` with this attempt.
    Connect {
        /// Counts up from 1.
        attempt: u32,
    },
    /// Stop what this attempt still sends, after the control messages given before this were handed over (best effort), and close its
    /// connections. No event need follow.
    Disconnect {
        /// Which connection.
        attempt: u32,
    },
    /// Send on the control stream of the newest attempt. If it is gone, drop it.
    Send(SourceMessage),
    /// Open this many lanes on the newest attempt's connections, [`crate::migration::lane::LaneRecord::Open`] first on each.
    OpenLanes {
        /// The attempt.
        attempt: u32,
        /// How many.
        lanes: u16,
        /// Version to write.
        version: u16,
    },
    /// Switch dirty logging on, with all pages dirty (also when it is on), and empty the ledger. Answer: `DirtyLogStarted`.
    StartDirtyLog,
    /// Switch dirty logging off and empty the ledger; at leisure. No answer.
    StopDirtyLog,
    /// Everything in the ledger that `received` does not prove to be applied goes back into the dirty bitmap; the ledger is empty after.
    GiveBackDirty {
        /// What the target has.
        received: Resume,
    },
    /// Rounds up to this one are applied: the ledger may forget them.
    Confirm {
        /// The round.
        round: u32,
    },
    /// Take and send every dirty page once, then end the round on each lane. Answer: `RoundSent`.
    SendRound {
        /// Its number, above all before.
        round: u32,
    },
    /// Bring the dirty log up to date and count. Answer: `Dirty`.
    CountDirty {
        /// The round just sent; repeated in the answer.
        round: u32,
    },
    /// Read serial output from `from` on (or from the oldest byte still there). Answer: `ConsoleRead`.
    ReadConsole {
        /// Absolute offset.
        from: u64,
    },
    /// Pause the guest and harvest the dirty log. Answer: `Paused`.
    Pause,
    /// The guest is paused: take and send every dirty page, on all lanes at once, then end the round on each. Answer: `FinalSent`.
    SendFinal {
        /// Its number.
        round: u32,
    },
    /// Save the state, and read serial output. Answer: `Saved`.
    Save {
        /// Where the serial output goes on.
        console_from: u64,
        /// Version of the archive.
        state_version: u16,
    },
    /// Have the VMM record that the machine is given away. Answer: `Disowned`. If the answer is lost with the VMM's connection, ask again.
    Disown {
        /// The target's epoch.
        epoch: Epoch,
    },
    /// Forward packets for the machine to the target, those held during the pause first.
    SwitchForward,
    /// Run the guest again under the old epoch; packets are its own. Answer: `Resumed`.
    ResumeGuest {
        /// The source's epoch.
        epoch: Epoch,
    },
    /// Have the VMM take the machine back, take back the route, run the guest. Answer: `Reclaimed`.
    Reclaim {
        /// The new epoch.
        epoch: Epoch,
    },
    /// End the VMM and free the RAM; keep forwarding late packets for as long as the fabric may need. Answer: `Released`.
    Release,
    /// Tell who watches. Given at each change of phase and after each round; [`super::Source::progress`] gives the same at any time.
    Progress(Progress),
    /// Give `Timer` at this time; replaces the time set before.
    SetTimer {
        /// When.
        at: Instant,
    },
    /// The machine was given away and the target says that it dropped its copy: the control plane may fence it and reclaim. Given once.
    TargetDropped,
    /// Answers `Cancel`: too late, or nothing to cancel.
    CancelRefused,
    /// Answers `Reclaim`: not given away, or the epoch is too low.
    ReclaimRefused {
        /// Why.
        code: RefusalCode,
    },
    /// The migration has ended. Last action but for refusals.
    Done(Outcome),
}
