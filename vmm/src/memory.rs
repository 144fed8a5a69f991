//! Guest RAM: one memfd, mapped once, seen by the guest below the hole for devices and from 4 GiB on.
//!
//! The rest of the process reaches RAM only through vm-memory's volatile access, bounded by the regions made here, and
//! every device write marks the shared dirty bitmap on its way. Addresses from the guest that hit no RAM are errors of
//! the access, never of this process.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use wire::units::{MMIO_HOLE_END, MMIO_HOLE_START, PAGE_BYTES, RamSize};

use crate::dirty::{DirtyBitmap, DirtyRegion};
use crate::shm::{SharedMapping, ShmError};

/// Guest memory whose writes are marked in the shared dirty bitmap.
pub type GuestMemory = GuestMemoryMmap<DirtyRegion>;

/// Why RAM cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd cannot be mapped.
    #[error("guest RAM cannot be set up")]
    Shm(#[from] ShmError),
    /// vm-memory refused a region.
    #[error("guest RAM cannot be laid out")]
    Region(#[from] vm_memory::mmap::MmapRegionError),
    /// vm-memory refused the regions together.
    #[error("guest RAM regions do not fit together")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// A size is beyond the address space.
    #[error("{0} bytes of RAM do not fit the address space")]
    TooLarge(u64),
}

/// A contiguous piece of RAM as KVM is told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// KVM's number for it.
    pub number: u32,
    /// Guest-physical address of its first byte.
    pub guest_start: u64,
    /// Its first page, counted in the RAM memfd; a multiple of 64.
    pub first_page: u64,
    /// Its length in pages.
    pub pages: u64,
}

/// The machine's RAM.
#[derive(Debug)]
pub struct Ram {
    size: RamSize,
    slots: Vec<Slot>,
    memory: Arc<GuestMemory>,
    mapping: Arc<SharedMapping>,
}

/// Splits `size` of RAM around the hole below 4 GiB.
pub fn layout(size: RamSize) -> Vec<Slot> {
    let low_bytes = size.bytes().min(MMIO_HOLE_START);
    let low = Slot { number: 0, guest_start: 0, first_page: 0, pages: low_bytes / PAGE_BYTES };
    let high_bytes = size.bytes() - low_bytes;
    let high =
        Slot { number: 1, guest_start: MMIO_HOLE_END, first_page: low.pages, pages: high_bytes / PAGE_BYTES };
    if high_bytes == 0 { vec![low] } else { vec![low, high] }
}

impl Ram {
    /// Maps `file` as RAM of `size`.
    ///
    /// # Errors
    /// [`MemoryError`] when the memfd is too short or the mapping fails.
    pub fn new(file: &File, size: RamSize, dirty: &Arc<DirtyBitmap>) -> Result<Self, MemoryError> {
        let mapping = Arc::new(SharedMapping::new(file, "RAM memfd", size.bytes())?);
        mapping.advise_huge_pages();
        let slots = layout(size);
        let mut regions = Vec::with_capacity(slots.len());
        for slot in &slots {
            let too_large = |_| MemoryError::TooLarge(size.bytes());
            let offset = usize::try_from(slot.first_page * PAGE_BYTES).map_err(too_large)?;
            let bytes = usize::try_from(slot.pages * PAGE_BYTES).map_err(too_large)?;
            let bitmap = DirtyRegion::new(Arc::clone(dirty), offset, Arc::clone(&mapping));
            let builder = MmapRegionBuilder::new_with_bitmap(bytes, bitmap);
            let start = mapping.as_ptr().wrapping_add(offset);
            // SAFETY: `start .. start + bytes` lies within `mapping`, which the region's bitmap keeps alive as
            // long as the region.
            let builder = unsafe { builder.with_raw_mmap_pointer(start) };
            let region = GuestRegionMmap::new(builder.build()?, GuestAddress(slot.guest_start))
                .ok_or(MemoryError::TooLarge(size.bytes()))?;
            regions.push(region);
        }
        let memory = Arc::new(GuestMemory::from_regions(regions)?);
        Ok(Self { size, slots, memory, mapping })
    }

    /// Its size.
    pub const fn size(&self) -> RamSize {
        self.size
    }

    /// Its pieces, in the order of the memfd.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Access to it.
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Address in this process of a slot's first byte.
    pub fn host_address(&self, slot: &Slot) -> *mut u8 {
        let offset = usize::try_from(slot.first_page * PAGE_BYTES).unwrap_or(usize::MAX);
        self.mapping.as_ptr().wrapping_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn ram_is_split_around_the_hole() {
        let size = RamSize::from_bytes(MMIO_HOLE_START).unwrap();
        assert_eq!(layout(size).len(), 1);
        let size = RamSize::from_bytes(4 << 30).unwrap();
        let slots = layout(size);
        assert_eq!(slots[1].guest_start, 1 << 32);
        assert_eq!(slots[1].first_page, 0xd0000);
        assert_eq!((slots[0].pages + slots[1].pages) * PAGE_BYTES, 4 << 30);
        assert!(slots.iter().all(|s| s.first_page.is_multiple_of(64)));
    }

    #[test]
    fn writes_reach_the_memfd_and_the_bitmap() {
        let size = RamSize::from_bytes(5 << 30).unwrap();
        let (ram_file, map_file) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        ram_file.set_len(size.bytes()).unwrap();
        map_file.set_len(size.pages() / 8).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(&map_file, size.pages()).unwrap());
        dirty.set_active(true);
        let ram = Ram::new(&ram_file, size, &dirty).unwrap();
        ram.memory().write_obj(0x55u8, GuestAddress(MMIO_HOLE_END + 4096)).unwrap();
        let page = MMIO_HOLE_START / PAGE_BYTES + 1;
        assert_eq!(dirty.word(usize::try_from(page / 64).unwrap()), 1 << (page % 64));
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&ram_file, &mut byte, page * PAGE_BYTES).unwrap();
        assert_eq!(byte, [0x55]);
        assert!(ram.memory().write_obj(0u8, GuestAddress(MMIO_HOLE_START)).is_err());
    }
}
