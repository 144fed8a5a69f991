//! The target of a migration as a pure state machine.
//!
//! ```text
//!            Start                Offer                Reserved
//!   Idle ───────────> Expecting ────────> Reserving ─────────────> Receiving <────────────┐
//!                                                                   │     │ Offer again   │ LanesHalted
//!                                                       Final       v     └──────────> Halting
//!                                                               Finishing ── Offer again ─^ ^
//!                                     all lanes, state, route       v                       │
//!                                                                 Ready ───── Offer again ──┘
//!                                                                   │ Commit
//!  ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─v─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
//!                                                              Committing ──> Owned
//!   any state above the line: failure, cancel, forget, fence, too long without a link
//!     └──> Discarding ──> Gone: answers every Commit with Abort, for ever
//! ```
//!
//! Above the line nothing ever runs here, and dropping the copy is always safe: the source keeps the machine's memory until it hears
//! `Running`. From the moment of dropping there is no way to `Run`. Below the line the machine is this host's, and neither
//! cancel nor fence changes that. When the link breaks, what has been received is kept for a bounded time; the source's next
//! `Offer` (or `Commit`) goes on from there.

mod api;
mod machine;

pub use api::{
    ACTIONS_MAX, TargetAction, TargetConfig, TargetEvent, TargetLimits, TargetOperation, TargetOutcome,
};
pub use machine::{Illegal, Target};
