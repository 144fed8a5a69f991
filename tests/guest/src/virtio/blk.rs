//! virtio-blk: writes blocks that prove themselves, and reads them back.
//!
//! Blocks of 4 KiB hold what `guest_core::page` puts into pages, with a generation per block, so a disk that lost or mixed up a
//! write is found out. One request is in flight at a time and is polled for, which keeps reads and writes of a block in
//! order. A request that fails is counted and leaves the block's generation as it was.

use super::mmio::Device;
use super::queue::{DEVICE_WRITES, NEXT, Queue};
use crate::memory::frames::Frames;
use crate::memory::window::{Window, address};
use guest_core::budget::Budget;
use guest_core::page::{self, Identity, PAGE_BYTES, below, mix};

/// Most blocks that are used.
const MAX_BLOCKS: u64 = 65_536;
const SECTORS_PER_BLOCK: u64 = PAGE_BYTES / 512;
const BLOCK_BYTES: u32 = 4096;
const FEATURE_FLUSH: u64 = 1 << 9;
const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
/// Tells blocks from memory pages, should one end up as the other.
const INDEX_BASE: u64 = 1 << 40;

/// A task for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlkTask {
    /// Write the first blocks once.
    Fill,
    /// Make what was written durable.
    Flush,
    /// Read every block and check it.
    Verify,
}

/// Result of a task.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlkTally {
    /// Blocks written or checked.
    pub blocks: u64,
    /// Blocks that were never written.
    pub unwritten: u64,
    /// Blocks that are not what was written.
    pub wrong: u64,
    /// The first of them.
    pub first_wrong: Option<u64>,
    /// Requests that failed.
    pub errors: u64,
}

/// A running block device.
pub struct Blk {
    device: Device,
    queue: Queue,
    can_flush: bool,
    /// Request header (16 bytes), then at 16 the status byte.
    header: Window,
    buffer: Window,
    generations: &'static mut [u32],
    seed: u64,
    in_flight: Option<Request>,
    job: Option<Job>,
    budget: Budget,
    ws: u64,
    random: u64,
    /// Blocks written since boot.
    pub written: u64,
    /// Requests that failed since boot.
    pub errors: u64,
}

#[derive(Clone, Copy)]
enum Request {
    Read(u64),
    Write(u64),
    Flush,
}

struct Job {
    task: BlkTask,
    next: u64,
    end: u64,
    tally: BlkTally,
    errors_before: u64,
}

impl Blk {
    /// Brings the device up. `None` if it refuses or is smaller than a block.
    pub fn start(device: Device, frames: &mut Frames, seed: u64, hz: u64) -> Option<Self> {
        let features = device.negotiate(FEATURE_FLUSH)?;
        let mut queue = device.queue(0, 8, frames)?;
        queue.set_interrupts(false);
        let sectors = u64::from(device.config32(4)) << 32 | u64::from(device.config32(0));
        let blocks = (sectors / SECTORS_PER_BLOCK).min(MAX_BLOCKS);
        if blocks == 0 || queue.size() < 3 {
            return None;
        }
        let header = frames.share(17);
        let buffer = frames.share(address(PAGE_BYTES));
        let generations = frames.take::<u32>(address(blocks));
        device.start();
        Some(Self {
            device,
            queue,
            can_flush: features & FEATURE_FLUSH != 0,
            header,
            buffer,
            generations,
            seed,
            in_flight: None,
            job: None,
            budget: Budget::new(hz),
            ws: blocks,
            random: seed,
            written: 0,
            errors: 0,
        })
    }

