//! virtio-blk over a base image and an overlay: a block that the overlay holds is read from it, any other from the base, and all writes
//! go to the overlay ([`wire::disk`]).
//!
//! ```text
//!  available ring -> parse -> split at blocks -> io_uring -> hold and mark blocks -> status, used ring, interrupt
//! ```
//!
//! The event loop never waits for the disk, with two exceptions that are bounded by what is in flight: a write of part of a block that the
//! overlay does not hold copies that block first (the block size offered is 4 KiB, so that drivers do not do this), and
//! a pause or reset leaves nothing in flight. So the state of the device is that of its queue.
//!
//! When a write is done, its blocks are held, then marked in the dirty bitmap if the log is on, and only then is the driver
//! told. A write that failed may have changed blocks that were held before: those are marked too.
//!
//! A disk that fails or is full gives the driver an error for the request at hand and nothing else.

mod overlay;
mod ranges;
mod request;
mod split;
mod start;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use wire::units::PAGE_BYTES;

use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::dirty::DirtyBitmap;
use crate::memory::GuestMemory;
use request::{Kind, REQUEST_BYTES_MAX, Request, SECTOR_BYTES, SEGMENT_BYTES_MAX, SEGMENTS_MAX};
use uring::{Done, Operation, Ring};

pub use overlay::{DiskError, Held, Overlay};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Descriptors in tables of their own: a request takes one entry of the queue, however long it is.
const F_INDIRECT_DESC: u64 = 1 << 28;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

const QUEUE_SIZE: u16 = 256;
/// Most requests under way: one for each entry of the queue.
const REQUESTS_MAX: usize = QUEUE_SIZE as usize;
/// Data that is begun with at one event: it may be in the page cache, and is then copied at once.
const BYTES_BUDGET: u64 = 2 * REQUEST_BYTES_MAX;
/// Most sectors that are discarded or zeroed at once: 1 GiB.
const ZERO_SECTORS_MAX: u32 = 1 << 21;
/// Sectors of a block.
const BLOCK_SECTORS: u32 = 8;
/// Length of a disk's name for the driver.
const ID_BYTES: usize = 20;
const CONFIG_BYTES: usize = 60;

/// What a request's operations do to the disk when they are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    None,
    /// These blocks are held: first and number.
    Hold(u64, u64),
    /// Those of them that are held have changed.
    Change(u64, u64),
}

/// A request under way.
struct Active {
    request: Request,
    /// Next byte of the disk that is not yet read; the rest of the data is in the request.
    at: u64,
    /// Operations in the ring.
    in_flight: u32,
    effect: Effect,
    /// Whether it is followed by a sync before it is done.
    sync: bool,
    status: u8,
    /// Bytes for the driver, when it goes well.
    bytes: u64,
}

/// A disk.
pub struct Blk {
    id: [u8; ID_BYTES],
    // The ring before what its operations are about: dropping it waits for them.
    ring: Ring,
    overlay: Overlay,
    dirty: Arc<DirtyBitmap>,
    /// Page of block 0 in the machine's page space; a multiple of 64.
    first_page: u64,
    active: Vec<Option<Active>>,
    free: Vec<usize>,
    /// A read of which not all operations found room in the ring.
    partly: Option<usize>,
    /// The driver asks for flushes; for one that does not, every write is followed by one.
    flushes: bool,
    /// The ring failed: nothing can be done any more.
    broken: bool,
}

/// Why the device stopped taking requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// There are no more.
    Empty,
    /// There is no room for more.
    Full,
    /// It has done enough for one event.
    Budget,
}

impl Blk {
    /// The disk called `name` over `overlay`, whose blocks are pages `first_page ..` of the machine's page space.
    ///
    /// # Errors
    /// The operating system's, above all where io_uring is not allowed.
    pub fn new(
        name: &str,
        overlay: Overlay,
        first_page: u64,
        dirty: Arc<DirtyBitmap>,
        memory: Arc<GuestMemory>,
    ) -> io::Result<Self> {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(name.as_bytes()).for_each(|(to, from)| *to = *from);
        let (file, base) = overlay.handles()?;
        Ok(Self {
            id,
            ring: Ring::new(file, base, memory)?,
            overlay,
            dirty,
            first_page,
            active: (0..REQUESTS_MAX).map(|_| None).collect(),
            free: (0..REQUESTS_MAX).collect(),
            partly: None,
            flushes: false,
            broken: false,
        })
    }

