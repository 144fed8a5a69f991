//! The console: serial output as a ring in shared memory, addressed by absolute byte offset.
//!
//! `mashined` reads it without asking the VMM, and the offset travels with the machine's state, so that a log goes on
//! where it was on another host. Layout in [`wire::vmm`]: 8 bytes of offset in the first page, then the ring. The data
//! is written before the offset (release), so a reader that loads the offset (acquire) sees all bytes before it, unless the writer has lapped it,
//! which it notices by reading the offset again.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::Ordering;

use wire::vmm::{CONSOLE_MEMFD_BYTES, CONSOLE_RING_BYTES};

use crate::shm::{SharedMapping, ShmError};

/// The writing end of the ring.
#[derive(Debug)]
pub struct ConsoleRing {
    mapping: SharedMapping,
    offset: u64,
}

impl ConsoleRing {
    /// Maps the ring and goes on at the offset it has.
    ///
    /// # Errors
    /// [`ShmError`] when the memfd is too short or cannot be mapped.
    pub fn new(file: &File) -> Result<Self, ShmError> {
        let mapping = SharedMapping::new(file, "console memfd", CONSOLE_MEMFD_BYTES)?;
        let offset = mapping.words().first().map_or(0, |word| u64::from_le(word.load(Ordering::Acquire)));
        Ok(Self { mapping, offset })
    }

    /// Absolute offset of the next byte.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Goes on at `offset`, where the source host stopped.
    pub fn set_offset(&mut self, offset: u64) {
        self.offset = offset;
        if let Some(word) = self.mapping.words().first() {
            word.store(offset.to_le(), Ordering::Release);
        }
    }
}

impl Write for ConsoleRing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut offset = self.offset;
        for &byte in bytes {
            let at = usize::try_from(4096 + offset % CONSOLE_RING_BYTES).unwrap_or(usize::MAX);
            if let Some(cell) = self.mapping.octets().get(at) {
                cell.store(byte, Ordering::Relaxed);
            }
            offset = offset.wrapping_add(1);
        }
        self.set_offset(offset);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn wraps_and_keeps_the_absolute_offset() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(CONSOLE_MEMFD_BYTES).unwrap();
        let mut ring = ConsoleRing::new(&file).unwrap();
        ring.set_offset(CONSOLE_RING_BYTES - 1);
        ring.write_all(b"xyz").unwrap();
        let mut got = [0; 2];
        file.read_exact_at(&mut got, 4096).unwrap();
        assert_eq!(&got, b"yz");
        let mut header = [0; 8];
        file.read_exact_at(&mut header, 0).unwrap();
        assert_eq!(u64::from_le_bytes(header), CONSOLE_RING_BYTES + 2);
        assert_eq!(ConsoleRing::new(&file).unwrap().offset(), CONSOLE_RING_BYTES + 2);
    }
}
