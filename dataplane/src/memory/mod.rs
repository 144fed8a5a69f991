//! What moves with a machine: guest RAM and the overlays of its disks, as one space of pages; with it the dirty bitmap and the console ring.
//!
//! RAM, bitmap and ring are memfds that `mashined` makes, hands to the VMM, and maps itself. The guest and the VMM may write to them at
//! any moment, so nothing here ever makes a Rust reference to plain data in them: pages are copied in and out as
//! volatile bytes, the bitmap is atomic words. Overlays are files.

mod console;
mod dirty;
mod disk;
mod ram;
mod shm;

pub use console::{ConsoleRing, ConsoleText};
pub use dirty::DirtyBitmap;
pub use disk::DiskOverlay;
pub use ram::{GuestRam, PageContent};
pub use shm::ShmError;

use std::io;

use wire::space::{PageSpace, Place};
use wire::units::{CHUNK_PAGES, PAGE_BYTES, PAGE_BYTES_USIZE, PageIndex, RamSize};

/// What belongs to one machine.
#[derive(Debug)]
pub struct MachineMemory {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Its writable disks, in their order.
    pub disks: Vec<DiskOverlay>,
    /// How RAM and disks are numbered as pages.
    pub space: PageSpace,
    /// One bit a page of the space: written since it was last taken.
    pub dirty: DirtyBitmap,
    /// Serial output.
    pub console: ConsoleRing,
}

impl MachineMemory {
    /// Makes fresh, zeroed memory for a machine without disks.
    ///
    /// # Errors
    /// [`ShmError`] when the kernel has no memory or descriptors left.
    pub fn create(ram: RamSize) -> Result<Self, ShmError> {
        Self::with_disks(PageSpace::of_ram(ram), Vec::new())
    }

    /// Makes fresh, zeroed memory for a machine with these disks, which are those of `space`.
    ///
    /// # Errors
    /// [`ShmError`] when the kernel has no memory or descriptors left.
    pub fn with_disks(space: PageSpace, disks: Vec<DiskOverlay>) -> Result<Self, ShmError> {
        Ok(Self {
            ram: GuestRam::create(space.ram())?,
            disks,
            dirty: DirtyBitmap::create(space.pages())?,
            console: ConsoleRing::create()?,
            space,
        })
    }

    /// Copies a page to `out`; see [`GuestRam::copy_out`] and [`DiskOverlay::copy_out`]. Pages past the end read as zero.
    ///
    /// # Errors
    /// A disk's.
    pub fn copy_out(&self, page: PageIndex, out: &mut [u8; PAGE_BYTES_USIZE]) -> io::Result<PageContent> {
        match self.place(page) {
            Some((Place::Ram(page), _)) => Ok(self.ram.copy_out(page, out)),
            Some((Place::Disk { block, .. }, Some(disk))) => disk.copy_out(block, out),
            _ => Ok(PageContent::Zero),
        }
    }

    /// Writes part of one page, from byte `offset` of the space.
    ///
    /// # Errors
    /// A disk's; `InvalidInput` past the end.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let inside = match self.place(PageIndex(offset / PAGE_BYTES)) {
            Some((Place::Ram(_), _)) => self.ram.copy_in(offset, bytes),
            Some((Place::Disk { block, .. }, Some(disk))) => {
                disk.copy_in(block * PAGE_BYTES + offset % PAGE_BYTES, bytes)?;
                true
            }
            _ => false,
        };
        if inside { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Makes a page of a disk zero. In RAM, only if `touched`: it is zero until something was written there.
    ///
    /// # Errors
    /// A disk's.
    pub fn clear(&self, page: PageIndex, touched: bool) -> io::Result<()> {
        match self.place(page) {
            Some((Place::Ram(page), _)) if touched => self.ram.clear(page),
            Some((Place::Disk { block, .. }, Some(disk))) => disk.clear(block)?,
            _ => {}
        }
        Ok(())
    }

    /// Whether a page of a chunk may hold anything; see [`GuestRam::chunk_written`].
    pub fn chunk_written(&self, chunk: u64) -> bool {
        match self.place(PageIndex(chunk.saturating_mul(CHUNK_PAGES))) {
            Some((Place::Ram(_), _)) => self.ram.chunk_written(chunk),
            place => place.is_some(),
        }
    }

    /// Has everything that was written to the disks on them.
    ///
    /// # Errors
    /// A disk's.
    pub fn sync_disks(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(DiskOverlay::sync)
    }

    fn place(&self, page: PageIndex) -> Option<(Place, Option<&DiskOverlay>)> {
        let place = self.space.locate(page)?;
        let disk = match place {
            Place::Disk { disk, .. } => self.disks.get(disk),
            Place::Ram(_) => None,
        };
        Some((place, disk))
    }
}
