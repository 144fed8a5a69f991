//! Developer commands, as a library, so that the end-to-end tests bring up the same fleets as `cargo xtask up` does.
//!
//! * [`setup`]: what the machine must have; [`packages`]: what is only unpacked.
//! * [`repository`]: the work tree and what is built from it.
//! * [`check`]: the rules of the house.
//! * [`fleet`]: a control plane and hosts on this machine.
//! * [`lab`]: the same with emulated hosts that have complete KVM.
//! * [`demo`]: the main job, watched from all sides.
//! * [`test`]: everything that can be tested here; [`suites`], [`sim`] and [`fuzz`] are its parts.
//! * [`bench`]: the benchmarks. [`extras`]: subcommands of cargo that not everybody has.
//! * [`report`]: what a long command did.

pub mod ability;
mod answers;
pub mod bench;
pub mod check;
pub mod command;
pub mod demo;
pub mod extras;
pub mod fleet;
pub mod fuzz;
pub mod lab;
pub mod packages;
pub mod report;
pub mod repository;
pub mod setup;
pub mod signals;
pub mod sim;
pub mod sources;
pub mod story;
pub mod suites;
pub mod test;
