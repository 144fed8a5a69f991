//! Messages of the control stream, one enum for each direction. Frames of kind [`Kind::Migration`].
//!
//! The first message on every connection is [`SourceMessage::Offer`] or, once the source has given the machine away,
//! [`SourceMessage::Commit`]; both name their migration, so that the target's host knows whom it concerns. [`Offer`] is
//! written in the oldest version the source speaks and keeps its layout for ever; all else is in the version of
//! [`Accept`].

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]

use rkyv::{Archive, Deserialize, Serialize};

use crate::fleet::RefusalCode;
use crate::frame::{Kind, Message};
use crate::ids::{Epoch, HostName, MigrationId};
use crate::vmm::MachineSpec;

/// Newest version of the migration protocol, control stream and lanes alike.
/// * 1: first.
/// * 2: disks travel behind RAM; the machine offered names them.
pub const VERSION: u16 = 2;

/// All versions this release speaks.
pub const VERSIONS: VersionRange = VersionRange { oldest: 2, newest: VERSION };

/// Most lanes of one migration: what bounds the lists that speak of lanes.
pub const LANES_MAX: u16 = 256;

/// A range of versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct VersionRange {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

/// The highest version that both ranges hold.
pub fn negotiate(ours: VersionRange, theirs: VersionRange) -> Option<u16> {
    let newest = ours.newest.min(theirs.newest);
    (newest >= ours.oldest && newest >= theirs.oldest).then_some(newest)
}

/// What the source says.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum SourceMessage {
    /// First on a connection while the source owns the machine. Answer: [`TargetMessage::Accept`] or [`TargetMessage::Refuse`].
    Offer(Box<Offer>),
    /// Serial output so far, so that the log follows the machine. No answer.
    Console(ConsoleBytes),
    /// The machine is paused: its state, while the last pages are still on the lanes. Answer: [`TargetMessage::Ready`] once
    /// the lanes have ended `round` and the state is loaded.
    Final(Final),
    /// The machine is the target's from here on. First on a connection after the source gave the machine away; safe to repeat. Answer:
    /// [`TargetMessage::Running`], or [`TargetMessage::Abort`] from a target that dropped its copy and never will run it.
    Commit(Commit),
    /// The source has seen [`TargetMessage::Running`]; nothing more follows. No answer.
    Finished,
    /// The migration was cancelled; drop everything. No answer.
    Cancel,
    /// The migration failed; drop everything. No answer.
    Abort {
        /// For programs.
        code: RefusalCode,
        /// For people.
        detail: String,
    },
}

/// What is offered, and by whom.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Offer {
    /// Versions of this protocol the source speaks.
    pub versions: VersionRange,
    /// Versions of the state archive it can write.
    pub state_versions: VersionRange,
    /// The migration.
    pub migration: MigrationId,
    /// Counts the connections of this migration, from 1. The target takes no lower one than it has seen.
    pub attempt: u32,
    /// Changes when the source's host is restarted: it has then forgotten what it sent, and the target, which has not, refuses it
    /// (`Stale`) so that a new migration begins.
    pub incarnation: u64,
    /// The machine.
    pub spec: MachineSpec,
    /// Under which epoch the source owns it.
    pub epoch: Epoch,
    /// Under which the target will.
    pub to_epoch: Epoch,
    /// Lanes wanted, 1 to [`LANES_MAX`]; after a reconnect, the number accepted before.
    pub lanes: u16,
    /// The source's name; must be the one in its certificate.
    pub source: HostName,
    /// Pause aimed for, in microseconds. Tells the target how eagerly to prepare; it promises nothing.
    pub downtime_budget_us: u64,
}

/// Serial output from an absolute offset on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ConsoleBytes {
    /// Offset of the first byte since the machine's boot.
    pub offset: u64,
    /// The bytes, at most [`crate::vmm::CONSOLE_RING_BYTES`].
    pub bytes: Vec<u8>,
}

impl ConsoleBytes {
    /// Offset behind the last byte.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.len() as u64)
    }
}

/// State of a paused machine.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Final {
    /// The round that carries the last pages.
    pub round: u32,
    /// The state archive ([`crate::state`]).
    pub state: Vec<u8>,
    /// Serial output since the last [`SourceMessage::Console`].
    pub console: ConsoleBytes,
}

