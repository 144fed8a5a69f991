//! The dirty bitmap shared with the VMM: one bit a page, set by whoever learns that the page was written.
//!
//! Whoever sends a page takes its bit first and reads the page afterwards. A write after the taking sets the bit again
//! (the VMM publishes KVM's log, devices mark what they wrote after they wrote it), so that no write is ever lost; at worst a
//! page is sent twice.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::shm::{Shm, ShmError};

const NAME: &str = "mashine-dirty";

/// The bitmap. Word `w` holds the bits of pages `64 w ..= 64 w + 63`, the lowest bit first.
#[derive(Debug)]
pub struct DirtyBitmap {
    shm: Shm,
    words: usize,
}

impl DirtyBitmap {
    /// Size of the memfd for a space of so many pages, in bytes.
    pub fn bytes_for(pages: u64) -> u64 {
        pages.div_ceil(64) * 8
    }

    /// Makes a bitmap without a bit set.
    ///
    /// # Errors
    /// [`ShmError`] from the kernel.
    pub fn create(pages: u64) -> Result<Self, ShmError> {
        Ok(Self::over(Shm::create(NAME, Self::bytes_for(pages))?))
    }

    /// Takes a bitmap back from a VMM.
    ///
    /// # Errors
    /// [`ShmError::Mismatch`] when it does not fit a space of so many pages.
    pub fn adopt(file: OwnedFd, pages: u64) -> Result<Self, ShmError> {
        Ok(Self::over(Shm::adopt(NAME, file, Self::bytes_for(pages))?))
    }

    fn over(shm: Shm) -> Self {
        let words = shm.bytes() / 8;
        Self { shm, words }
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Takes all bits of a word: they are clear afterwards, and the caller answers for sending those pages. Zero past the end.
    pub fn take(&self, word: usize) -> u64 {
        let Some(bits) = self.shm.word(word) else { return 0 };
        // Most words are clear in the later rounds: look before writing, so that they stay shared in the caches.
        if bits.load(Ordering::Relaxed) == 0 { 0 } else { bits.swap(0, Ordering::AcqRel) }
    }

    /// Sets bits: gives back what was taken and not delivered.
    pub fn give_back(&self, word: usize, bits: u64) {
        if let Some(at) = self.shm.word(word).filter(|_| bits != 0) {
            at.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Number of bits set.
    pub fn count(&self) -> u64 {
        (0..self.words)
            .filter_map(|w| self.shm.word(w))
            .map(|bits| u64::from(bits.load(Ordering::Relaxed).count_ones()))
            .sum()
    }
}

impl AsFd for DirtyBitmap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shm.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_taken_once_and_can_be_given_back() {
        let bitmap = DirtyBitmap::create(4096).unwrap();
        assert_eq!((bitmap.words(), bitmap.count()), (64, 0));
        bitmap.give_back(5, 0b1011);
        bitmap.give_back(64, u64::MAX);
        assert_eq!(bitmap.count(), 3);
        assert_eq!(bitmap.take(5), 0b1011);
        assert_eq!((bitmap.take(5), bitmap.take(64), bitmap.count()), (0, 0, 0));
    }
}
