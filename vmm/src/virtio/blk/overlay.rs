//! The files of a disk: which blocks its overlay holds, and what is done with it outside of the ring.
//!
//! The bitmap of held blocks is a mapping of the overlay itself ([`wire::disk`]), which `mashined` maps too: a bit that is set here is seen
//! there at once, and is on the disk after the next flush, which syncs dirty pages of mappings like all others. A bit is set once
//! its block is written and before the guest is told.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use wire::disk::{HEADER_BYTES, OverlayError, OverlayLayout};
use wire::units::{PAGE_BYTES, PAGE_BYTES_USIZE};
use wire::vmm::DiskSpec;

use crate::shm::{SharedMapping, ShmError};

/// Why the files of a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The overlay of another disk, or none.
    #[error("disk `{disk}`")]
    Overlay {
        /// Which disk.
        disk: String,
        /// What is wrong.
        #[source]
        source: OverlayError,
    },
    /// The overlay is shorter than its header says.
    #[error("the overlay of disk `{disk}` has {have} bytes instead of {want}")]
    Short {
        /// Which disk.
        disk: String,
        /// Its length.
        have: u64,
        /// What it should be.
        want: u64,
    },
    /// The overlay's bitmap.
    #[error("disk `{disk}`")]
    Map {
        /// Which disk.
        disk: String,
        /// The reason.
        #[source]
        source: ShmError,
    },
    /// The operating system.
    #[error("disk `{disk}` cannot be used")]
    Io {
        /// Which disk.
        disk: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Which blocks an overlay holds. Shared with the dirty log, and with `mashined`.
#[derive(Debug)]
pub struct Held {
    bits: SharedMapping,
    blocks: u64,
}

impl Held {
    /// Number of blocks; a multiple of 64.
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The bits of word `word`.
    pub fn word(&self, word: usize) -> u64 {
        self.bits.words().get(word).map_or(0, |bits| u64::from_le(bits.load(Ordering::Acquire)))
    }

    /// Whether the overlay holds a block.
    pub fn contains(&self, block: u64) -> bool {
        usize::try_from(block / 64).is_ok_and(|word| self.word(word) >> (block % 64) & 1 == 1)
    }

    /// The overlay holds these blocks from now on.
    pub fn hold(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.blocks);
        let mut block = first;
        while block < end {
            let stop = end.min((block / 64 + 1) * 64);
            let bits = (u64::MAX << (block % 64)) & (u64::MAX >> (63 - (stop - 1) % 64));
            if let Some(word) = usize::try_from(block / 64).ok().and_then(|at| self.bits.words().get(at)) {
                word.fetch_or(bits.to_le(), Ordering::AcqRel);
            }
            block = stop;
        }
    }
}

/// The files of a disk.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    base: Option<File>,
    base_bytes: u64,
    layout: OverlayLayout,
    held: Arc<Held>,
}

impl Overlay {
    /// Checks and maps the overlay of disk `spec`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(spec: &DiskSpec, file: File, base: Option<File>) -> Result<Self, DiskError> {
        let disk = || spec.name.to_string();
        let io = |source| DiskError::Io { disk: disk(), source };
        let layout = OverlayLayout::new(spec.size);
        let mut header = [0; PAGE_BYTES_USIZE];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        layout.check(&header, spec.base).map_err(|source| DiskError::Overlay { disk: disk(), source })?;
        let have = file.metadata().map_err(io)?.len();
        if have < layout.file_bytes() {
            return Err(DiskError::Short { disk: disk(), have, want: layout.file_bytes() });
        }
        let bits = SharedMapping::part(&file, "disk overlay", HEADER_BYTES, layout.bitmap_bytes())
            .map_err(|source| DiskError::Map { disk: disk(), source })?;
        let base_bytes = match &base {
            Some(base) => base.metadata().map_err(io)?.len().min(spec.size.bytes()),
            None => 0,
        };
        let held = Arc::new(Held { bits, blocks: spec.size.pages() });
        Ok(Self { file, base, base_bytes, layout, held })
    }

    /// The disk's size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.layout.size().bytes()
    }

    /// Bytes that the base has for the disk; zeroes are behind them.
    pub const fn base_bytes(&self) -> u64 {
        self.base_bytes
    }

    /// Where byte 0 of the disk lies in the overlay.
    pub const fn data_start(&self) -> u64 {
        self.layout.data_start()
    }

    /// Which blocks it holds.
    pub const fn held(&self) -> &Arc<Held> {
        &self.held
    }

    /// Handles of the overlay and of the base for the ring.
    ///
    /// # Errors
    /// The operating system's, when it has no descriptors left.
    pub fn handles(&self) -> io::Result<(File, Option<File>)> {
        Ok((self.file.try_clone()?, self.base.as_ref().map(File::try_clone).transpose()?))
    }

    /// Copies a block that is not held from the base, so that a part of it can be written. Waits for the disk.
    ///
    /// # Errors
    /// The file system's; the block is then not held.
    pub fn copy_up(&self, block: u64) -> io::Result<()> {
        let mut content = [0; PAGE_BYTES_USIZE];
        let at = block * PAGE_BYTES;
        if let Some(base) = &self.base
            && let Some(there) = self.base_bytes.checked_sub(at)
        {
            let there = usize::try_from(there).unwrap_or(PAGE_BYTES_USIZE).min(PAGE_BYTES_USIZE);
            base.read_exact_at(&mut content[..there], at)?;
        }
        self.file.write_all_at(&content, self.data_start() + at)?;
        self.held.hold(block, 1);
        Ok(())
    }
}
