//! The dirty bitmap that the VMM and `mashined` share: one bit for each page of the machine's space ([`wire::space`]), RAM first, then its disks.
//!
//! The VMM only ever sets bits (atomic OR), `mashined` takes whole words (atomic swap with 0) **before** it reads the
//! pages. So a page that is written after it was read has its bit set again, whoever wrote it. Two sources set bits:
//! KVM's dirty log, when it is harvested, and devices, at once through [`DirtyRegion`], the bitmap of a vm-memory region.
//!
//! Words are little-endian. A mapping shorter than the RAM it describes is refused when it is made, so indices here
//! are in range; one that is not is ignored instead of followed.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use wire::units::PAGE_BYTES_USIZE;

use crate::shm::{SharedMapping, ShmError};

/// Pages described by one word of the bitmap.
pub const WORD_PAGES: u64 = 64;

/// The shared bitmap.
#[derive(Debug)]
pub struct DirtyBitmap {
    mapping: SharedMapping,
    /// Whether device writes are marked: only while the dirty log is on.
    active: AtomicBool,
}

impl DirtyBitmap {
    /// Maps the bitmap for `pages` pages.
    ///
    /// # Errors
    /// [`ShmError`] when the memfd is too short or cannot be mapped.
    pub fn new(file: &File, pages: u64) -> Result<Self, ShmError> {
        let bytes = pages.div_ceil(WORD_PAGES) * 8;
        Ok(Self { mapping: SharedMapping::new(file, "dirty bitmap", bytes)?, active: AtomicBool::new(false) })
    }

    /// Turns the marking of device writes on or off.
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// Sets all bits of `bits` in word `word`.
    pub fn publish(&self, word: usize, bits: u64) {
        if let Some(shared) = self.mapping.words().get(word) {
            // Release: what made the page dirty (or protected it again) is before the bit is seen.
            shared.fetch_or(bits.to_le(), Ordering::AcqRel);
        }
    }

    /// Clears all bits.
    pub fn clear(&self) {
        for word in self.mapping.words() {
            word.store(0, Ordering::Release);
        }
    }

    /// The bits of word `word`.
    pub fn word(&self, word: usize) -> u64 {
        self.mapping.words().get(word).map_or(0, |shared| u64::from_le(shared.load(Ordering::Acquire)))
    }

    /// Marks one page, if the log is on: what a device wrote elsewhere than in RAM.
    pub fn mark(&self, page: u64) {
        if self.active.load(Ordering::Acquire)
            && let Ok(word) = usize::try_from(page / WORD_PAGES)
        {
            self.publish(word, 1 << (page % WORD_PAGES));
        }
    }

    fn mark_pages(&self, first: usize, last: usize) {
        for word in first / 64..=last / 64 {
            let from = if word == first / 64 { first % 64 } else { 0 };
            let to = if word == last / 64 { last % 64 } else { 63 };
            self.publish(word, (u64::MAX << from) & (u64::MAX >> (63 - to)));
        }
    }

    fn is_marked(&self, page: usize) -> bool {
        self.word(page / 64) >> (page % 64) & 1 == 1
    }
}

/// The part of the bitmap that belongs to one region of guest memory.
#[derive(Debug, Clone)]
pub struct DirtyRegion {
    bitmap: Arc<DirtyBitmap>,
    /// Offset of the region's first byte in the RAM memfd.
    offset: usize,
    /// Keeps the mapping alive that the region of guest memory points into.
    _backing: Arc<SharedMapping>,
}

impl DirtyRegion {
    /// The region that begins `offset` bytes into the RAM memfd, which is mapped as `backing`.
    pub const fn new(bitmap: Arc<DirtyBitmap>, offset: usize, backing: Arc<SharedMapping>) -> Self {
        Self { bitmap, offset, _backing: backing }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyRegion {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyRegion {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || !self.bitmap.active.load(Ordering::Acquire) {
            return;
        }
        let first = self.offset.saturating_add(offset);
        let last = first.saturating_add(len - 1);
        self.bitmap.mark_pages(first / PAGE_BYTES_USIZE, last / PAGE_BYTES_USIZE);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_marked(self.offset.saturating_add(offset) / PAGE_BYTES_USIZE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(shared: &Arc<DirtyBitmap>, offset: usize) -> DirtyRegion {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        DirtyRegion::new(
            Arc::clone(shared),
            offset,
            Arc::new(SharedMapping::new(&file, "RAM", 4096).unwrap()),
        )
    }

    fn bitmap(pages: u64) -> Arc<DirtyBitmap> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages.div_ceil(64) * 8).unwrap();
        Arc::new(DirtyBitmap::new(&file, pages).unwrap())
    }

    #[test]
    fn marks_exactly_the_pages_touched() {
        let shared = bitmap(256);
        shared.set_active(true);
        let region = region(&shared, 64 * 4096);
        region.mark_dirty(4095, 2);
        assert_eq!(shared.word(1), 0b11);
        region.mark_dirty(60 * 4096, 10 * 4096);
        assert_eq!(shared.word(1), 0b11 | 0xf << 60);
        assert_eq!(shared.word(2), 0b11_1111);
        assert!(region.dirty_at(69 * 4096) && !region.dirty_at(70 * 4096));
        region.slice_at(128 * 4096).mark_dirty(0, 1);
        assert_eq!(shared.word(3), 1);
        region.mark_dirty(0, 0);
        assert_eq!(shared.word(0), 0);
    }

    #[test]
    fn silent_while_the_log_is_off_and_out_of_range() {
        let shared = bitmap(64);
        let region = region(&shared, 0);
        region.mark_dirty(0, 4096);
        assert_eq!(shared.word(0), 0);
        shared.set_active(true);
        region.mark_dirty(64 * 4096, 1);
        region.mark_dirty(0, 1);
        assert_eq!(shared.word(0), 1);
        shared.clear();
        assert_eq!(shared.word(0), 0);
    }

    #[test]
    fn a_short_memfd_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8).unwrap();
        assert!(matches!(DirtyBitmap::new(&file, 65), Err(ShmError::TooShort { have: 8, want: 16, .. })));
    }
}
