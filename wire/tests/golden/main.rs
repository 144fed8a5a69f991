//! Golden bytes: every message as the frame it is today. A change here is a change of a format and needs a new version (and
//! an entry in its list). `MASHINES_BLESS=1 cargo test -p wire --test golden` writes the files anew.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod agent;
#[path = "../common/mod.rs"]
mod common;
mod golden;
mod migration;
