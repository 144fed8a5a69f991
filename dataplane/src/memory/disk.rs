//! The overlay of a writable disk as the data plane sees it: numbered blocks, copied in and out.
//!
//! The VMM reads and writes the same file. On the source of a migration it runs and we only read; on the target nobody runs and we
//! only write. A block may be read while the VMM writes it: then the copy is torn, the block's dirty bit is set when the write is done, and it
//! is sent again.
//!
//! Blocks are read and written with system calls, not through a mapping: a full disk is then an error, not a signal. Only the
//! bitmap, whose space is allocated when the file is made, is mapped.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::FallocateFlags;
use wire::disk::{HEADER_BYTES, OverlayLayout};
use wire::ids::Digest;
use wire::units::{PAGE_BYTES, PAGE_BYTES_USIZE};

use super::ram::{PageContent, is_zero};
use super::shm::Shm;

/// The overlay of one disk.
#[derive(Debug)]
pub struct DiskOverlay {
    file: File,
    base: Option<File>,
    bitmap: Shm,
    layout: OverlayLayout,
}

impl DiskOverlay {
    /// Makes an overlay that holds nothing at `path`, where no file may be.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(
        path: &Path,
        layout: OverlayLayout,
        digest: Option<Digest>,
        base: Option<File>,
    ) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(layout.file_bytes())?;
        let bitmap_end = HEADER_BYTES + layout.bitmap_bytes();
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bitmap_end) {
            Ok(()) => {}
            // A file system that cannot: write it instead.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let zeroes = [0; PAGE_BYTES_USIZE];
                for at in (0..bitmap_end).step_by(PAGE_BYTES_USIZE) {
                    file.write_all_at(&zeroes, at)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        file.write_all_at(&layout.header(digest), 0)?;
        file.sync_all()?;
        Self::over(file, base, layout)
    }

    /// Opens an overlay that an earlier run left.
    ///
    /// # Errors
    /// The file system's; `InvalidData` with [`wire::disk::OverlayError`] when it belongs to another disk.
    pub fn open(
        path: &Path,
        layout: OverlayLayout,
        digest: Option<Digest>,
        base: Option<File>,
    ) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Self::checked(file, base, layout, digest)
    }

    /// Takes an overlay back from a VMM.
    ///
    /// # Errors
    /// As [`DiskOverlay::open`].
    pub fn adopt(
        file: OwnedFd,
        base: Option<OwnedFd>,
        layout: OverlayLayout,
        digest: Option<Digest>,
    ) -> io::Result<Self> {
        Self::checked(file.into(), base.map(File::from), layout, digest)
    }

    fn checked(
        file: File,
        base: Option<File>,
        layout: OverlayLayout,
        digest: Option<Digest>,
    ) -> io::Result<Self> {
        let mut header = [0; PAGE_BYTES_USIZE];
        file.read_exact_at(&mut header, 0)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        layout.check(&header, digest).map_err(invalid)?;
        if file.metadata()?.len() < layout.file_bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the overlay was cut short"));
        }
        Self::over(file, base, layout)
    }

    fn over(file: File, base: Option<File>, layout: OverlayLayout) -> io::Result<Self> {
        let handle = OwnedFd::from(file.try_clone()?);
        let bitmap = Shm::over_file("disk bitmap", handle, HEADER_BYTES, layout.bitmap_bytes());
        Ok(Self { file, base, bitmap: bitmap.map_err(io::Error::other)?, layout })
    }

    /// What the VMM needs besides the overlay: the base.
    pub fn base(&self) -> Option<&File> {
        self.base.as_ref()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.layout.size().pages()
    }

    /// Whether the overlay holds a block.
    pub fn holds(&self, block: u64) -> bool {
        let Some((word, bit)) = self.bit(block) else { return false };
        self.bitmap.word(word).is_some_and(|bits| u64::from_le(bits.load(Ordering::Acquire)) & bit != 0)
    }

    /// Copies a block that the overlay holds to `out`.
    ///
    /// # Errors
    /// The file system's.
    pub fn copy_out(&self, block: u64, out: &mut [u8; PAGE_BYTES_USIZE]) -> io::Result<PageContent> {
        self.file.read_exact_at(out, self.layout.data_start() + block * PAGE_BYTES)?;
        Ok(if is_zero(out) { PageContent::Zero } else { PageContent::Data })
    }

    /// Writes part of the disk, from byte `offset` of it; the blocks touched are held from now on. The caller writes whole blocks, if in pieces.
    ///
    /// # Errors
    /// The file system's; `InvalidInput` beyond the end.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.layout.size().bytes());
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        self.file.write_all_at(bytes, self.layout.data_start() + offset)?;
        (offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).for_each(|block| self.hold(block));
        Ok(())
    }

    /// Makes a block zero, whatever the base has there.
    ///
    /// # Errors
    /// The file system's; `InvalidInput` beyond the end.
    pub fn clear(&self, block: u64) -> io::Result<()> {
        if block >= self.blocks() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = self.layout.data_start() + block * PAGE_BYTES;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, at, PAGE_BYTES) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => self.file.write_all_at(&[0; PAGE_BYTES_USIZE], at)?,
            Err(error) => return Err(error.into()),
        }
        self.hold(block);
        Ok(())
    }

    /// Has everything written so far on the disk.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn hold(&self, block: u64) {
        if let Some((word, bit)) = self.bit(block)
            && let Some(bits) = self.bitmap.word(word)
        {
            bits.fetch_or(bit.to_le(), Ordering::AcqRel);
        }
    }

    fn bit(&self, block: u64) -> Option<(usize, u64)> {
        (block < self.blocks()).then(|| Some((usize::try_from(block / 64).ok()?, 1 << (block % 64))))?
    }
}

impl AsFd for DiskOverlay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::space::DiskSize;

    fn layout() -> OverlayLayout {
        OverlayLayout::new(DiskSize::from_bytes(4 << 20).unwrap())
    }

    #[test]
    fn blocks_go_in_and_come_out_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        let overlay = DiskOverlay::create(&path, layout(), None, None).unwrap();
        assert!(!overlay.holds(3));
        overlay.copy_in(3 * 4096, &[7; 4096]).unwrap();
        overlay.clear(1023).unwrap();
        assert!(overlay.copy_in(4 << 20, &[1]).is_err() && overlay.clear(1024).is_err());
        drop(overlay);
        let overlay = DiskOverlay::open(&path, layout(), None, None).unwrap();
        let mut out = [1; PAGE_BYTES_USIZE];
        assert_eq!(overlay.copy_out(1023, &mut out).unwrap(), PageContent::Zero);
        assert_eq!(overlay.copy_out(3, &mut out).unwrap(), PageContent::Data);
        assert_eq!(out, [7; PAGE_BYTES_USIZE]);
        let held: Vec<u64> = (0..1100).filter(|block| overlay.holds(*block)).collect();
        assert_eq!(held, [3, 1023]);
    }

    #[test]
    fn another_disks_overlay_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        DiskOverlay::create(&path, layout(), Some(Digest([1; 32])), None).unwrap();
        let opened = DiskOverlay::open(&path, layout(), Some(Digest([2; 32])), None);
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(DiskOverlay::create(&path, layout(), None, None).is_err());
    }
}
