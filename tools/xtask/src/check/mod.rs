//! `cargo xtask check`: the rules of the house, run as a test.
//!
//! Formatting, lints, licences; that dependencies point down; that files stay small; that `unsafe` is only where ARCHITECTURE.md says.

mod hygiene;
mod layering;
mod licences;
mod lints;
mod size;
mod steps;
mod unsafe_list;

pub use steps::run;
