//! The source of a migration as a pure state machine.
//!
//! ```text
//!              Start
//!   Idle ────────────> Linking <──────────────────────── link lost ──┐
//!                        │ Accept                                    │
//!                        v                                           │
//!                   StartingLog ──> Sending <──> Counting ──> Draining
//!                   (not on resume)    next round    │           │   guest runs
//!  ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─│─ ─ ─ ─ ─ ─ │─ ─ ─ ─ ─ ─
//!                                      switch over   v           v   guest paused
//!   Resuming <── link lost, failure, cancel ───── Pausing ──> Finishing
//!     │   └──> Linking, or Ended                                 │ Ready, digest as ours
//!     v                                                          v
//!   Ended                                                     Disowning
//!  ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ │ ─ ─ ─ ─ ─ ─
//!                                                                v   not owned
//!   Ended <── Releasing <────────── Running, TargetOwns ────── InDoubt ── Commit, again after each reconnect
//!   Ended <── Reclaiming <────────────── Reclaim ─────────────────┘
//! ```
//!
//! Above the second line the source owns the machine: any failure, the loss of the link and a cancel resume the guest. What was sent and is
//! not proven applied goes back to the dirty bitmap when the link is back; a fresh target gets everything again.
//! Below it the source does nothing by itself but repeat `Commit`: only the target's word that it runs, or the control plane's, ends the doubt.

mod api;
mod machine;

pub use api::{ACTIONS_MAX, Sent, SourceAction, SourceConfig, SourceEvent, SourceLimits, SourceOperation};
pub use machine::{Illegal, Source};