    /// Takes requests and gives back those that are done, within a budget.
    fn work(&mut self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut used = false;
        let Some(Some(queue)) = queues.get_mut(0) else {
            self.settle(None, memory, &mut used)?;
            return Ok(Progress::default());
        };
        let (mut chains, mut bytes) = (BUDGET, BYTES_BUDGET);
        loop {
            let stopped = self.take(queue, memory, &mut chains, &mut bytes, &mut used);
            self.ring.submit();
            let stopped = stopped?;
            let reaped = self.reap(Some(&mut *queue), memory, &mut used)?;
            match stopped {
                Stop::Full if reaped => {}
                Stop::Full | Stop::Empty => break,
                Stop::Budget => {
                    self.ring.wake();
                    break;
                }
            }
        }
        Ok(Progress { used, more: false })
    }

    fn take(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        chains: &mut usize,
        bytes: &mut u64,
        used: &mut bool,
    ) -> Result<Stop, QueueError> {
        loop {
            if let Some(tag) = self.partly.take() {
                self.read_on(tag, memory);
                if self.partly.is_none() {
                    self.conclude_if_done(tag, Some(&mut *queue), memory, used)?;
                }
            }
            if self.partly.is_some() || self.free.is_empty() || !self.ring.has_room() {
                return Ok(Stop::Full);
            }
            if *chains == 0 || *bytes == 0 {
                return Ok(Stop::Budget);
            }
            let Some(chain) = queue::pop(queue, memory)? else { return Ok(Stop::Empty) };
            let request = Request::parse(chain, memory)?;
            *chains -= 1;
            *bytes = bytes.saturating_sub(request.data.bytes());
            self.start(request, queue, memory, used)?;
        }
    }

    /// Sees to what the ring has done. Whether there was anything.
    fn reap(
        &mut self,
        mut queue: Option<&mut Queue>,
        memory: &GuestMemory,
        used: &mut bool,
    ) -> Result<bool, QueueError> {
        let mut any = false;
        while let Some(Done { tag, result }) = self.ring.done() {
            any = true;
            let Some(Some(active)) = self.active.get_mut(tag) else { continue };
            active.in_flight -= 1;
            if let Err(error) = result {
                active.status = status_of(&error);
            }
            self.conclude_if_done(tag, queue.as_deref_mut(), memory, used)?;
        }
        Ok(any)
    }

    /// If nothing of the request is left to do: its effects, then the answer, if there still is a queue.
    fn conclude_if_done(
        &mut self,
        tag: usize,
        queue: Option<&mut Queue>,
        memory: &GuestMemory,
        used: &mut bool,
    ) -> Result<(), QueueError> {
        let Some(Some(active)) = self.active.get_mut(tag) else { return Ok(()) };
        if active.in_flight > 0 || self.partly == Some(tag) {
            return Ok(());
        }
        let effect = std::mem::replace(&mut active.effect, Effect::None);
        let ok = active.status == STATUS_OK;
        if std::mem::take(&mut active.sync) && ok {
            active.in_flight = 1;
            apply(&self.overlay, &self.dirty, self.first_page, effect, ok);
            if self.ring.push(tag, Operation::Sync).is_ok() {
                self.ring.submit();
                return Ok(());
            }
        } else {
            apply(&self.overlay, &self.dirty, self.first_page, effect, ok);
        }
        let Some(active) = self.active.get_mut(tag).and_then(Option::take) else { return Ok(()) };
        self.free.push(tag);
        // A sync that found no room: the write is not known to be durable.
        let status = if active.in_flight > 0 { STATUS_IOERR } else { active.status };
        match queue {
            Some(queue) => answer(&active.request, status, active.bytes, queue, memory, used),
            None => Ok(()),
        }
    }

    /// Waits until nothing is under way. Without a queue, nobody is told.
    fn settle(
        &mut self,
        mut queue: Option<&mut Queue>,
        memory: &GuestMemory,
        used: &mut bool,
    ) -> Result<(), QueueError> {
        loop {
            if let Some(tag) = self.partly.take() {
                match &queue {
                    Some(_) => self.read_on(tag, memory),
                    None => self.fail(tag),
                }
                self.conclude_if_done(tag, queue.as_deref_mut(), memory, used)?;
            }
            self.ring.submit();
            self.reap(queue.as_deref_mut(), memory, used)?;
            if self.ring.is_idle() && self.partly.is_none() {
                return Ok(());
            }
            if !self.ring.has_done() && self.ring.wait().is_err() {
                self.broken = true;
                return Ok(());
            }
        }
    }

