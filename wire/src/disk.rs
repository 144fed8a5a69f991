//! The file of a writable disk: which blocks it holds, and the blocks.
//!
//! A disk is a read-only base (an image, shared by many machines; or nothing) under an overlay that belongs to one machine. A block that the
//! overlay holds is read from it, any other from the base, or is zero where there is none.
//!
//! ```text
//!  0         4096                      data_start (multiple of 2 MiB)        data_start + disk_bytes
//!  +---------+------------------------+-- ... --+--------------------------------+
//!  | header  | bitmap, 1 bit a block  | padding | blocks, sparse                 |
//!  +---------+------------------------+---------+--------------------------------+
//! ```
//!
//! Bit `n % 64` of the little-endian word `n / 64` of the bitmap says whether the overlay holds block `n`: the layout of the dirty bitmap.
//! The bitmap's bytes are allocated when the file is made, so that mapping it cannot run out of disk space; a block's space is
//! allocated when it is first written. A bit is set after its block is written. After a crash of the host, a block whose bit was lost is
//! as it was before: no write that a flush has promised, because a flush syncs both.
//!
//! Header, little-endian: magic `MSHDISK1` (8 bytes), disk size in bytes (8), SHA-256 of the base or zeroes (32), CRC-32C of the 48 bytes
//! before (4); zeroes to the end. A changed layout gets another magic.

use crate::ids::Digest;
use crate::space::DiskSize;
use crate::units::{CHUNK_BYTES, PAGE_BYTES, PAGE_BYTES_USIZE};

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"MSHDISK1";
/// Size of the header, in bytes; the bitmap follows.
pub const HEADER_BYTES: u64 = PAGE_BYTES;
/// Bytes of the header that say something.
const FIELDS_BYTES: usize = 52;

/// A file that is not the overlay it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverlayError {
    /// No overlay, or of another version.
    #[error("the file is no disk overlay of this version")]
    Magic,
    /// The header is damaged.
    #[error("the header of the disk overlay is damaged")]
    Checksum,
    /// The overlay of another disk.
    #[error("the overlay belongs to a disk of {have} bytes, where one of {want} belongs")]
    Size {
        /// What the header says.
        have: u64,
        /// What it should say.
        want: u64,
    },
    /// An overlay over another base.
    #[error("the overlay belongs to another base image")]
    Base,
}

/// Where things are in the overlay of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverlayLayout {
    size: DiskSize,
}

impl OverlayLayout {
    /// The layout for a disk of this size.
    pub const fn new(size: DiskSize) -> Self {
        Self { size }
    }

    /// The disk's size.
    pub const fn size(self) -> DiskSize {
        self.size
    }

    /// Length of the bitmap, in bytes: whole words.
    pub const fn bitmap_bytes(self) -> u64 {
        self.size.pages().div_ceil(64) * 8
    }

    /// Offset of block 0.
    pub const fn data_start(self) -> u64 {
        (HEADER_BYTES + self.bitmap_bytes()).next_multiple_of(CHUNK_BYTES)
    }

    /// Length of the file, in bytes.
    pub const fn file_bytes(self) -> u64 {
        self.data_start() + self.size.bytes()
    }

    /// The header for this disk over `base`.
    pub fn header(self, base: Option<Digest>) -> [u8; PAGE_BYTES_USIZE] {
        let mut header = [0; PAGE_BYTES_USIZE];
        header[..8].copy_from_slice(&MAGIC);
        header[8..16].copy_from_slice(&self.size.bytes().to_le_bytes());
        header[16..48].copy_from_slice(&base.map_or([0; 32], |digest| digest.0));
        let crc = crc32c::crc32c(&header[..48]);
        header[48..FIELDS_BYTES].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// Checks that a file that begins with `header` is the overlay of this disk over `base`.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn check(self, header: &[u8; PAGE_BYTES_USIZE], base: Option<Digest>) -> Result<(), OverlayError> {
        let want = self.header(base);
        if header[..8] != want[..8] {
            return Err(OverlayError::Magic);
        }
        let crc = u32::from_le_bytes([header[48], header[49], header[50], header[51]]);
        if crc32c::crc32c(&header[..48]) != crc {
            return Err(OverlayError::Checksum);
        }
        let mut have = [0; 8];
        have.copy_from_slice(&header[8..16]);
        let have = u64::from_le_bytes(have);
        if have != self.size.bytes() {
            return Err(OverlayError::Size { have, want: self.size.bytes() });
        }
        if header[16..48] != want[16..48] { Err(OverlayError::Base) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(mib: u64) -> OverlayLayout {
        OverlayLayout::new(DiskSize::from_bytes(mib << 20).unwrap())
    }

    #[test]
    fn parts_do_not_overlap_and_data_is_aligned() {
        for mib in [2, 64, 8 << 10, 1 << 20] {
            let layout = layout(mib);
            assert!(HEADER_BYTES + layout.bitmap_bytes() <= layout.data_start());
            assert!(layout.data_start().is_multiple_of(CHUNK_BYTES));
            assert!(layout.bitmap_bytes() * 8 >= layout.size().pages());
        }
    }

    #[test]
    fn a_header_is_recognised_and_no_other() {
        let (layout, base) = (layout(64), Some(Digest([7; 32])));
        let header = layout.header(base);
        assert_eq!(layout.check(&header, base), Ok(()));
        assert_eq!(layout.check(&header, None), Err(OverlayError::Base));
        let other = OverlayLayout::new(DiskSize::from_bytes(2 << 20).unwrap());
        let want = 2 << 20;
        assert_eq!(other.check(&header, base), Err(OverlayError::Size { have: 64 << 20, want }));
        for (at, error) in
            [(0, OverlayError::Magic), (9, OverlayError::Checksum), (20, OverlayError::Checksum)]
        {
            let mut damaged = header;
            damaged[at] ^= 1;
            assert_eq!(layout.check(&damaged, base), Err(error));
        }
    }
}
