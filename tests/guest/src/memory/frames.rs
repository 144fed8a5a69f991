//! Hands out RAM behind the image, once and for ever: rings, buffers, stacks, tables. What is left becomes managed.
//!
//! There is no way to give memory back, and asking for more than there is ends the guest at boot.

use super::map::{MAX_RANGES, Range};
use super::window::{Window, Word, address};
use core::sync::atomic::AtomicU32;
use guest_core::page::PAGE_BYTES;

unsafe extern "C" {
    static image_end: u8;
    static pdpt: [core::sync::atomic::AtomicU64; 512];
}

/// RAM that was not handed out yet.
pub struct Frames {
    ranges: [Range; MAX_RANGES],
    /// The range that hands out.
    home: usize,
}

impl Frames {
    /// Takes charge of all RAM but the image, and maps what lies above 4 GiB.
    #[must_use]
    pub fn new(mut ranges: [Range; MAX_RANGES]) -> Self {
        let image = (&raw const image_end).addr() as u64;
        let home = ranges.iter().position(|r| r.start < image && image < r.end);
        let Some(home) = home else { panic!("the image is not in RAM") };
        ranges[home].start = image;
        let mut frames = Self { ranges, home };
        frames.map_high();
        frames
    }

    /// Zeroed memory for `count` values, aligned to a page.
    pub fn take<T: Zeroed>(&mut self, count: usize) -> &'static mut [T] {
        let bytes = (count * size_of::<T>()) as u64;
        let home = &mut self.ranges[self.home];
        let at = home.start;
        let next = at.saturating_add(bytes.next_multiple_of(PAGE_BYTES));
        assert!(next <= home.end, "out of memory: {bytes} bytes");
        home.start = next;
        let first = core::ptr::with_exposed_provenance_mut::<T>(address(at));
        // SAFETY: RAM of this size, mapped, handed out to nobody else; alignment is a page.
        unsafe { first.write_bytes(0, count) };
        // SAFETY: as above, and all-zero is a `T`.
        unsafe { core::slice::from_raw_parts_mut(first, count) }
    }

    /// Zeroed memory to share with a device or the host, whole pages.
    pub fn share(&mut self, bytes: usize) -> Window {
        let memory = self.take::<u8>(bytes.next_multiple_of(address(PAGE_BYTES)));
        let at = memory.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: this memory was handed out here and the only reference to it ends here.
        unsafe { Window::new(at, memory.len() as u64) }
    }

    /// Upper bound of the pages that [`Self::finish`] leaves.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| (range.end - range.start) / PAGE_BYTES).sum()
    }

    /// What was never handed out.
    #[must_use]
    pub fn finish(self) -> [Window; MAX_RANGES] {
        // SAFETY: RAM, mapped, and nobody else's: `self` ends here.
        self.ranges.map(|range| unsafe { Window::new(range.start, range.end - range.start) })
    }

    /// One page directory of 2 MiB pages for each GiB above the 4 that `boot.s` maps.
    fn map_high(&mut self) {
        let top = self.ranges.iter().map(|r| r.end).max().unwrap_or(0);
        for gib in 4..top.div_ceil(1 << 30) {
            let directory = self.take::<u64>(512);
            for (entry, frame) in directory.iter_mut().zip(gib * 512..) {
                *entry = frame << 21 | 0xe7;
            }
            let at = directory.as_ptr().expose_provenance() as u64;
            // SAFETY: the table of `boot.s`; entries from 4 on are not present yet, so no stale translation exists.
            let table = unsafe { &pdpt };
            table[address(gib)].store(at | 0x67, core::sync::atomic::Ordering::SeqCst);
        }
    }
}

/// Types that may begin as all-zero bytes.
///
/// # Safety
/// All-zero bytes must be a value.
pub unsafe trait Zeroed {}
// SAFETY: plain data is any bytes.
unsafe impl<T: Word> Zeroed for T {}
// SAFETY: an array of what may be zero.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}
// SAFETY: an integer.
unsafe impl Zeroed for AtomicU32 {}
