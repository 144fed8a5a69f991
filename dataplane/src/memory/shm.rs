//! A memfd (or part of a disk's file) and its mapping: the one place that maps memory.
//!
//! Invariant of [`Shm`], on which every `unsafe` block here rests: `base .. base + bytes` is one shared, writable mapping
//! of `file`, made in [`Shm::map`] and unmapped only when the `Shm` is dropped. A memfd is sealed against shrinking, and a disk's file has the space
//! of its bitmap allocated and is never shortened, so that an access within `bytes` cannot fault.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::VolatileSlice;

/// Why shared memory could not be made or mapped.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// A system call failed.
    #[error(
        "cannot {call} `{name}` of {bytes} bytes: is memory (or a cgroup or descriptor limit) exhausted?"
    )]
    System {
        /// What was tried.
        call: &'static str,
        /// The memory's name.
        name: &'static str,
        /// Its size.
        bytes: u64,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// A descriptor that came back from a VMM is not the memory it should be.
    #[error("`{name}` has {have} bytes (or may shrink) where {want} sealed bytes belong")]
    Mismatch {
        /// The memory's name.
        name: &'static str,
        /// Size found.
        have: u64,
        /// Size needed.
        want: u64,
    },
}

/// Alignment of mappings: a huge page, so that the kernel may back guest RAM with them.
const ALIGN: usize = 2 << 20;

/// A mapped memfd.
#[derive(Debug)]
pub(super) struct Shm {
    file: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and lives as long as the `Shm`.
unsafe impl Send for Shm {}
// SAFETY: all access goes through volatile copies and atomics, which are fit for concurrent use; see the module's doc.
unsafe impl Sync for Shm {}

impl Shm {
    /// Makes a sealed memfd of `bytes` zeroes and maps it.
    pub(super) fn create(name: &'static str, bytes: u64) -> Result<Self, ShmError> {
        let fail = |call| move |source| ShmError::System { call, name, bytes, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(name, flags).map_err(fail("create"))?;
        rustix::fs::ftruncate(&file, bytes).map_err(fail("size"))?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(fail("seal"))?;
        Self::map(name, file, 0, bytes)
    }

    /// Maps a memfd that a VMM gave back; checks its size and that it cannot shrink under us.
    pub(super) fn adopt(name: &'static str, file: OwnedFd, bytes: u64) -> Result<Self, ShmError> {
        let fail = |call| move |source| ShmError::System { call, name, bytes, source };
        let have = rustix::fs::fstat(&file).map_err(fail("stat"))?.st_size.unsigned_abs();
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(fail("read the seals of"))?;
        if have != bytes || !seals.contains(SealFlags::SHRINK) {
            return Err(ShmError::Mismatch { name, have, want: bytes });
        }
        Self::map(name, file, 0, bytes)
    }

    /// Maps part of a file of this host, from `offset`, a multiple of the page size. Its space must be allocated, and nobody but us and our VMM may
    /// change its length: what a sealed memfd promises, the caller does.
    pub(super) fn over_file(
        name: &'static str,
        file: OwnedFd,
        offset: u64,
        bytes: u64,
    ) -> Result<Self, ShmError> {
        Self::map(name, file, offset, bytes)
    }

    fn map(name: &'static str, file: OwnedFd, offset: u64, bytes: u64) -> Result<Self, ShmError> {
        let fail = |call| move |source| ShmError::System { call, name, bytes, source };
        let len = usize::try_from(bytes).map_err(|_| fail("map")(Errno::NOMEM))?;
        // Reserve more than needed, so that an aligned start lies within; the rest is given back at once.
        let reserved_len = len.checked_add(ALIGN).ok_or_else(|| fail("map")(Errno::NOMEM))?;
        let null = std::ptr::null_mut::<c_void>();
        // SAFETY: a fresh anonymous reservation at an address of the kernel's choice touches no existing memory.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                null,
                reserved_len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(fail("reserve addresses for"))?;
        let skip = reserved.cast::<u8>().align_offset(ALIGN);
        let aligned = reserved.cast::<u8>().wrapping_add(skip);
        let (prot, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE);
        // SAFETY: `aligned .. aligned + len` lies within the reservation made above, which nobody else knows of.
        let mapped = unsafe { rustix::mm::mmap(aligned.cast(), len, prot, flags, &file, offset) };
        let trim = |from: *mut u8, n: usize| {
            if n > 0 {
                // SAFETY: the range is a part of the reservation outside the mapping, page-aligned, unused.
                let result = unsafe { rustix::mm::munmap(from.cast(), n) };
                debug_assert!(result.is_ok());
            }
        };
        let base = match mapped {
            Ok(at) => NonNull::new(at.cast::<u8>()),
            Err(source) => {
                trim(reserved.cast(), reserved_len);
                return Err(fail("map")(source));
            }
        };
        trim(reserved.cast(), skip);
        let end = len.next_multiple_of(rustix::param::page_size());
        trim(aligned.wrapping_add(end), reserved_len - skip - end);
        let base = base.ok_or_else(|| fail("map")(Errno::NOMEM))?;
        Ok(Self { file, base, bytes: len })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole mapping for volatile access.
    pub(super) fn volatile(&self) -> VolatileSlice<'_> {
        // SAFETY: by the type's invariant the range is mapped for as long as `self` is borrowed.
        unsafe { VolatileSlice::new(self.base.as_ptr(), self.bytes) }
    }

    /// The 64-bit word at `index`, `None` past the end.
    pub(super) fn word(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.bytes / size_of::<u64>() {
            return None;
        }
        let at = self.base.as_ptr().cast::<u64>().wrapping_add(index);
        // SAFETY: within the mapping by the check above, 8-byte aligned because `base` is page-aligned, and only ever
        // accessed atomically by every process that maps it.
        Some(unsafe { AtomicU64::from_ptr(at) })
    }

    /// Asks for huge pages and for the memory to be there now; both are wishes, their failure changes nothing but speed.
    pub(super) fn advise(&self, advice: Advice) {
        // SAFETY: the range is our mapping; none of the advice values used here changes its content.
        let _wish = unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.bytes, advice) };
    }
}

impl AsFd for Shm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        // SAFETY: `base .. base + bytes` is our own mapping, and every borrow of it has ended.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}
