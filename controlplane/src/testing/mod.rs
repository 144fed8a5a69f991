//! Fake hosts for tests: they speak the real protocol, and migrate machines that are a few fields each.
//!
//! * [`World`]: what all fake hosts have, with the rules of ownership and the faults that tests inject.
//! * [`FakeHost`]: one of them, connected over real QUIC.

mod host;
mod world;

pub use host::FakeHost;
pub use world::{Fault, Step, World};
