//! The ring through which a disk's reads, writes and syncs go: the kernel works on them while the event loop does something else.
//!
//! Reads and writes go straight between the page cache of the host and guest RAM; nothing is copied in between. The kernel holds
//! addresses of guest RAM while an operation is in flight, so the ring keeps the mapping alive, and neither goes away before the
//! kernel is done: who drops a ring waits for it. Nothing here becomes a Rust reference to guest memory.
//!
//! An operation that the kernel did in part goes on with the rest; what comes out is done or failed as a whole. What a read may have
//! written to RAM is marked dirty when it is done, by what the dirty log is then, not by what it was when the read began.
//!
//! At most [`OPERATIONS_MAX`] operations are in flight, and the completion queue has room for all of them: none can be lost.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::ranges::{Range, Ranges};
use crate::event::borrow;
use crate::memory::GuestMemory;

/// Most operations in flight: as many as the virtqueue has entries.
pub const OPERATIONS_MAX: u32 = 256;

/// What the kernel is to do.
#[derive(Debug)]
pub enum Operation {
    /// Read from the overlay at this offset of the file.
    ReadOverlay(u64, Ranges),
    /// Read from the base at this offset.
    ReadBase(u64, Ranges),
    /// Write to the overlay at this offset of the file.
    Write(u64, Ranges),
    /// Make all of the overlay durable.
    Sync,
    /// Make this part of the overlay zero: offset and length; without its space, or keeping it.
    Zero {
        /// Offset in the file.
        offset: u64,
        /// Length.
        bytes: u64,
        /// Whether the space stays allocated.
        keep_space: bool,
    },
}

/// An operation that is done.
#[derive(Debug)]
pub struct Done {
    /// What the caller knows it by.
    pub tag: usize,
    /// How it went.
    pub result: io::Result<()>,
}

/// Addresses and lengths in this process for the kernel.
struct Vectors(Vec<libc::iovec>);

// SAFETY: the addresses are those of guest RAM, which is not bound to a thread, and only the kernel follows them.
unsafe impl Send for Vectors {}

/// An operation in flight.
struct InFlight {
    tag: usize,
    operation: Operation,
    /// What the kernel reads when the operation is submitted; kept until it is done.
    vectors: Vectors,
}

/// The ring and what is in it.
pub struct Ring {
    ring: IoUring,
    event: EventFd,
    overlay: File,
    base: Option<File>,
    memory: Arc<GuestMemory>,
    operations: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

impl Ring {
    /// A ring for the files of one disk and for buffers in `memory`.
    ///
    /// # Errors
    /// The operating system's: where io_uring is switched off, there are no disks.
    pub fn new(overlay: File, base: Option<File>, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_cqsize(2 * OPERATIONS_MAX).build(OPERATIONS_MAX)?;
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let slots = usize::try_from(OPERATIONS_MAX).unwrap_or(0);
        let operations = (0..slots).map(|_| None).collect();
        Ok(Self { ring, event, overlay, base, memory, operations, free: (0..slots).collect() })
    }

    /// Readable when something is done.
    pub fn event(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }

    /// Makes [`Ring::event`] readable: there is work to go on with.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then it is readable anyway.
        let _pending = self.event.write(1);
    }

    /// Makes [`Ring::event`] unreadable until something happens again.
    pub fn quiet(&self) {
        let _was_spurious = self.event.read();
    }

    /// The guest memory that operations read and write.
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether there is room for another operation.
    pub const fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight.
    pub const fn is_idle(&self) -> bool {
        self.free.len() == self.operations.len()
    }

    /// Takes an operation, if there is room. [`Ring::submit`] hands it to the kernel.
    ///
    /// # Errors
    /// When a buffer is not in RAM.
    pub fn push(&mut self, tag: usize, operation: Operation) -> io::Result<()> {
        let slot = self.free.pop().ok_or(io::ErrorKind::ResourceBusy)?;
        let pushed = self.enqueue(slot, tag, operation);
        if pushed.is_err() {
            self.free.push(slot);
        }
        pushed
    }

    fn enqueue(&mut self, slot: usize, tag: usize, operation: Operation) -> io::Result<()> {
        let vectors = match &operation {
            Operation::ReadOverlay(_, ranges)
            | Operation::ReadBase(_, ranges)
            | Operation::Write(_, ranges) => self.vectors(ranges)?,
            Operation::Sync | Operation::Zero { .. } => Vectors(Vec::new()),
        };
        // What the vectors point at is where it is, however the structure around them moves.
        let entry = self.entry(&operation, &vectors)?.user_data(u64::try_from(slot).unwrap_or(u64::MAX));
        let mut queue = self.ring.submission();
        // SAFETY: the descriptors and the vectors are owned by `self` until the kernel is done with the operation; the vectors point
        // into guest RAM, which `self.memory` keeps mapped, and `Drop` waits for the kernel.
        let pushed = unsafe { queue.push(&entry) };
        drop(queue);
        // The queue has as many entries as there are slots.
        pushed.map_err(|_| io::ErrorKind::ResourceBusy)?;
        if let Some(place) = self.operations.get_mut(slot) {
            *place = Some(InFlight { tag, operation, vectors });
        }
        Ok(())
    }

