//! Guest RAM as the data plane sees it: numbered pages, copied in and out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::Bytes as _;
use wire::units::{CHUNK_BYTES, PAGE_BYTES_USIZE, PageIndex, RamSize};

use super::shm::{Shm, ShmError};

const NAME: &str = "mashine-ram";

/// What a page was found to hold when it was copied out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageContent {
    /// All zeroes; the destination holds nothing of use.
    Zero,
    /// Something; the destination holds a copy.
    Data,
}

/// Guest RAM.
#[derive(Debug)]
pub struct GuestRam {
    shm: Shm,
    size: RamSize,
}

impl GuestRam {
    /// Makes zeroed RAM. Pages take memory when they are first written.
    ///
    /// # Errors
    /// [`ShmError`] from the kernel.
    pub fn create(size: RamSize) -> Result<Self, ShmError> {
        let shm = Shm::create(NAME, size.bytes())?;
        shm.advise(Advice::LinuxHugepage);
        Ok(Self { shm, size })
    }

    /// Takes RAM back from a VMM that outlived an earlier `mashined`.
    ///
    /// # Errors
    /// [`ShmError::Mismatch`] when the descriptor is not RAM of this size.
    pub fn adopt(file: OwnedFd, size: RamSize) -> Result<Self, ShmError> {
        Ok(Self { shm: Shm::adopt(NAME, file, size.bytes())?, size })
    }

    /// Its size.
    pub fn size(&self) -> RamSize {
        self.size
    }

    /// Copies a page to `out`. The guest may write to the page meanwhile: then the copy is torn, the page's dirty bit is
    /// set, and it is sent again. Pages past the end read as zero.
    pub fn copy_out(&self, page: PageIndex, out: &mut [u8; PAGE_BYTES_USIZE]) -> PageContent {
        let Some(at) = self.offset(page) else { return PageContent::Zero };
        match self.shm.volatile().read_slice(out, at) {
            Ok(()) if !is_zero(out) => PageContent::Data,
            _ => PageContent::Zero,
        }
    }

    /// Whether any page of a chunk was ever written. Asking costs no memory, whereas reading a page that was never written has the kernel
    /// allocate it. (Where the next *hole* is would be the wrong question: the kernel looks through all of RAM for it.)
    pub fn chunk_written(&self, chunk: u64) -> bool {
        let Some(start) = chunk.checked_mul(CHUNK_BYTES).filter(|start| *start < self.size.bytes()) else {
            return false;
        };
        match rustix::fs::seek(&self.shm, SeekFrom::Data(start)) {
            Ok(data) => data < start + CHUNK_BYTES,
            Err(Errno::NXIO) => false,
            // When the kernel cannot say, reading is right, only slower.
            Err(_) => true,
        }
    }

    /// Writes part of RAM, from byte `offset`. Returns whether it lay within RAM; nothing is written if not.
    #[must_use]
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> bool {
        let fits = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.size.bytes());
        let Ok(at) = usize::try_from(offset) else { return false };
        fits && self.shm.volatile().write_slice(bytes, at).is_ok()
    }

    /// Makes a page zero, if it lies within RAM.
    pub fn clear(&self, page: PageIndex) {
        const ZEROES: [u8; PAGE_BYTES_USIZE] = [0; PAGE_BYTES_USIZE];
        if let Some(at) = self.offset(page) {
            let written = self.shm.volatile().write_slice(&ZEROES, at);
            debug_assert!(written.is_ok());
        }
    }

    /// Has the kernel allocate all pages now, so that the copy does not wait for it page by page.
    pub fn populate(&self) {
        self.shm.advise(Advice::LinuxPopulateWrite);
    }

    fn offset(&self, page: PageIndex) -> Option<usize> {
        (page.0 < self.size.pages()).then(|| usize::try_from(page.byte_offset()).ok()).flatten()
    }
}

impl AsFd for GuestRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shm.as_fd()
    }
}

/// Whether all bytes are zero. Most pages with content show it in their first words.
pub(super) fn is_zero(page: &[u8; PAGE_BYTES_USIZE]) -> bool {
    let (words, _) = page.as_chunks::<32>();
    words.iter().all(|w| *w == [0; 32])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::create(RamSize::from_bytes(16 << 20).unwrap()).unwrap()
    }

    #[test]
    fn pages_go_in_and_come_out() {
        let ram = ram();
        let mut out = [7; PAGE_BYTES_USIZE];
        assert_eq!(ram.copy_out(PageIndex(3), &mut out), PageContent::Zero);
        assert!(ram.copy_in(3 * 4096 + 4095, &[9]));
        assert_eq!(ram.copy_out(PageIndex(3), &mut out), PageContent::Data);
        assert_eq!((out[4094], out[4095]), (0, 9));
        ram.clear(PageIndex(3));
        assert_eq!(ram.copy_out(PageIndex(3), &mut out), PageContent::Zero);
    }

    #[test]
    fn chunks_never_written_are_known_without_reading_them() {
        let ram = ram();
        assert!(ram.copy_in(3 * CHUNK_BYTES - 4096, &[0; 4096]));
        let written: Vec<bool> = (0..9).map(|chunk| ram.chunk_written(chunk)).collect();
        assert_eq!(written, [false, false, true, false, false, false, false, false, false]);
        assert!(!ram.chunk_written(u64::MAX));
    }

    #[test]
    fn nothing_past_the_end_is_touched() {
        let ram = ram();
        let end = ram.size().bytes();
        assert!(!ram.copy_in(end, &[1]));
        assert!(!ram.copy_in(end - 1, &[1, 2]));
        assert!(!ram.copy_in(u64::MAX, &[1, 2]));
        assert!(ram.copy_in(end - 1, &[1]));
        ram.clear(PageIndex(u64::MAX / 4096));
        let mut out = [0; PAGE_BYTES_USIZE];
        assert_eq!(ram.copy_out(PageIndex(ram.size().pages()), &mut out), PageContent::Zero);
    }

    #[test]
    fn adopted_ram_is_the_same_memory_and_its_size_is_checked() {
        let ram = ram();
        assert!(ram.copy_in(0, b"here"));
        let again = GuestRam::adopt(ram.as_fd().try_clone_to_owned().unwrap(), ram.size()).unwrap();
        let mut out = [0; PAGE_BYTES_USIZE];
        again.copy_out(PageIndex(0), &mut out);
        assert_eq!(&out[..4], b"here");
        let wrong = RamSize::from_bytes(18 << 20).unwrap();
        let refused = GuestRam::adopt(ram.as_fd().try_clone_to_owned().unwrap(), wrong);
        assert!(matches!(refused, Err(ShmError::Mismatch { .. })));
    }
}