/// Gives the machine away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Commit {
    /// The migration.
    pub migration: MigrationId,
    /// The epoch under which the target owns the machine.
    pub epoch: Epoch,
    /// As in [`Offer::attempt`].
    pub attempt: u32,
}

/// What the target says.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum TargetMessage {
    /// To [`SourceMessage::Offer`]: send.
    Accept(Accept),
    /// To [`SourceMessage::Offer`]: no. Nothing is kept.
    Refuse {
        /// For programs.
        code: RefusalCode,
        /// For people; names what is missing, for example the CPU feature.
        detail: String,
    },
    /// Each lane has ended `round` or a later one: what those rounds carried is in the target's memory.
    RoundReceived {
        /// The round.
        round: u32,
    },
    /// To [`SourceMessage::Final`]: all is here, loaded, and the route is in place.
    Ready {
        /// The final round.
        round: u32,
        /// [`super::lane::ready_digest`] of what was received.
        digest: u32,
    },
    /// To [`SourceMessage::Commit`]: it runs here.
    Running(Running),
    /// The target has dropped its copy, or never had one, and will never run the machine under this migration's epoch. An answer to
    /// whatever came, or unasked.
    Abort {
        /// For programs.
        code: RefusalCode,
        /// For people.
        detail: String,
    },
}

/// The target's terms.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Accept {
    /// Version that both ends use from here on.
    pub version: u16,
    /// Version of the state archive to write.
    pub state_version: u16,
    /// The offer this answers.
    pub attempt: u32,
    /// Lanes to open, at most those offered.
    pub lanes: u16,
    /// What the target holds from earlier connections of this migration; `None`: nothing.
    pub resume: Option<Resume>,
}

/// What a target holds after a reconnect.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Resume {
    /// Every round up to this one has been applied whole; 0: none.
    pub round: u32,
    /// How far each lane got, in the order of the lanes.
    pub lanes: Vec<LanePoint>,
    /// Serial output is there up to this offset.
    pub console_end: u64,
}

/// An in-order point of a lane: everything before batch number `batches` (from 0) of `round` has been applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct LanePoint {
    /// The round the lane was in; 0: none yet.
    pub round: u32,
    /// Batches of that round that were applied.
    pub batches: u32,
}

/// The target owns and runs the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Running {
    /// Under this epoch.
    pub epoch: Epoch,
    /// Loading the state, in microseconds.
    pub restore_us: u64,
    /// From Commit received to vCPUs running, in microseconds; 0 if this host was restarted since.
    pub resume_us: u64,
}

impl SourceMessage {
    /// The migration and attempt that a message which opens a connection speaks of; `None` for the others.
    pub fn opens(&self) -> Option<(MigrationId, u32)> {
        match self {
            Self::Offer(offer) => Some((offer.migration, offer.attempt)),
            Self::Commit(commit) => Some((commit.migration, commit.attempt)),
            Self::Console(_) | Self::Final(_) | Self::Finished | Self::Cancel | Self::Abort { .. } => None,
        }
    }

    /// What a host answers to a connection that opens with this message when it knows nothing of the migration: to an offer a refusal,
    /// and to a commit the evidence that no copy is here.
    pub fn answer_of_a_stranger(&self) -> TargetMessage {
        match self {
            Self::Offer(offer) => TargetMessage::Refuse {
                code: RefusalCode::NotExpected,
                detail: format!(
                    "{} is not expected here: it was not prepared, or no longer is",
                    offer.migration
                ),
            },
            _ => TargetMessage::Abort {
                code: RefusalCode::NotExpected,
                detail: "no copy of this migration is here, and none will run".to_owned(),
            },
        }
    }
}

/// Longest text of a peer that is kept, in bytes.
const DETAIL_BYTES_MAX: usize = 512;

/// A peer's text, cut to a length that fits a log line.
pub(crate) fn clip(mut detail: String) -> String {
    if let Some((at, _)) = detail.char_indices().find(|(at, c)| at + c.len_utf8() > DETAIL_BYTES_MAX) {
        detail.truncate(at);
        detail.shrink_to_fit();
    }
    detail
}

impl Message for SourceMessage {
    const KIND: Kind = Kind::Migration;
}

impl Message for TargetMessage {
    const KIND: Kind = Kind::Migration;
}