    fn vectors(&self, ranges: &Ranges) -> io::Result<Vectors> {
        let mut vectors = Vec::new();
        for Range { address, bytes } in ranges.iter() {
            for slice in self.memory.get_slices(GuestAddress(address), bytes) {
                let slice = slice.map_err(io::Error::other)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                vectors.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        Ok(Vectors(vectors))
    }

    fn entry(&self, operation: &Operation, Vectors(vectors): &Vectors) -> io::Result<squeue::Entry> {
        let overlay = types::Fd(self.overlay.as_raw_fd());
        let (at, count) = (vectors.as_ptr(), u32::try_from(vectors.len()).map_err(io::Error::other)?);
        Ok(match *operation {
            Operation::ReadOverlay(offset, _) => {
                opcode::Readv::new(overlay, at, count).offset(offset).build()
            }
            Operation::ReadBase(offset, _) => {
                let base = self.base.as_ref().ok_or(io::ErrorKind::NotFound)?;
                opcode::Readv::new(types::Fd(base.as_raw_fd()), at, count).offset(offset).build()
            }
            Operation::Write(offset, _) => opcode::Writev::new(overlay, at, count).offset(offset).build(),
            Operation::Sync => opcode::Fsync::new(overlay).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Zero { offset, bytes, keep_space } => {
                let how = if keep_space { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE };
                let mode = how | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(overlay, bytes).offset(offset).mode(mode).build()
            }
        })
    }

    /// Hands what was pushed to the kernel. What it does not take now for lack of memory it gets at the next event, which this makes come.
    pub fn submit(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.wake(),
            }
        }
    }

    /// Whether [`Ring::done`] has something.
    pub fn has_done(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// The next operation that is done, if there is one.
    pub fn done(&mut self) -> Option<Done> {
        loop {
            let completion = self.ring.completion().next()?;
            if let Some(done) = self.conclude(&completion) {
                return Some(done);
            }
        }
    }

    /// What became of an operation; `None` when it goes on with what is left of it.
    fn conclude(&mut self, completion: &cqueue::Entry) -> Option<Done> {
        let slot = usize::try_from(completion.user_data()).ok()?;
        let InFlight { tag, operation, vectors } = self.operations.get_mut(slot)?.take()?;
        // Not before here: until now the kernel may have looked at them.
        drop(vectors);
        if let Operation::ReadOverlay(_, ranges) | Operation::ReadBase(_, ranges) = &operation {
            self.mark(ranges);
        }
        let result = match rest_of(operation, completion.result()) {
            Ok(None) => Ok(()),
            Err(error) => Err(error),
            Ok(Some(rest)) => match self.enqueue(slot, tag, rest) {
                Ok(()) => {
                    self.submit();
                    return None;
                }
                Err(error) => Err(error),
            },
        };
        self.free.push(slot);
        Some(Done { tag, result })
    }

    /// Waits until at least one operation is done, if any is in flight.
    ///
    /// # Errors
    /// The operating system's, when it cannot be waited.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.is_idle() {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) => match error.kind() {
                    // Signals, and a kernel that lacks memory for the moment.
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy => {
                        std::thread::yield_now();
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// Guest memory may have been written.
    fn mark(&self, ranges: &Ranges) {
        for Range { address, bytes } in ranges.iter() {
            for slice in self.memory.get_slices(GuestAddress(address), bytes).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.is_idle() {
            while self.done().is_some() {}
            if self.wait().is_err() {
                // The kernel may still write to guest RAM and read the vectors: they stay where they are.
                std::mem::forget(Arc::clone(&self.memory));
                std::mem::forget(std::mem::take(&mut self.operations));
                return;
            }
        }
    }
}

/// What is left to do of an operation whose completion says `result`.
fn rest_of(operation: Operation, result: i32) -> io::Result<Option<Operation>> {
    let moved = match u64::try_from(result) {
        Ok(moved) => moved,
        Err(_) => {
            return match result.checked_neg().map(io::Error::from_raw_os_error) {
                Some(error)
                    if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) =>
                {
                    Ok(Some(operation))
                }
                Some(error) => Err(error),
                None => Err(io::ErrorKind::Other.into()),
            };
        }
    };
    let rest = |offset: u64, mut ranges: Ranges, make: fn(u64, Ranges) -> Operation| {
        ranges.take(moved);
        match (ranges.bytes(), moved) {
            (0, _) => Ok(None),
            // A file that ends where it should not.
            (_, 0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            _ => Ok(Some(make(offset + moved, ranges))),
        }
    };
    match operation {
        Operation::ReadOverlay(offset, ranges) => rest(offset, ranges, Operation::ReadOverlay),
        Operation::ReadBase(offset, ranges) => rest(offset, ranges, Operation::ReadBase),
        Operation::Write(offset, ranges) => rest(offset, ranges, Operation::Write),
        Operation::Sync | Operation::Zero { .. } => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(bytes: usize) -> Ranges {
        let mut ranges = Ranges::default();
        ranges.push(Range { address: 4096, bytes });
        ranges
    }

    #[test]
    fn what_was_done_in_part_goes_on_where_it_stopped() {
        match rest_of(Operation::Write(100, ranges(50)), 20).unwrap() {
            Some(Operation::Write(120, rest)) => {
                assert_eq!(rest.iter().collect::<Vec<_>>(), [Range { address: 4116, bytes: 30 }]);
            }
            other => panic!("{other:?}"),
        }
        assert!(rest_of(Operation::Write(100, ranges(50)), 50).unwrap().is_none());
        assert!(rest_of(Operation::ReadBase(0, ranges(50)), 0).is_err());
        assert!(rest_of(Operation::Sync, -libc::EINTR).unwrap().is_some());
        let full = rest_of(Operation::Write(0, ranges(50)), -libc::ENOSPC).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert!(rest_of(Operation::Sync, i32::MIN).is_err());
    }
}