    /// Usable blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.generations.len() as u64
    }

    /// Writes `rate` blocks/s among the first `ws` (0: all).
    pub fn set_load(&mut self, rate: u64, ws: u64, now: u64) {
        self.ws = if ws == 0 { self.blocks() } else { ws.min(self.blocks()) };
        self.budget.set_rate(rate, now);
    }

    /// Starts a task over the first `blocks`; the one before must have ended.
    pub fn begin(&mut self, task: BlkTask, blocks: Option<u64>) {
        let end = match task {
            BlkTask::Flush => 1,
            BlkTask::Fill | BlkTask::Verify => blocks.unwrap_or(u64::MAX).min(self.blocks()),
        };
        self.job = Some(Job { task, next: 0, end, tally: BlkTally::default(), errors_before: self.errors });
    }

    /// Goes on: whether a request is in flight, and the result of a task that has just ended.
    pub fn step(&mut self, now: u64) -> (bool, Option<(BlkTask, BlkTally)>) {
        if let Some(request) = self.in_flight {
            if self.queue.take_used().is_none() {
                return (true, None);
            }
            self.in_flight = None;
            self.complete(request);
        }
        let mut done = None;
        if self.job.as_ref().is_some_and(|job| job.next >= job.end)
            && let Some(job) = self.job.take()
        {
            let errors = self.errors - job.errors_before;
            done = Some((job.task, BlkTally { errors, ..job.tally }));
        }
        if let Some(request) = self.next_request(now) {
            self.submit(request);
        }
        (self.in_flight.is_some() || self.job.is_some(), done)
    }

    fn next_request(&mut self, now: u64) -> Option<Request> {
        if self.budget.due(now) > 0 {
            self.budget.spend(1);
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            return Some(Request::Write(below(self.ws, mix(self.random))));
        }
        let job = self.job.as_mut()?;
        if job.task == BlkTask::Verify {
            let rest = self.generations.iter().skip(address(job.next));
            let unwritten = rest.take_while(|generation| **generation == 0).count() as u64;
            let unwritten = unwritten.min(job.end - job.next);
            job.tally.unwritten += unwritten;
            job.next += unwritten;
        }
        let block = (job.next < job.end).then_some(job.next)?;
        job.next += 1;
        if job.task != BlkTask::Flush {
            job.tally.blocks += 1;
        }
        match job.task {
            BlkTask::Fill => Some(Request::Write(block)),
            BlkTask::Verify => Some(Request::Read(block)),
            BlkTask::Flush => self.can_flush.then_some(Request::Flush),
        }
    }

    fn submit(&mut self, request: Request) {
        let (kind, block) = match request {
            Request::Read(block) => (TYPE_READ, block),
            Request::Write(block) => (TYPE_WRITE, block),
            Request::Flush => (TYPE_FLUSH, 0),
        };
        if let Request::Write(block) = request {
            let identity = self.identity(block, self.generation(block).wrapping_add(1));
            page::write(&mut self.buffer.page(0), identity, page::random_words(100));
        }
        self.header.write(0, u64::from(kind));
        self.header.write(8, block * SECTORS_PER_BLOCK);
        // A status that no device gives.
        self.header.write(16, 0xffu8);
        let data_flags = if kind == TYPE_READ { DEVICE_WRITES | NEXT } else { NEXT };
        let after_header = if kind == TYPE_FLUSH { 2 } else { 1 };
        self.queue.describe(0, &self.header, 16, NEXT, after_header);
        self.queue.describe(1, &self.buffer, BLOCK_BYTES, data_flags, 2);
        self.queue.describe(2, &self.header.part(16, 1), 1, DEVICE_WRITES, 0);
        self.queue.submit(0);
        self.in_flight = Some(request);
        self.device.notify(0);
    }

    fn complete(&mut self, request: Request) {
        if self.header.read::<u8>(16) != 0 {
            self.errors += 1;
            return;
        }
        match request {
            Request::Flush => {}
            Request::Write(block) => {
                self.written += 1;
                let generation = &mut self.generations[address(block)];
                *generation = generation.wrapping_add(1);
            }
            Request::Read(block) => {
                let right =
                    page::check(&self.buffer.page(0), self.identity(block, self.generation(block))).is_ok();
                if let Some(job) = self.job.as_mut().filter(|_| !right) {
                    job.tally.wrong += 1;
                    job.tally.first_wrong.get_or_insert(block);
                }
            }
        }
    }

    fn generation(&self, block: u64) -> u32 {
        self.generations[address(block)]
    }

    fn identity(&self, block: u64, generation: u32) -> Identity {
        Identity { seed: self.seed, index: INDEX_BASE | block, generation }
    }
}
