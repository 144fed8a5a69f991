//! Virtio devices behind memory-mapped transports (virtio 1.2, section 4.2).
//!
//! The transport is written once ([`Transport`]); a device says what it is and works on its queues ([`Device`]). The driver is hostile
//! until proven otherwise: addresses, indices and lengths may be anything. What the rules allow is bounded in work
//! per event; what they forbid puts the device into `NEEDS_RESET`, where it does nothing until the driver resets it. Neither
//! the VMM nor any other device notices.

pub mod blk;
pub mod net;
pub mod queue;
pub mod rng;
mod transport;
pub mod vsock;

use std::os::fd::BorrowedFd;

use virtio_queue::Queue;

use crate::acpi::MmioDevice;
use crate::memory::GuestMemory;
use queue::QueueError;

pub use transport::{Resources, Transport, TransportError};

/// Guest-physical address of the first device's registers.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Distance from one device's registers to the next one's.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Interrupts by slot. Left out are what a PC uses otherwise: timer, keyboard and cascade (0-2), serial ports (3, 4), clock (8),
/// the platform's events (9), FPU (13). All are edges on one pin of the only IOAPIC, which has 24. The order is part of the guest's
/// view, and so of the state format: it may grow and never change.
const GSIS: [u32; SLOTS_MAX] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// Most devices that a machine can have.
pub const SLOTS_MAX: usize = 16;

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
    /// Finishes everything that is under way, and gives it to the driver: the machine pauses.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules.
    fn quiesce(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let _ = (queues, memory);
        Ok(Progress::default())
    }
    /// Its transport has taken on a saved state: the guest runs on here, on what may be another host.
    fn restored(&mut self) {}
    /// Goes back to the state after power-on.
    fn reset(&mut self);
}

/// Interrupt of the device in `slot`, below [`SLOTS_MAX`].
pub fn gsi_of(slot: usize) -> Option<u32> {
    GSIS.get(slot).copied()
}

/// Guest-physical address of the registers of the device in `slot`.
pub fn base_of(slot: usize) -> u64 {
    MMIO_BASE + u64::try_from(slot).unwrap_or(0) * MMIO_STRIDE
}

/// The kernel command line's description of the device in `slot`, as Linux reads it. For guests without ACPI.
pub fn cmdline_of(slot: usize) -> Option<String> {
    let gsi = gsi_of(slot)?;
    Some(format!("virtio_mmio.device=4K@{:#x}:{gsi}", base_of(slot)))
}

/// The device in `slot`, for the ACPI tables.
pub fn acpi_of(slot: usize) -> Option<MmioDevice> {
    let base = u32::try_from(base_of(slot)).ok()?;
    Some(MmioDevice { base, bytes: u32::try_from(MMIO_STRIDE).ok()?, gsi: gsi_of(slot)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_devices_share_an_interrupt_with_each_other_or_with_the_platform() {
        let gsis: Vec<u32> = (0..SLOTS_MAX).filter_map(gsi_of).collect();
        assert_eq!(gsis.len(), SLOTS_MAX);
        for (slot, gsi) in gsis.iter().enumerate() {
            assert!(!gsis[..slot].contains(gsi), "{gsi} twice");
            assert!(*gsi < 24 && ![0, 1, 2, 3, 4, 8, 9, 13].contains(gsi), "{gsi}");
        }
        // Machines that were saved by the first release have their devices here.
        assert_eq!(gsis[..3], [5, 6, 7]);
        assert_eq!(gsi_of(SLOTS_MAX), None);
        assert_eq!(cmdline_of(1).unwrap(), "virtio_mmio.device=4K@0xd0001000:6");
    }
}
