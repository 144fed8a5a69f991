//! Drivers for virtio devices on the modern (version 2) MMIO transport.

pub mod blk;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
