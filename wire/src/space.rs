//! The pages of a machine that move with it: its RAM and, behind it, the blocks of its writable disks.
//!
//! ```text
//!  page 0                 ram.pages()                                     pages()
//!  | RAM memfd ............ | overlay of disk 0 ...... | overlay of disk 1 ... |
//! ```
//!
//! A block of a disk is as large as a page, and every part is a whole number of chunks, so that one dirty bitmap, one set of
//! lanes and one ledger serve memory and disks alike: a migration does not know which of the two it moves. What differs is
//! where a page is read from and written to, and which pages are dirty when the log is switched on: all of RAM, but of a
//! disk only the blocks that its overlay holds.

use rkyv::rancor::{Fallible, Source, fail};
use rkyv::{Archive, Deserialize, Serialize};

use crate::units::{CHUNK_BYTES, CHUNK_PAGES, PAGE_BYTES, PageIndex, RamSize};

/// Most writable disks of one machine.
pub const DISKS_MAX: usize = 8;
/// Largest disk, in bytes (1 TiB): with [`DISKS_MAX`] of them and the largest RAM, page numbers fit 32 bits.
pub const DISK_BYTES_MAX: u64 = 1 << 40;

/// Size of a disk: a multiple of 2 MiB up to [`DISK_BYTES_MAX`]. Checked also when it comes out of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize)]
#[rkyv(derive(Debug))]
pub struct DiskSize(u64);

/// A disk size that no machine can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a disk of {0} bytes: give a multiple of 2 MiB from 2 MiB to 1 TiB")]
pub struct BadDiskSize(pub u64);

impl DiskSize {
    /// Checks `bytes` and makes the size of it.
    ///
    /// # Errors
    /// [`BadDiskSize`] when out of range or not a multiple of 2 MiB.
    pub const fn from_bytes(bytes: u64) -> Result<Self, BadDiskSize> {
        if bytes == 0 || bytes > DISK_BYTES_MAX || !bytes.is_multiple_of(CHUNK_BYTES) {
            return Err(BadDiskSize(bytes));
        }
        Ok(Self(bytes))
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Size in pages (blocks).
    pub const fn pages(self) -> u64 {
        self.0 / PAGE_BYTES
    }
}

impl<D> Deserialize<DiskSize, D> for ArchivedDiskSize
where
    D: Fallible + ?Sized,
    D::Error: Source,
{
    fn deserialize(&self, _: &mut D) -> Result<DiskSize, D::Error> {
        match DiskSize::from_bytes(self.0.to_native()) {
            Ok(size) => Ok(size),
            Err(error) => fail!(error),
        }
    }
}

/// Where a page of the space lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In RAM.
    Ram(PageIndex),
    /// In the overlay of a disk.
    Disk {
        /// Which of the machine's disks, from 0.
        disk: usize,
        /// Its block, counted from the disk's start.
        block: u64,
    },
}

/// RAM and disks of one machine as one range of pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSpace {
    ram: RamSize,
    disks: Vec<DiskSize>,
}

impl PageSpace {
    /// The space of a machine with these; disks beyond [`DISKS_MAX`] are not part of it.
    pub fn new(ram: RamSize, disks: impl IntoIterator<Item = DiskSize>) -> Self {
        Self { ram, disks: disks.into_iter().take(DISKS_MAX).collect() }
    }

    /// RAM alone.
    pub const fn of_ram(ram: RamSize) -> Self {
        Self { ram, disks: Vec::new() }
    }

    /// The RAM in it.
    pub const fn ram(&self) -> RamSize {
        self.ram
    }

    /// Number of pages, a multiple of [`CHUNK_PAGES`]; fits 32 bits.
    pub fn pages(&self) -> u64 {
        self.ram.pages() + self.disks.iter().map(|disk| disk.pages()).sum::<u64>()
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.pages() / CHUNK_PAGES
    }

    /// The first page of disk number `disk`; the end of the space if there is no such disk.
    pub fn disk_start(&self, disk: usize) -> PageIndex {
        let before = self.disks.iter().take(disk).map(|disk| disk.pages()).sum::<u64>();
        PageIndex(self.ram.pages() + before)
    }

    /// Where `page` lies; `None` past the end.
    pub fn locate(&self, page: PageIndex) -> Option<Place> {
        let Some(mut block) = page.0.checked_sub(self.ram.pages()) else { return Some(Place::Ram(page)) };
        for (disk, size) in self.disks.iter().enumerate() {
            match block.checked_sub(size.pages()) {
                None => return Some(Place::Disk { disk, block }),
                Some(rest) => block = rest,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_sizes_are_checked() {
        assert_eq!(DiskSize::from_bytes(4 << 20).unwrap().pages(), 1024);
        for bad in [0, 1, 4096, CHUNK_BYTES + 512, DISK_BYTES_MAX + CHUNK_BYTES, u64::MAX] {
            assert_eq!(DiskSize::from_bytes(bad), Err(BadDiskSize(bad)));
            let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&DiskSize(bad)).unwrap();
            assert!(rkyv::from_bytes::<DiskSize, rkyv::rancor::Error>(&bytes).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_page_has_one_place() {
        let disk = |mib: u64| DiskSize::from_bytes(mib << 20).unwrap();
        let space = PageSpace::new(RamSize::from_bytes(16 << 20).unwrap(), [disk(2), disk(4)]);
        assert_eq!((space.pages(), space.chunks()), (4096 + 512 + 1024, 11));
        assert_eq!(space.locate(PageIndex(4095)), Some(Place::Ram(PageIndex(4095))));
        assert_eq!(space.locate(PageIndex(4096)), Some(Place::Disk { disk: 0, block: 0 }));
        assert_eq!(space.locate(PageIndex(4608)), Some(Place::Disk { disk: 1, block: 0 }));
        assert_eq!(space.locate(PageIndex(5631)), Some(Place::Disk { disk: 1, block: 1023 }));
        assert_eq!(space.locate(PageIndex(5632)), None);
        assert_eq!(space.disk_start(1), PageIndex(4608));
        assert_eq!(space.disk_start(2), PageIndex(5632));
    }

    #[test]
    fn the_largest_space_fits_32_bits() {
        let disk = DiskSize::from_bytes(DISK_BYTES_MAX).unwrap();
        let ram = RamSize::from_bytes(crate::units::RAM_BYTES_MAX).unwrap();
        let space = PageSpace::new(ram, std::iter::repeat_n(disk, DISKS_MAX + 3));
        assert!(u32::try_from(space.pages()).is_ok());
    }
}
