//! virtio-blk (virtio 1.2, section 5.2) on an overlay over a base.
//!
//! * [`overlay`]: what the disk holds. * [`request`]: what the driver asks for. * [`worker`]: the thread that does it.
//!
//! The event loop takes chains off the queue and puts them back; the disk's own thread does the work in between. So a disk that is slow, or
//! syncs, stops neither the network nor the control socket. When the machine pauses, everything under way is finished first: a saved state
//! never has a request in it that nobody remembers.

pub mod overlay;
mod request;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::Bytes;

use self::overlay::Overlay;
use self::request::{Request, SECTOR_BYTES};
use self::worker::Worker;
use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

/// Features (virtio 1.2, section 5.2.3): limits of segments, block size, flush.
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
/// Largest segment that the driver should use, in bytes, and how many of them: 4 MiB in one request.
const SEGMENT: (u32, u32) = (64 << 10, 64);
/// Block size that the driver is told: that of the overlay, so that no block is ever written in part.
const BLOCK_BYTES: u32 = 4096;

/// The device.
#[derive(Debug)]
pub struct Blk {
    sectors: u64,
    worker: Worker,
}

impl Blk {
    /// The device for a disk of this name.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(overlay: Arc<Overlay>, name: String, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let sectors = overlay.bytes() / SECTOR_BYTES;
        Ok(Self { sectors, worker: Worker::start(overlay, name, memory)? })
    }

    fn give_back(&self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(requests)) = queues.first_mut() else { return Ok(progress) };
        for done in self.worker.take_done() {
            memory.write_obj(done.status.byte(), done.status_at)?;
            queue::push(requests, memory, done.head, done.written.saturating_add(1))?;
            progress.used |= queue::wants_interrupt(requests, memory);
        }
        Ok(progress)
    }
}

impl Device for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT.0.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENT.1.to_le_bytes());
        config[20..24].copy_from_slice(&BLOCK_BYTES.to_le_bytes());
        let known = config.get(offset..).unwrap_or_default();
        let length = known.len().min(data.len());
        data[..length].copy_from_slice(&known[..length]);
    }

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(requests)) = queues.get_mut(index) else { return Ok(progress) };
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(requests, memory)? else { return Ok(progress) };
            self.worker.begin(Request::parse(chain, memory)?);
        }
        progress.more = true;
        Ok(progress)
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.give_back(queues, memory)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.worker.ready())
    }

    fn wants_host_event(&self) -> bool {
        true
    }

    fn quiesce(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.worker.wait_idle();
        self.give_back(queues, memory)
    }

    fn reset(&mut self) {
        // What was under way belongs to queues that are no more.
        self.worker.wait_idle();
        self.worker.take_done();
    }
}
