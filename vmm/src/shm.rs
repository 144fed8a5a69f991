//! Shared mappings of the descriptors that `mashined` hands over: guest RAM, dirty bitmap, console ring.
//!
//! The other side of each mapping is another process that writes whenever it likes, so nothing here ever becomes a
//! Rust reference to plain memory: the safe views are slices of atomics, and guest RAM is only reached through
//! vm-memory's volatile access.
//!
//! A mapping whose file is shorter than the mapping would raise SIGBUS on access, therefore the length is checked once, here.
//! `mashined` seals its memfds against shrinking.

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, AtomicU64};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use wire::units::CHUNK_BYTES;

/// Why a descriptor cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// The file is shorter than it has to be.
    #[error("the {what} memfd has {have} bytes, {want} are needed")]
    TooShort {
        /// Which descriptor.
        what: &'static str,
        /// Its size in bytes.
        have: u64,
        /// The size it must have, in bytes.
        want: u64,
    },
    /// The length does not fit this machine's address space.
    #[error("a {what} mapping of {bytes} bytes is too long")]
    TooLong {
        /// Which descriptor.
        what: &'static str,
        /// The length in bytes.
        bytes: u64,
    },
    /// The operating system refused.
    #[error("cannot map the {what} memfd")]
    Map {
        /// Which descriptor.
        what: &'static str,
        /// The reason.
        #[source]
        source: rustix::io::Errno,
    },
}

/// A shared, writable mapping of a memfd, or of a part of a disk's file, unmapped when dropped.
#[derive(Debug)]
pub struct SharedMapping {
    start: NonNull<u8>,
    bytes: usize,
    /// What was reserved, which is more than `bytes` for an aligned mapping.
    reserved: (NonNull<u8>, usize),
}

// SAFETY: the mapping is plain shared memory without thread affinity; all access goes through atomics or volatile operations.
unsafe impl Send for SharedMapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps the first `bytes` bytes of `file`; the start lies on a 2 MiB boundary, so that huge pages can be used.
    ///
    /// # Errors
    /// [`ShmError`] when the file is too short or cannot be mapped.
    pub fn new(file: &File, what: &'static str, bytes: u64) -> Result<Self, ShmError> {
        Self::part(file, what, 0, bytes)
    }

    /// Maps `bytes` bytes of `file` from `offset`, a multiple of the page size.
    ///
    /// # Errors
    /// As [`SharedMapping::new`].
    pub fn part(file: &File, what: &'static str, offset: u64, bytes: u64) -> Result<Self, ShmError> {
        let map = |source| ShmError::Map { what, source };
        let have = rustix::fs::fstat(file).map_err(map)?.st_size;
        let have = u64::try_from(have).unwrap_or(0);
        let want = offset.saturating_add(bytes);
        if have < want {
            return Err(ShmError::TooShort { what, have, want });
        }
        let too_long = ShmError::TooLong { what, bytes };
        let (Ok(bytes), Ok(align)) = (usize::try_from(bytes), usize::try_from(CHUNK_BYTES)) else {
            return Err(too_long);
        };
        let Some(reserve) = bytes.checked_add(align) else { return Err(too_long) };

        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address the kernel chooses aliases nothing.
        let base = unsafe { rustix::mm::mmap_anonymous(null_mut(), reserve, ProtFlags::empty(), flags) };
        let base = base.map_err(map)?.cast::<u8>();
        let reserved = (NonNull::new(base).ok_or(map(rustix::io::Errno::NOMEM))?, reserve);
        let start = base.wrapping_add(base.align_offset(align));
        let mut mapping = Self { start: reserved.0, bytes, reserved };
        // SAFETY: `start .. start + bytes` lies within the reservation made above, which nothing else uses.
        let mapped = unsafe {
            rustix::mm::mmap(
                start.cast(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                file.as_fd(),
                offset,
            )
        };
        let mapped = mapped.map_err(map)?.cast::<u8>();
        mapping.start = NonNull::new(mapped).ok_or(map(rustix::io::Errno::NOMEM))?;
        Ok(mapping)
    }

    /// Asks for huge pages. A host whose shmem does not give any says no, which is as good.
    pub fn advise_huge_pages(&self) {
        // SAFETY: the range is our own mapping, and this advice never changes its content.
        let _refused =
            unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxHugepage) };
    }

    /// Address of the first byte, for KVM's memory slots and vm-memory's regions. Valid while `self` lives.
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The mapping as 64-bit words.
    pub const fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is aligned to 2 MiB, `bytes` long, lives as long as `self`, and is only ever seen as atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes / 8) }
    }

    /// The mapping as bytes.
    pub const fn octets(&self) -> &[AtomicU8] {
        // SAFETY: as in `words`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes) }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the reservation was made by `new` and contains the mapping; views of it borrow `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.reserved.0.as_ptr().cast(), self.reserved.1) };
        debug_assert!(unmapped.is_ok());
    }
}
