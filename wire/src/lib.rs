//! The ground of mashines: ids, units, page sets, frames, and the migration protocol as pure state machines.
//!
//! Nothing in this crate does I/O, reads a clock or knows an async runtime. What crosses a process boundary in
//! mashines is a type of this crate, archived with rkyv and read back only through validated access, so that bytes
//! from a guest, a peer or a user are checked once, here, and are types from then on.
//!
//! * [`ids`], [`units`]: names and quantities that cannot be mixed up.
//! * [`frame`]: the envelope of every message (magic, version, length cap, checksum).
//! * [`pages`]: sets and runs of page numbers.
//! * [`space`], [`disk`]: RAM and disks as one range of pages; the file of a disk.
//! * [`vmm`]: what `mashined` and a `mashine-vmm` process say to each other.
//! * [`state`]: archives of vCPU, chip and device state.
//! * [`migration`]: the migration protocol: messages, source and target machines, convergence policy.
//! * [`cpu`]: CPU profiles: what a guest may see of a CPU.
//! * [`fleet`], [`streams`]: what hosts and the control plane say to each other.
//! * [`agent`]: what a client and the agent within a guest say to each other; sessions that outlive their connection.

pub mod agent;
pub mod cpu;
pub mod disk;
pub mod fleet;
pub mod frame;
pub mod ids;
pub mod migration;
pub mod pages;
pub mod space;
pub mod state;
pub mod streams;
pub mod units;
pub mod vmm;
