//! `mashines-control`: the fleet's memory and its decisions.
//!
//! A request travels so: [`rest`] parses it into types of [`api`], the [`core`] checks it against the records and
//! changes them, the [`store`] keeps the change, and only then the answer leaves and commands go to hosts over [`hosts`].
//! Where a machine goes is decided by [`placement`], how a migration gets from one end to the other by the [`saga`].
//!
//! The control plane is never in the way of running machines: hosts that lose it go on, finish what both ends have begun,
//! and report later. It may be killed at any moment; the next start takes up all unfinished work.

pub mod api;
pub mod core;
pub mod hosts;
pub mod placement;
pub mod rest;
pub mod saga;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
