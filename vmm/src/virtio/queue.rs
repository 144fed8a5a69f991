//! Virtqueue entries, taken and given back with every length and address checked.
//!
//! virtio-queue bounds a chain by the length of its table; an indirect table can have 65,535 entries, so that a chain
//! is bounded once more here, in descriptors and in bytes.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Most descriptors in one chain.
pub const CHAIN_MAX: usize = 256;
/// Most chains handled in one go, so that no driver keeps the event loop for itself.
pub const BUDGET: usize = 128;
/// VRING_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// How the driver broke the rules.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings cannot be read, or say impossible things.
    #[error("the virtqueue is broken")]
    Ring(#[from] virtio_queue::Error),
    /// A buffer is not in RAM.
    #[error("a buffer is not in guest RAM")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A buffer for the wrong direction.
    #[error("a buffer for the wrong direction")]
    Direction,
    /// A chain of more than [`CHAIN_MAX`] descriptors.
    #[error("a chain of more than {CHAIN_MAX} descriptors")]
    ChainTooLong,
    /// A chain without room for what every request has.
    #[error("a chain that is too short for a request")]
    TooShort,
    /// More bytes than the device takes at once.
    #[error("a chain of more bytes than the device takes")]
    TooLarge,
}

/// A chain of the available ring.
pub type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// Takes the next chain.
///
/// # Errors
/// [`QueueError::Ring`] when the driver claims more entries than the ring has.
pub fn pop<'a>(queue: &mut Queue, memory: &'a GuestMemory) -> Result<Option<Chain<'a>>, QueueError> {
    Ok(queue.iter(memory)?.next())
}

/// Gives the chain that was taken last back unused, as if it had not been taken.
pub fn unpop(queue: &mut Queue) {
    queue.go_to_previous_position();
}

/// Gives a chain back to the driver, with `bytes` written into it.
///
/// # Errors
/// [`QueueError::Ring`] when the head is not an entry of the ring.
pub fn push(queue: &mut Queue, memory: &GuestMemory, head: u16, bytes: u32) -> Result<(), QueueError> {
    Ok(queue.add_used(memory, head, bytes)?)
}

/// Gives several chains back at once, each with the bytes written into it: the driver sees all of them or none.
///
/// # Errors
/// [`QueueError`] when a head is not an entry of the ring, or the ring cannot be written.
pub fn push_all(queue: &mut Queue, memory: &GuestMemory, used: &[(u16, u32)]) -> Result<(), QueueError> {
    let size = queue.size();
    let mut next = Wrapping(queue.next_used());
    for &(head, bytes) in used {
        if head >= size {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        let slot = u64::from(next.0 % size);
        let at = GuestAddress(queue.used_ring()).checked_add(4 + 8 * slot);
        let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
        memory.write_obj((u64::from(head) | u64::from(bytes) << 32).to_le(), at)?;
        next += 1;
    }
    queue.set_next_used(next.0);
    let at = GuestAddress(queue.used_ring()).checked_add(2).ok_or(virtio_queue::Error::AddressOverflow)?;
    Ok(memory.store(next.0.to_le(), at, Ordering::Release)?)
}

/// Whether the driver wants to be interrupted for used entries.
pub fn wants_interrupt(queue: &Queue, memory: &GuestMemory) -> bool {
    let flags = memory.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Acquire);
    flags.map_or(true, |flags| u16::from_le(flags) & NO_INTERRUPT == 0)
}

/// The descriptors of `chain`, all of which must be for the device to write (`writable`) or to read.
fn descriptors(chain: Chain<'_>, writable: bool) -> impl Iterator<Item = Result<Descriptor, QueueError>> {
    chain.take(CHAIN_MAX + 1).enumerate().map(move |(count, descriptor)| {
        if count == CHAIN_MAX {
            return Err(QueueError::ChainTooLong);
        }
        if descriptor.is_write_only() != writable {
            return Err(QueueError::Direction);
        }
        Ok(descriptor)
    })
}

fn length(descriptor: &Descriptor) -> Result<usize, QueueError> {
    usize::try_from(descriptor.len()).map_err(|_| QueueError::TooLarge)
}

/// The descriptors of `chain`, all of which must be for the device to write.
pub fn writable(chain: Chain<'_>) -> impl Iterator<Item = Result<Descriptor, QueueError>> {
    descriptors(chain, true)
}

/// Copies what the driver wrote into the chain to `buffer`, and gives its length.
///
/// # Errors
/// [`QueueError`] when it is longer than `buffer` or breaks the rules.
pub fn gather(chain: Chain<'_>, memory: &GuestMemory, buffer: &mut [u8]) -> Result<usize, QueueError> {
    let mut filled = 0;
    for descriptor in descriptors(chain, false) {
        let descriptor = descriptor?;
        let end = filled + length(&descriptor)?;
        let part = buffer.get_mut(filled..end).ok_or(QueueError::TooLarge)?;
        memory.read_slice(part, descriptor.addr())?;
        filled = end;
    }
    Ok(filled)
}

/// Copies as much of `data` into the chain as it holds, and says how much.
///
/// # Errors
/// [`QueueError`] when the driver broke the rules.
pub fn scatter(chain: Chain<'_>, memory: &GuestMemory, data: &[u8]) -> Result<usize, QueueError> {
    let mut rest = data;
    for descriptor in descriptors(chain, true) {
        let descriptor = descriptor?;
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at(length(&descriptor)?.min(rest.len()));
        memory.write_slice(now, descriptor.addr())?;
        rest = later;
    }
    Ok(data.len() - rest.len())
}

/// Bytes that the chain holds for the device to write, counted up to `enough`.
///
/// # Errors
/// [`QueueError`] when the driver broke the rules.
pub fn capacity(chain: Chain<'_>, enough: usize) -> Result<usize, QueueError> {
    let mut bytes: usize = 0;
    for descriptor in descriptors(chain, true) {
        bytes = bytes.saturating_add(length(&descriptor?)?);
        if bytes >= enough {
            break;
        }
    }
    Ok(bytes.min(enough))
}
