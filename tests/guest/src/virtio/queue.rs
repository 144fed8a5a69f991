//! A split virtqueue, driver side.
//!
//! The device may be hostile or broken: what it writes into the used ring is checked and else skipped. Descriptors are
//! laid out once by the drivers and never change, so a queue is only two indices.

use crate::memory::frames::Frames;
use crate::memory::physical;
use core::sync::atomic::{Ordering, fence};

/// The device writes into this buffer.
pub const DEVICE_WRITES: u16 = 2;
/// Another descriptor follows.
pub const NEXT: u16 = 1;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Where the three parts of a queue are.
pub struct Rings {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring, ours.
    pub available: u64,
    /// Used ring, the device's.
    pub used: u64,
}

impl Rings {
    /// Takes zeroed memory for a queue.
    #[must_use]
    pub fn new(size: u16, frames: &mut Frames) -> Self {
        let mut take = |words: usize| frames.take::<u64>(words).as_ptr().expose_provenance() as u64;
        let size = usize::from(size);
        Self { descriptors: take(2 * size), available: take(size / 4 + 1), used: take(size + 1) }
    }
}

/// A queue that has been given to its device.
pub struct Queue {
    rings: Rings,
    size: u16,
    available: u16,
    used: u16,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub fn new(rings: Rings, size: u16) -> Self {
        Self { rings, size, available: 0, used: 0 }
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Fills in a descriptor.
    ///
    /// # Safety
    /// If `flags` has [`DEVICE_WRITES`], the device may write the buffer whenever the descriptor has been submitted
    /// and not yet come back; no reference to it may exist then.
    pub unsafe fn describe(&mut self, index: u16, buffer: u64, bytes: u32, flags: u16, next: u16) {
        let at = self.rings.descriptors + 16 * u64::from(index % self.size);
        // SAFETY: within the descriptor table, aligned.
        unsafe { physical::write(at, buffer) };
        // SAFETY: likewise.
        unsafe { physical::write(at + 8, bytes) };
        // SAFETY: likewise.
        unsafe { physical::write(at + 12, flags) };
        // SAFETY: likewise.
        unsafe { physical::write(at + 14, next) };
    }

    /// Makes a chain available to the device.
    pub fn submit(&mut self, head: u16) {
        let at = self.rings.available + 4 + 2 * u64::from(self.available % self.size);
        // SAFETY: within the available ring, aligned.
        unsafe { physical::write(at, head) };
        self.available = self.available.wrapping_add(1);
        // The entry, and the buffers before it, before the index that shows them.
        fence(Ordering::SeqCst);
        // SAFETY: the index of the available ring.
        unsafe { physical::write(self.rings.available + 2, self.available) };
    }

    /// The next chain that came back: its head and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        loop {
            // SAFETY: the index of the used ring.
            let index: u16 = unsafe { physical::read(self.rings.used + 2) };
            if index == self.used {
                return None;
            }
            fence(Ordering::SeqCst);
            let at = self.rings.used + 4 + 8 * u64::from(self.used % self.size);
            self.used = self.used.wrapping_add(1);
            // SAFETY: within the used ring, aligned.
            let head: u32 = unsafe { physical::read(at) };
            // SAFETY: likewise.
            let bytes: u32 = unsafe { physical::read(at + 4) };
            if let Ok(head) = u16::try_from(head)
                && head < self.size
            {
                return Some((head, bytes));
            }
        }
    }

    /// Whether the device wants to be told of what was submitted.
    #[must_use]
    pub fn wants_notify(&self) -> bool {
        fence(Ordering::SeqCst);
        // SAFETY: the flags of the used ring.
        let flags: u16 = unsafe { physical::read(self.rings.used) };
        flags & NO_NOTIFY == 0
    }

    /// Asks for interrupts, or for none. The device may be late to notice.
    pub fn set_interrupts(&mut self, on: bool) {
        // SAFETY: the flags of the available ring.
        unsafe { physical::write(self.rings.available, if on { 0 } else { NO_INTERRUPT }) };
        fence(Ordering::SeqCst);
    }
}
