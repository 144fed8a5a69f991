//! Virtio devices behind memory-mapped transports (virtio 1.2, section 4.2).
//!
//! The transport is written once ([`Transport`]); a device says what it is and works on its queues ([`Device`]). The driver is hostile
//! until proven otherwise: addresses, indices and lengths may be anything. What the rules allow is bounded in work
//! per event; what they forbid puts the device into `NEEDS_RESET`, where it does nothing until the driver resets it. Neither
//! the VMM nor any other device notices.

pub mod net;
pub mod queue;
pub mod rng;
mod transport;

use std::os::fd::BorrowedFd;

use virtio_queue::Queue;

use crate::memory::GuestMemory;
use queue::QueueError;

pub use transport::{Resources, Transport, TransportError};

/// Guest-physical address of the first device's registers.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Distance from one device's registers to the next one's.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Interrupt of the first device; the others follow.
pub const GSI_BASE: u32 = 5;

/// VIRTIO_F_VERSION_1: the driver speaks virtio 1.x.
pub const F_VERSION_1: u64 = 1 << 32;

/// What came of working on a device's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Entries were given back to the driver, which is to be interrupted.
    pub used: bool,
    /// The budget ran out before the work did.
    pub more: bool,
}

/// A device behind a transport.
pub trait Device: Send {
    /// Its name in state archives and messages.
    fn name(&self) -> &'static str;
    /// Its virtio device id.
    fn id(&self) -> u32;
    /// Features it offers, besides [`F_VERSION_1`].
    fn features(&self) -> u64;
    /// Largest size of each of its queues.
    fn queue_sizes(&self) -> &'static [u16];
    /// Reads its configuration; what lies beyond it is left as it is (zero).
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Works on `queues` because the driver notified queue `index`, which is ready. A missing queue is not ready.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules.
    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError>;
    /// Works on `queues` because [`Device::host_fd`] is readable.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules.
    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let _ = (queues, memory);
        Ok(Progress::default())
    }
    /// The descriptor that makes work for the device, if it has one.
    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Whether it can do anything with a readable [`Device::host_fd`] now. If not, a notification will change that.
    fn wants_host_event(&self) -> bool {
        false
    }
    /// Goes back to the state after power-on.
    fn reset(&mut self);
}

/// The kernel command line's description of the device in `slot`, as Linux reads it.
pub fn cmdline_of(slot: usize) -> String {
    let slot32 = u32::try_from(slot).unwrap_or(0);
    format!("virtio_mmio.device=4K@{:#x}:{}", MMIO_BASE + u64::from(slot32) * MMIO_STRIDE, GSI_BASE + slot32)
}
