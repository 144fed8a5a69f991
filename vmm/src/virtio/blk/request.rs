//! A request of the driver (virtio 1.2, section 5.2.6), checked before any of it is carried out.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;
use crate::virtio::queue::{CHAIN_MAX, Chain, QueueError};

/// Bytes in a sector, the unit of requests whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Most bytes of one request; a driver that keeps to the limits in the configuration space asks for a quarter of it.
const BYTES_MAX: u64 = 16 << 20;
/// Length of a request's header.
const HEADER_BYTES: usize = 16;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Read from this byte on.
    Read(u64),
    /// Write from this byte on.
    Write(u64),
    /// Have on disk what was written.
    Flush,
    /// Give the disk's name.
    Id,
    /// Nothing that this device knows.
    Unknown,
}

/// A part of a request's data in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// How many bytes.
    pub bytes: u32,
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// Where its data are.
    pub segments: Vec<Segment>,
    /// Where its status goes.
    pub status: GuestAddress,
    /// Its chain's head.
    pub head: u16,
}

impl Request {
    /// Reads the request that a chain describes: a header and, for a write, data for the device to read; data of a read, and a byte of status for it to write.
    ///
    /// # Errors
    /// [`QueueError`] when the chain is not of this form.
    pub fn parse(chain: Chain<'_>, memory: &GuestMemory) -> Result<Self, QueueError> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for (count, descriptor) in chain.enumerate() {
            if count == CHAIN_MAX {
                return Err(QueueError::ChainTooLong);
            }
            let segment = Segment { address: descriptor.addr(), bytes: descriptor.len() };
            match (descriptor.is_write_only(), writable.is_empty()) {
                (true, _) => writable.push(segment),
                (false, true) => readable.push(segment),
                (false, false) => return Err(QueueError::Direction),
            }
        }
        let status = take_last_byte(&mut writable).ok_or(QueueError::Direction)?;
        let header = take_header(&mut readable, memory)?;
        let total: u64 = readable.iter().chain(&writable).map(|segment| u64::from(segment.bytes)).sum();
        if total > BYTES_MAX {
            return Err(QueueError::TooLarge);
        }
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        // A sector beyond any disk becomes a byte beyond it.
        let offset = sector.saturating_mul(SECTOR_BYTES);
        let (kind, segments) = match word(0) {
            0 => (Kind::Read(offset), writable),
            1 => (Kind::Write(offset), readable),
            4 => (Kind::Flush, Vec::new()),
            8 => (Kind::Id, writable),
            _ => (Kind::Unknown, Vec::new()),
        };
        Ok(Self { kind, segments, status, head })
    }

    /// Length of its data.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| u64::from(segment.bytes)).sum()
    }
}

/// Cuts the last byte off.
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = segments.last_mut().filter(|last| last.bytes > 0)?;
    last.bytes -= 1;
    let at = GuestAddress(last.address.0.checked_add(u64::from(last.bytes))?);
    if last.bytes == 0 {
        segments.pop();
    }
    Some(at)
}

/// Cuts the header off, wherever the driver has divided it.
fn take_header(segments: &mut Vec<Segment>, memory: &GuestMemory) -> Result<[u8; HEADER_BYTES], QueueError> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        let first = segments.first_mut().ok_or(QueueError::Direction)?;
        let wanted = HEADER_BYTES - filled;
        let bytes = usize::try_from(first.bytes).unwrap_or(wanted).min(wanted);
        memory.read_slice(&mut header[filled..filled + bytes], first.address)?;
        filled += bytes;
        let taken = u32::try_from(bytes).unwrap_or(0);
        first.address = GuestAddress(first.address.0.saturating_add(u64::from(taken)));
        first.bytes -= taken;
        if first.bytes == 0 {
            segments.remove(0);
        }
    }
    Ok(header)
}
