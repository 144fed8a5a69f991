//! Quantities: pages, guest-physical addresses, byte counts, times. Units are in the names.

use std::fmt;

use rkyv::rancor::{Fallible, Source, fail};
use rkyv::{Archive, Deserialize, Serialize};

/// Size of the page that dirty tracking and migration count in, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// [`PAGE_BYTES`] for indexing memory on the 64-bit machines we run on.
pub const PAGE_BYTES_USIZE: usize = 4096;
/// Pages in a chunk, the unit that is assigned to a lane and cleared in the dirty log at once: 2 MiB, a huge page.
pub const CHUNK_PAGES: u64 = 512;
/// Bytes in a chunk.
pub const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;
/// Most RAM one machine may have, in bytes (1 TiB): what every length taken from a peer is held against.
pub const RAM_BYTES_MAX: u64 = 1 << 40;
/// Least RAM one machine may have, in bytes.
pub const RAM_BYTES_MIN: u64 = 16 << 20;
/// Most vCPUs of one machine.
pub const VCPUS_MAX: u32 = 64;

/// Where the hole for devices below 4 GiB begins: RAM lies below it and from 4 GiB on.
pub const MMIO_HOLE_START: u64 = 0xd000_0000;
/// Where RAM goes on above the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// A page of guest RAM, counted from the start of the RAM memfd (not of the guest-physical address space, which has
/// a hole below 4 GiB). Everything outside the VMM counts pages this way.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Archive, Serialize, Deserialize,
)]
#[rkyv(derive(Debug))]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Offset of the page's first byte in the RAM memfd.
    pub const fn byte_offset(self) -> u64 {
        self.0 * PAGE_BYTES
    }

    /// The chunk this page lies in.
    pub const fn chunk(self) -> u64 {
        self.0 / CHUNK_PAGES
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// Size of a machine's RAM: a multiple of 2 MiB between [`RAM_BYTES_MIN`] and [`RAM_BYTES_MAX`]. Checked also when it comes out of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize)]
#[rkyv(derive(Debug))]
pub struct RamSize(u64);

/// A RAM size that no machine can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes of RAM: give a multiple of 2 MiB from 16 MiB to 1 TiB")]
pub struct BadRamSize(pub u64);

impl RamSize {
    /// Checks `bytes` and makes the size of it.
    ///
    /// # Errors
    /// [`BadRamSize`] when out of range or not a multiple of 2 MiB.
    pub const fn from_bytes(bytes: u64) -> Result<Self, BadRamSize> {
        if bytes < RAM_BYTES_MIN || bytes > RAM_BYTES_MAX || !bytes.is_multiple_of(CHUNK_BYTES) {
            return Err(BadRamSize(bytes));
        }
        Ok(Self(bytes))
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Size in pages.
    pub const fn pages(self) -> u64 {
        self.0 / PAGE_BYTES
    }

    /// Size in chunks.
    pub const fn chunks(self) -> u64 {
        self.0 / CHUNK_BYTES
    }
}

impl<D> Deserialize<RamSize, D> for ArchivedRamSize
where
    D: Fallible + ?Sized,
    D::Error: Source,
{
    fn deserialize(&self, _: &mut D) -> Result<RamSize, D::Error> {
        match RamSize::from_bytes(self.0.to_native()) {
            Ok(size) => Ok(size),
            Err(error) => fail!(error),
        }
    }
}

/// A point in virtual or real monotonic time, in microseconds from an arbitrary start. Protocol machines are told
/// the time; they never ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// Microseconds from `earlier` to `self`; zero if `earlier` is later.
    pub const fn us_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// `self` moved on by `us` microseconds.
    #[must_use]
    pub const fn plus_us(self, us: u64) -> Self {
        Self(self.0.saturating_add(us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_sizes_are_checked() {
        assert_eq!(RamSize::from_bytes(1 << 30).unwrap().chunks(), 512);
        for bad in [0, 1, RAM_BYTES_MIN - 1, (1 << 30) + 4096, RAM_BYTES_MAX + CHUNK_BYTES, u64::MAX] {
            assert_eq!(RamSize::from_bytes(bad), Err(BadRamSize(bad)));
            let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&RamSize(bad)).unwrap();
            assert!(rkyv::from_bytes::<RamSize, rkyv::rancor::Error>(&bytes).is_err(), "{bad}");
        }
    }
}
