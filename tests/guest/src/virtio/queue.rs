//! A split virtqueue, driver side.
//!
//! The device may be hostile or broken: what it writes into the used ring is checked and else skipped. Descriptors are
//! laid out once by the drivers and never change, so a queue is only two indices.

use crate::memory::frames::Frames;
use crate::memory::window::Window;
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
    pub descriptors: Window,
    /// Available ring, ours.
    pub available: Window,
    /// Used ring, the device's.
    pub used: Window,
}

impl Rings {
    /// Takes zeroed memory for a queue.
    #[must_use]
    pub fn new(size: u16, frames: &mut Frames) -> Self {
        let size = usize::from(size);
        Self {
            descriptors: frames.share(16 * size),
            available: frames.share(4 + 2 * size),
            used: frames.share(4 + 8 * size),
        }
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

    /// Fills in a descriptor. With [`DEVICE_WRITES`] the device may write the buffer whenever it likes.
    pub fn describe(&mut self, index: u16, buffer: &Window, bytes: u32, flags: u16, next: u16) {
        let at = 16 * u64::from(index % self.size);
        let whole = buffer.part(0, u64::from(bytes));
        self.rings.descriptors.write(at, whole.at());
        self.rings.descriptors.write(at + 8, bytes);
        self.rings.descriptors.write(at + 12, flags);
        self.rings.descriptors.write(at + 14, next);
    }

    /// Makes a chain available to the device.
    pub fn submit(&mut self, head: u16) {
        self.rings.available.write(4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        // The entry, and the buffers before it, before the index that shows them.
        fence(Ordering::SeqCst);
        self.rings.available.write(2, self.available);
    }

    /// The next chain that came back: its head and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        loop {
            if self.rings.used.read::<u16>(2) == self.used {
                return None;
            }
            fence(Ordering::SeqCst);
            let at = 4 + 8 * u64::from(self.used % self.size);
            self.used = self.used.wrapping_add(1);
            let (head, bytes): (u32, u32) = (self.rings.used.read(at), self.rings.used.read(at + 4));
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
        self.rings.used.read::<u16>(0) & NO_NOTIFY == 0
    }

    /// Asks for interrupts, or for none. The device may be late to notice.
    pub fn set_interrupts(&mut self, on: bool) {
        self.rings.available.write(0, if on { 0 } else { NO_INTERRUPT });
        fence(Ordering::SeqCst);
    }
}