    fn fail(&mut self, tag: usize) {
        if let Some(Some(active)) = self.active.get_mut(tag) {
            active.status = STATUS_IOERR;
        }
    }

    const fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        put(&mut config, 0, &(self.overlay.bytes() / SECTOR_BYTES).to_le_bytes());
        put(&mut config, 8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(&mut config, 12, &SEGMENTS_MAX.to_le_bytes());
        put(&mut config, 20, &(BLOCK_SECTORS * 512).to_le_bytes());
        put(&mut config, 36, &ZERO_SECTORS_MAX.to_le_bytes());
        put(&mut config, 40, &1u32.to_le_bytes());
        put(&mut config, 44, &BLOCK_SECTORS.to_le_bytes());
        put(&mut config, 48, &ZERO_SECTORS_MAX.to_le_bytes());
        put(&mut config, 52, &1u32.to_le_bytes());
        put(&mut config, 56, &[1]);
        config
    }
}

const fn put(config: &mut [u8; CONFIG_BYTES], at: usize, value: &[u8]) {
    let mut index = 0;
    while index < value.len() {
        config[at + index] = value[index];
        index += 1;
    }
}

fn status_of(error: &io::Error) -> u8 {
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) { STATUS_UNSUPP } else { STATUS_IOERR }
}

/// Holds and marks what operations have changed. What failed may have changed it too.
fn apply(overlay: &Overlay, dirty: &DirtyBitmap, first_page: u64, effect: Effect, ok: bool) {
    let (first, count) = match effect {
        Effect::None => return,
        Effect::Hold(first, count) => {
            if ok {
                overlay.held().hold(first, count);
            }
            (first, count)
        }
        Effect::Change(first, count) => (first, count),
    };
    let end = first.saturating_add(count);
    let mut block = first;
    while block < end {
        let stop = end.min((block / 64 + 1) * 64);
        let range = (u64::MAX << (block % 64)) & (u64::MAX >> (63 - (stop - 1) % 64));
        if let (Ok(word), Ok(page_word)) =
            (usize::try_from(block / 64), usize::try_from((first_page + block) / 64))
        {
            dirty.mark_word(page_word, overlay.held().word(word) & range);
        }
        block = stop;
    }
}

/// Gives a request back to the driver.
fn answer(
    request: &Request,
    status: u8,
    bytes: u64,
    queue: &mut Queue,
    memory: &GuestMemory,
    used: &mut bool,
) -> Result<(), QueueError> {
    memory.write_obj(status, request.status)?;
    let data = if status == STATUS_OK { u32::try_from(bytes).unwrap_or(0) } else { 0 };
    queue::push(queue, memory, request.head, data + 1)?;
    *used |= queue::wants_interrupt(queue, memory);
    Ok(())
}

/// Makes guest memory zero.
fn clear(memory: &GuestMemory, ranges: &ranges::Ranges) -> Result<(), QueueError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    for range in ranges.iter() {
        let (mut address, mut left) = (range.address, range.bytes);
        while left > 0 {
            let now = left.min(ZEROES.len());
            memory.write_slice(&ZEROES[..now], GuestAddress(address))?;
            address += PAGE_BYTES;
            left -= now;
        }
    }
    Ok(())
}

impl Device for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT_DESC
    }

    fn negotiated(&mut self, features: u64) {
        self.flushes = features & F_FLUSH != 0;
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        let rest = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn notified(
        &mut self,
        _index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.work(queues, memory)
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.ring.quiet();
        self.work(queues, memory)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.event())
    }

    fn wants_host_event(&self) -> bool {
        true
    }

    fn quiesce(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut used = false;
        let queue = queues.get_mut(0).and_then(Option::as_mut);
        self.settle(queue, memory, &mut used)?;
        // What was left in the queue is looked at when the machine runs again.
        self.ring.wake();
        Ok(Progress { used, more: false })
    }

    fn reset(&mut self) {
        let memory = Arc::clone(self.ring.memory());
        // Without a queue, nothing can be refused.
        let _nothing = self.settle(None, &memory, &mut false);
        self.flushes = false;
    }
}
