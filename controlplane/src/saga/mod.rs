//! Migration as a saga: what state it is in, and what follows from what is learnt.
//!
//! ```text
//! Pending --Start--> Preparing --Prepared--> Moving --Succeeded-------------------> Ended(Succeeded)
//!    |                   |                   |  ^  \--Failed, Cancelled, refused--> Ended(...)
//!    |                   |        source lost|  |source says: still moving              ^
//!    |                   |        or unsure  v  |                                       |
//!    |                   |                 InDoubt --target owns, source says ended-----+
//!    |                   |                   | source is unsure, target is not owner    |
//!    |                   |                   v                                          |
//!    |                   |                Fencing --Owns--------------------------------+
//!    |                   |                   | Done: the target never will              |
//!    |                   |                   v                                          |
//!    |                   |               Reclaiming --Done, or the machine is gone------+
//!    +--Cancel-----------+--Cancel, refused, target lost--------------------------------+
//! ```
//!
//! [`next`] is the one transition function, for live runs and after a restart alike. The state is logged before anything
//! is done about it, and what is to be done follows from the state alone ([`crate::core`] sends the commands that a
//! state calls for until they are answered). So there is no replay to speak of: a restarted control plane reads the
//! state and goes on. Every command is idempotent, which makes sending one twice harmless.
//!
//! The rule that keeps two copies from running: the record of who owns the machine changes only on the word of a host that owns it
//! (`Succeeded` from the source, `Owns` from the target), or after the target promised never to run it (`Fencing` done).

mod next;

pub use next::{Illegal, next};

use serde::{Deserialize, Serialize};
use wire::ids::Epoch;

use crate::api::Timings;
use crate::store::records::epoch;

/// Where a migration is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Waits for its turn.
    Pending,
    /// The target is asked to reserve.
    Preparing,
    /// The source is told to move the machine, and moves it.
    Moving {
        /// What the target answered.
        route: Route,
        /// Whether the source said that it has begun.
        begun: bool,
    },
    /// The source is out of sight, or unsure itself. Both are asked.
    InDoubt {
        /// What the target answered.
        route: Route,
        /// Whether the source is known not to be able to tell by itself.
        source_unsure: bool,
        /// Whether the target said that it does not own the machine.
        target_not_owner: bool,
    },
    /// The target is asked to promise that it never runs the machine under this migration's epoch.
    Fencing,
    /// The source is told to take the machine back.
    Reclaiming {
        /// Under this epoch, above the migration's.
        #[serde(with = "epoch")]
        epoch: Epoch,
    },
    /// It has ended.
    Ended {
        /// How.
        end: End,
    },
}

/// How to reach the target, from its answer to `Prepare`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `ip:port` of each shard.
    pub addresses: Vec<String>,
    /// Fabric address for the forward route.
    pub forward_ip4: std::net::Ipv4Addr,
    /// Fabric address for the forward route.
    pub forward_ip6: std::net::Ipv6Addr,
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum End {
    /// The target owns the machine.
    Succeeded {
        /// From the source; absent if it could not say.
        timings: Option<Timings>,
    },
    /// The machine did not move.
    Failed {
        /// For programs.
        code: String,
        /// For people.
        detail: String,
        /// Whether the machine runs on its source as far as is known (it may have been lost with it).
        machine_lost: bool,
    },
    /// It was cancelled; the machine did not move.
    Cancelled,
}

impl End {
    /// A failure that leaves the machine where it was.
    pub fn failed(code: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Failed { code: code.into(), detail: detail.into(), machine_lost: false }
    }
}

/// What a saga learns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Its turn has come.
    Start,
    /// Somebody asks to cancel, and nothing has been sent to the source yet.
    CancelBeforeMove,
    /// The target reserved.
    Prepared(Route),
    /// The target refused, or is lost before it answered.
    PrepareFailed {
        /// For programs.
        code: String,
        /// For people.
        detail: String,
    },
    /// The source has begun.
    Begun,
    /// The source refused to begin.
    MoveRefused {
        /// For programs.
        code: String,
        /// For people.
        detail: String,
    },
    /// The source cancelled, or had never begun when told to cancel.
    CancelDone,
    /// The source has fallen silent, or has been unsure for too long.
    SourceUnsure {
        /// Whether the source itself says that it cannot tell (rather than being out of sight).
        said_so: bool,
    },
    /// The source is in sight and still owns and moves the machine.
    SourceMoving,
    /// The source says how it ended.
    SourceEnded(End),
    /// The target says that it does not own the machine.
    TargetNotOwner,
    /// The target owns the machine.
    TargetOwns,
    /// The target promised never to run it. The epoch is the one to reclaim under.
    Fenced {
        /// Above every epoch given out so far.
        reclaim: Epoch,
    },
    /// The source runs the machine again.
    Reclaimed,
    /// The source no longer has the machine.
    MachineGone,
}

impl State {
    /// Whether it has ended.
    pub const fn is_ended(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }

    /// Whether it counts against the number of migrations that a host takes at once. A saga in doubt moves no bytes.
    pub const fn takes_slot(&self) -> bool {
        matches!(self, Self::Preparing | Self::Moving { .. })
    }
}
