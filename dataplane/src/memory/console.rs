//! The console ring: the last mebibyte of a machine's serial output, numbered from its first byte ever.
//!
//! The VMM writes it ([`wire::vmm::CONSOLE_RING_BYTES`] gives the layout); we read it without asking, and on a migration the
//! target's ring is filled with what the source's held, so that a reader goes on at its offset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use vm_memory::Bytes as _;
use wire::vmm::{CONSOLE_MEMFD_BYTES, CONSOLE_RING_BYTES};

use super::shm::{Shm, ShmError};

const NAME: &str = "mashine-console";
const RING_START: u64 = CONSOLE_MEMFD_BYTES - CONSOLE_RING_BYTES;

/// A piece of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleText {
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The ring.
#[derive(Debug)]
pub struct ConsoleRing {
    shm: Shm,
}

impl ConsoleRing {
    /// Makes an empty ring.
    ///
    /// # Errors
    /// [`ShmError`] from the kernel.
    pub fn create() -> Result<Self, ShmError> {
        Ok(Self { shm: Shm::create(NAME, CONSOLE_MEMFD_BYTES)? })
    }

    /// Takes a ring back from a VMM.
    ///
    /// # Errors
    /// [`ShmError::Mismatch`] when it is no ring.
    pub fn adopt(file: OwnedFd) -> Result<Self, ShmError> {
        Ok(Self { shm: Shm::adopt(NAME, file, CONSOLE_MEMFD_BYTES)? })
    }

    /// Offset of the byte that will be written next.
    pub fn end(&self) -> u64 {
        self.shm.word(0).map_or(0, |at| u64::from_le(at.load(Ordering::Acquire)))
    }

    /// Reads at most `bytes_max` bytes from `offset`, or from the oldest byte that is left if `offset` is older, or nothing if it
    /// is not written yet.
    pub fn read(&self, offset: u64, bytes_max: u64) -> ConsoleText {
        let end = self.end();
        let offset = offset.clamp(end.saturating_sub(CONSOLE_RING_BYTES), end);
        let count = (end - offset).min(bytes_max);
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
        self.for_each_span(offset, bytes.len(), |at, span| {
            let read = self.shm.volatile().read_slice(&mut bytes[span], at);
            debug_assert!(read.is_ok());
        });
        // What was overwritten while we copied is not what it was: leave it out.
        let oldest = self.end().saturating_sub(CONSOLE_RING_BYTES);
        let torn = usize::try_from(oldest.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        bytes.drain(..torn);
        ConsoleText { offset: offset + torn as u64, bytes }
    }

    /// Writes a piece that a migration brought, before the VMM here runs. Pieces come in order; one that leaves a gap starts the ring anew.
    pub fn fill(&self, text: &ConsoleText) {
        let skip = text.bytes.len().saturating_sub(usize::try_from(CONSOLE_RING_BYTES).unwrap_or(usize::MAX));
        let (start, bytes) = (text.offset + skip as u64, &text.bytes[skip..]);
        self.for_each_span(start, bytes.len(), |at, span| {
            let written = self.shm.volatile().write_slice(&bytes[span], at);
            debug_assert!(written.is_ok());
        });
        if let Some(at) = self.shm.word(0) {
            at.store((start + bytes.len() as u64).to_le(), Ordering::Release);
        }
    }

    /// Calls `visit` with the place in the memfd and the range of the caller's buffer for each of the (one or two) straight spans.
    fn for_each_span(&self, offset: u64, len: usize, mut visit: impl FnMut(usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let in_ring = (offset + done as u64) % CONSOLE_RING_BYTES;
            let straight =
                usize::try_from(CONSOLE_RING_BYTES - in_ring).unwrap_or(usize::MAX).min(len - done);
            let Ok(at) = usize::try_from(RING_START + in_ring) else { return };
            visit(at, done..done + straight);
            done += straight;
        }
    }
}

impl AsFd for ConsoleRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shm.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_back_across_the_wrap() {
        let ring = ConsoleRing::create().unwrap();
        assert_eq!(ring.read(0, 100).bytes, b"");
        let offset = 3 * CONSOLE_RING_BYTES - 3;
        ring.fill(&ConsoleText { offset, bytes: b"abcdef".to_vec() });
        assert_eq!(ring.end(), offset + 6);
        assert_eq!(ring.read(offset, 100), ConsoleText { offset, bytes: b"abcdef".to_vec() });
        assert_eq!(ring.read(offset + 2, 3).bytes, b"cde");
        assert_eq!(ring.read(u64::MAX, 3), ConsoleText { offset: offset + 6, bytes: vec![] });
        assert_eq!(ring.read(0, 10).offset, ring.end() - CONSOLE_RING_BYTES);
    }

    #[test]
    fn a_piece_longer_than_the_ring_keeps_its_end() {
        let ring = ConsoleRing::create().unwrap();
        let long: Vec<u8> = (0..CONSOLE_RING_BYTES + 5).map(|i| (i % 251).to_le_bytes()[0]).collect();
        ring.fill(&ConsoleText { offset: 0, bytes: long.clone() });
        let all = ring.read(0, u64::MAX);
        assert_eq!(all.offset, 5);
        assert_eq!(all.bytes, long[5..]);
    }
}
