//! A disk's content: blocks that the overlay holds over those of the base ([`wire::disk`]).
//!
//! The order that loses nothing: a block is written, then its bit is set in the overlay's bitmap, then its page is marked dirty
//! if the dirty log is on. Whoever switches the log on marks first and looks at the bitmap afterwards, so a block that is
//! written in the same moment is seen by one of the two.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use wire::disk::{HEADER_BYTES, OverlayLayout};
use wire::units::{PAGE_BYTES, PAGE_BYTES_USIZE};
use wire::vmm::DiskSpec;

use crate::dirty::DirtyBitmap;
use crate::shm::{SharedMapping, ShmError};

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The overlay is not this disk's.
    #[error("the overlay of disk `{name}` does not belong to it")]
    Overlay {
        /// The disk.
        name: String,
        /// Why.
        #[source]
        source: wire::disk::OverlayError,
    },
    /// A file cannot be read.
    #[error("a file of disk `{name}` cannot be read")]
    Io {
        /// The disk.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bitmap cannot be mapped.
    #[error(transparent)]
    Shm(#[from] ShmError),
}

/// A disk: its two files, and where its blocks are among the machine's pages.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    base: Option<File>,
    base_bytes: u64,
    layout: OverlayLayout,
    bitmap: SharedMapping,
    dirty: Arc<DirtyBitmap>,
    first_page: u64,
}

/// Where a run of blocks is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Overlay,
    Base,
}

impl Overlay {
    /// The disk that `spec` describes, whose blocks are pages from `first_page` on.
    ///
    /// # Errors
    /// [`DiskError`] when the files are not that disk's.
    pub fn open(
        spec: &DiskSpec,
        (file, base): (File, Option<File>),
        dirty: Arc<DirtyBitmap>,
        first_page: u64,
    ) -> Result<Self, DiskError> {
        let name = || spec.name.to_string();
        let failed = |source| DiskError::Io { name: name(), source };
        let layout = OverlayLayout::new(spec.size);
        let mut header = [0; PAGE_BYTES_USIZE];
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        let checked = layout.check(&header, spec.base);
        checked.map_err(|source| DiskError::Overlay { name: name(), source })?;
        let base_bytes = match &base {
            Some(base) => base.metadata().map_err(failed)?.len().min(spec.size.bytes()),
            None => 0,
        };
        let bitmap = SharedMapping::part(&file, "disk bitmap", HEADER_BYTES, layout.bitmap_bytes())?;
        Ok(Self { file, base, base_bytes, layout, bitmap, dirty, first_page })
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.layout.size().bytes()
    }

    /// The disk's first page.
    pub const fn first_page(&self) -> u64 {
        self.first_page
    }

    /// Which blocks the overlay holds, 64 in each word.
    pub fn held_words(&self) -> impl Iterator<Item = u64> {
        self.bitmap.words().iter().map(|word| u64::from_le(word.load(Ordering::Acquire)))
    }

