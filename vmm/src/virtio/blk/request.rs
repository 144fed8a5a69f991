//! A request of the driver, read out of its chain (virtio 1.2, section 5.2.6).
//!
//! The driver may cut a request into descriptors as it likes: the header is the first 16 bytes that the device reads, the status the
//! last byte that it writes, and the data what is left. A chain that has no room for both, lies outside of RAM or asks for more than
//! [`REQUEST_BYTES_MAX`] breaks the rules; a request for what the disk does not have is answered with an error.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::ranges::{Range, Ranges};
use crate::memory::GuestMemory;
use crate::virtio::queue::{CHAIN_MAX, Chain, QueueError};

/// Most descriptors for data in one request: what is left of a chain.
pub const SEGMENTS_MAX: u32 = 254;
/// Longest of them that a driver is asked to make, in bytes.
pub const SEGMENT_BYTES_MAX: u32 = 16 << 10;
/// Most bytes of data in one request.
pub const REQUEST_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// Size of a sector, in which drivers count whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: usize = 16;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    In,
    /// Write.
    Out,
    /// Make what was written durable.
    Flush,
    /// The disk's name.
    GetId,
    /// Forget blocks.
    Discard,
    /// Make blocks zero.
    WriteZeroes,
    /// Something this device does not know.
    Unknown,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Its place in the descriptor table.
    pub head: u16,
    /// What is wanted.
    pub kind: Kind,
    /// Sector of the disk.
    pub sector: u64,
    /// Where the data is or goes to.
    pub data: Ranges,
    /// Where the status goes to.
    pub status: GuestAddress,
}

impl Request {
    /// Reads the request out of `chain`.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules.
    pub fn parse(chain: Chain<'_>, memory: &GuestMemory) -> Result<Self, QueueError> {
        let head = chain.head_index();
        let (mut read, mut written) = split(chain, memory)?;
        let mut header = [0; HEADER_BYTES];
        let mut filled = 0;
        for range in read.take(16) {
            let part = header.get_mut(filled..filled + range.bytes).unwrap_or_default();
            memory.read_slice(part, GuestAddress(range.address))?;
            filled += range.bytes;
        }
        if filled < HEADER_BYTES {
            return Err(QueueError::TooShort);
        }
        let status = written.pop_byte().ok_or(QueueError::TooShort)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = match u32::from_le_bytes([a, b, c, d]) {
            TYPE_IN => Kind::In,
            TYPE_OUT => Kind::Out,
            TYPE_FLUSH => Kind::Flush,
            TYPE_GET_ID => Kind::GetId,
            TYPE_DISCARD => Kind::Discard,
            TYPE_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        };
        let data = match kind {
            Kind::In | Kind::GetId => written,
            _ => read,
        };
        if data.bytes() > REQUEST_BYTES_MAX {
            return Err(QueueError::TooLarge);
        }
        Ok(Self { head, kind, sector: u64::from_le_bytes(sector), data, status: GuestAddress(status) })
    }

    /// The bytes of a disk of `disk_bytes` that it is about: offset and length. `None` if they are not on it, or not whole sectors.
    pub fn extent(&self, disk_bytes: u64) -> Option<(u64, u64)> {
        extent(self.sector, self.data.bytes(), disk_bytes)
    }
}

/// `bytes` from `sector` on, if a disk of `disk_bytes` has them.
pub fn extent(sector: u64, bytes: u64, disk_bytes: u64) -> Option<(u64, u64)> {
    let at = sector.checked_mul(SECTOR_BYTES)?;
    let end = at.checked_add(bytes)?;
    (bytes.is_multiple_of(SECTOR_BYTES) && end <= disk_bytes).then_some((at, bytes))
}

/// What of `chain` the device reads and what it writes, all of it in RAM.
fn split(chain: Chain<'_>, memory: &GuestMemory) -> Result<(Ranges, Ranges), QueueError> {
    let (mut read, mut written) = (Ranges::default(), Ranges::default());
    for (count, descriptor) in chain.take(CHAIN_MAX + 1).enumerate() {
        if count == CHAIN_MAX {
            return Err(QueueError::ChainTooLong);
        }
        let bytes = usize::try_from(descriptor.len()).map_err(|_| QueueError::TooLarge)?;
        let address = descriptor.addr();
        if bytes > 0 && !memory.check_range(address, bytes) {
            return Err(GuestMemoryError::InvalidGuestAddress(address).into());
        }
        let range = Range { address: address.0, bytes };
        match descriptor.is_write_only() {
            true => written.push(range),
            false if written.bytes() > 0 => return Err(QueueError::Direction),
            false => read.push(range),
        }
    }
    Ok((read, written))
}