    fn holds(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|at| self.bitmap.words().get(at));
        word.is_some_and(|word| u64::from_le(word.load(Ordering::Acquire)) >> (block % 64) & 1 == 1)
    }

    fn hold(&self, block: u64) {
        let word = usize::try_from(block / 64).ok().and_then(|at| self.bitmap.words().get(at));
        if let Some(word) = word {
            word.fetch_or((1u64 << (block % 64)).to_le(), Ordering::AcqRel);
        }
        self.dirty.mark(self.first_page + block);
    }

    /// Whether `bytes` from `offset` lie within the disk.
    pub const fn contains(&self, offset: u64, bytes: u64) -> bool {
        match offset.checked_add(bytes) {
            Some(end) => end <= self.bytes(),
            None => false,
        }
    }

    /// Reads from byte `offset`.
    ///
    /// # Errors
    /// The file system's; `InvalidInput` beyond the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.contains(offset, buffer.len() as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (from, run) = self.run(at, rest.len());
            let (now, later) = rest.split_at_mut(run);
            match from {
                From::Overlay => self.file.read_exact_at(now, self.layout.data_start() + at)?,
                From::Base => self.read_base(at, now)?,
            }
            at += run as u64;
            rest = later;
        }
        Ok(())
    }

    /// How many of `bytes` from `offset` are read from one place, and which.
    fn run(&self, offset: u64, bytes: usize) -> (From, usize) {
        let place = |block| if self.holds(block) { From::Overlay } else { From::Base };
        let first = place(offset / PAGE_BYTES);
        let mut end = offset / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES;
        while end - offset < bytes as u64 && place(end / PAGE_BYTES) == first {
            end += PAGE_BYTES;
        }
        (first, usize::try_from(end - offset).unwrap_or(bytes).min(bytes))
    }

    fn read_base(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = usize::try_from(self.base_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (there, beyond) = buffer.split_at_mut(there.min(buffer.len()));
        beyond.fill(0);
        match &self.base {
            Some(base) if !there.is_empty() => base.read_exact_at(there, offset),
            _ => Ok(()),
        }
    }

    /// Writes from byte `offset`. A block of which only a part is written is copied up first.
    ///
    /// # Errors
    /// The file system's; `InvalidInput` beyond the end. Blocks before the failure may have been written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.contains(offset, bytes.len() as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = usize::try_from(at % PAGE_BYTES).unwrap_or(0);
            let whole = rest.len() / PAGE_BYTES_USIZE * PAGE_BYTES_USIZE;
            let now = if within == 0 && whole > 0 {
                let (now, later) = rest.split_at(whole);
                rest = later;
                self.file.write_all_at(now, self.layout.data_start() + at)?;
                now
            } else {
                let (now, later) = rest.split_at(rest.len().min(PAGE_BYTES_USIZE - within));
                rest = later;
                self.write_part(at, now)?;
                now
            };
            let end = at + now.len() as u64;
            (at / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).for_each(|block| self.hold(block));
            at = end;
        }
        Ok(())
    }

    fn write_part(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = offset / PAGE_BYTES * PAGE_BYTES;
        let within = usize::try_from(offset - start).unwrap_or(0);
        if self.holds(start / PAGE_BYTES) {
            return self.file.write_all_at(bytes, self.layout.data_start() + offset);
        }
        let mut block = [0; PAGE_BYTES_USIZE];
        self.read_base(start, &mut block)?;
        block[within..within + bytes.len()].copy_from_slice(bytes);
        self.file.write_all_at(&block, self.layout.data_start() + start)
    }

    /// Has everything written so far on the disk, the bitmap included: it is mapped from the same file.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wire::ids::Digest;
    use wire::space::DiskSize;

    const DISK: usize = 2 << 20;

    /// A disk of 2 MiB over a base of 10,000 bytes, and what it should hold.
    fn disk() -> (Overlay, Vec<u8>, File) {
        let digest = Some(Digest([3; 32]));
        let size = DiskSize::from_bytes(DISK as u64).unwrap();
        let spec = DiskSpec { name: "root".parse().unwrap(), size, base: digest };
        let layout = OverlayLayout::new(size);
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        file.write_all_at(&layout.header(digest), 0).unwrap();
        let mut model: Vec<u8> = (0..10_000u32).map(|n| n.to_le_bytes()[0] | 1).collect();
        let base = tempfile::tempfile().unwrap();
        base.write_all_at(&model, 0).unwrap();
        model.resize(DISK, 0);
        let map = tempfile::tempfile().unwrap();
        map.set_len(4096).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(&map, 4096 + 512).unwrap());
        dirty.set_active(true);
        let overlay = Overlay::open(&spec, (file, Some(base)), dirty, 4096).unwrap();
        (overlay, model, map)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_written_is_read_whatever_the_alignment(
            writes in prop::collection::vec((0..DISK, 0usize..20_000, any::<u8>()), 1..12),
            reads in prop::collection::vec((0..DISK, 0usize..40_000), 1..12),
        ) {
            let (overlay, mut model, _map) = disk();
            for (at, length, byte) in writes {
                let end = (at + length).min(DISK);
                model[at..end].fill(byte);
                overlay.write(at as u64, &model[at..end]).unwrap();
            }
            for (at, length) in reads {
                let end = (at + length).min(DISK);
                let mut read = vec![0x55; end - at];
                overlay.read(at as u64, &mut read).unwrap();
                prop_assert_eq!(&read, &model[at..end]);
            }
        }
    }

    #[test]
    fn written_blocks_are_held_and_dirty_and_no_others() {
        let (overlay, _, _map) = disk();
        overlay.write(3 * 4096 + 100, &[1; 4096]).unwrap();
        assert_eq!(overlay.held_words().next(), Some(0b11000));
        assert_eq!(overlay.dirty.word(64), 0b11000);
        assert!(overlay.write(DISK as u64 - 1, &[0; 2]).is_err());
        assert!(overlay.read(u64::MAX, &mut [0]).is_err());
    }

    #[test]
    fn anothers_overlay_is_refused() {
        let size = DiskSize::from_bytes(DISK as u64).unwrap();
        let spec = DiskSpec { name: "root".parse().unwrap(), size, base: None };
        let file = tempfile::tempfile().unwrap();
        file.set_len(OverlayLayout::new(size).file_bytes()).unwrap();
        let map = tempfile::tempfile().unwrap();
        map.set_len(4096).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(&map, 512).unwrap());
        assert!(matches!(Overlay::open(&spec, (file, None), dirty, 0), Err(DiskError::Overlay { .. })));
    }
}
