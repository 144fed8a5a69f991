//! virtio-balloon (virtio 1.2, section 5.5): free pages that the guest reports go back to the host, and the guest says how its memory is used.
//!
//! Nothing is inflated yet: the target is 0 pages, and what a driver puts into the balloon by itself is acknowledged and stays where it is.
//!
//! **Reported pages** are punched out of the RAM memfd, and then marked dirty: they read as zero from then on, and a target that has
//! older content must see that. The guest promises not to use them until the report has come back to it; a guest that lies loses its own pages. If the host cannot
//! punch, the pages simply stay.
//!
//! **Statistics** lie in a buffer that the driver offers and refills whenever it gets it back. The device reads it and leaves it on offer, so that there is nothing to
//! save; giving it back asks for fresh figures, which will be there for the next question.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use virtio_queue::Queue;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use wire::units::PAGE_BYTES;
use wire::vmm::BalloonReport;

use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::event::borrow;
use crate::memory::{GuestMemory, Ram, Slot};

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

const STATS: usize = 2;
/// Most statistics read; Linux gives ten and a dozen more since 6.12. Each is a tag of 16 bits and a value of 64.
const STATS_BYTES_MAX: usize = 64 * STAT_BYTES;
const STAT_BYTES: usize = 10;
const TAG_FREE: u16 = 4;
const TAG_TOTAL: u16 = 5;
const TAG_AVAILABLE: u16 = 6;
const TAG_CACHES: u16 = 7;

/// What is known, and how to ask for more: the half of the device that the control socket speaks to.
#[derive(Debug, Clone)]
pub struct Gauge(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    report: Mutex<BalloonReport>,
    ask: EventFd,
}

impl Gauge {
    fn update(&self, change: impl FnOnce(&mut BalloonReport)) {
        change(&mut self.0.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What the guest said last. Asks it to say more, for the next time.
    pub fn read(&self) -> BalloonReport {
        let _asked_already = self.0.ask.write(1);
        *self.0.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The balloon.
#[derive(Debug)]
pub struct Balloon {
    ram: File,
    slots: Vec<Slot>,
    features: u64,
    gauge: Gauge,
}

impl Balloon {
    /// The balloon of the machine with `ram`, whose memfd is `file`.
    ///
    /// # Errors
    /// The operating system's, when it has no descriptors left.
    pub fn new(file: &File, ram: &Ram) -> io::Result<Self> {
        let ask = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let gauge = Gauge(Arc::new(Shared { report: Mutex::default(), ask }));
        Ok(Self { ram: file.try_clone()?, slots: ram.slots().to_vec(), features: 0, gauge })
    }

    /// The half for the control socket.
    pub fn gauge(&self) -> Gauge {
        self.gauge.clone()
    }

    /// Whether free pages are reported on queue `index`. The specification numbers the queue 4; Linux before 6.11 leaves out what was not
    /// negotiated, and so counts it as 3, or 2 without statistics.
    const fn is_report(&self, index: usize) -> bool {
        let stats = self.features & F_STATS != 0;
        self.features & F_PAGE_REPORTING != 0 && index >= if stats { STATS + 1 } else { STATS }
    }

    /// Gives one report's pages back; one at a time, because the host may take a while to free them.
    fn take_report(&self, reports: &mut Queue, memory: &GuestMemory) -> Result<Progress, QueueError> {
        let Some(chain) = queue::pop(reports, memory)? else { return Ok(Progress::default()) };
        let head = chain.head_index();
        let mut bytes = 0u64;
        for descriptor in queue::writable(chain) {
            let descriptor = descriptor?;
            bytes = bytes.saturating_add(self.punch(memory, descriptor.addr(), descriptor.len().into()));
        }
        self.gauge.update(|report| report.reported_bytes = report.reported_bytes.saturating_add(bytes));
        queue::push(reports, memory, head, 0)?;
        Ok(Progress { used: queue::wants_interrupt(reports, memory), more: true })
    }

    /// Gives the whole pages within a range back, and says how many bytes they were. What is not RAM is left alone.
    fn punch(&self, memory: &GuestMemory, start: GuestAddress, bytes: u64) -> u64 {
        let first = start.0.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
        let end = start.0.saturating_add(bytes) / PAGE_BYTES * PAGE_BYTES;
        let mut punched = 0;
        for slot in &self.slots {
            let from = first.max(slot.guest_start);
            let to = end.min(slot.guest_start + slot.pages * PAGE_BYTES);
            if from >= to {
                continue;
            }
            let offset = slot.first_page * PAGE_BYTES + (from - slot.guest_start);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.ram, flags, offset, to - from).is_err() {
                continue;
            }
            punched += to - from;
            // After the content has changed, as for every write.
            if let Some((region, at)) = memory.to_region_addr(GuestAddress(from))
                && let (Ok(at), Ok(bytes)) = (usize::try_from(at.0), usize::try_from(to - from))
            {
                region.bitmap().mark_dirty(at, bytes);
            }
        }
        punched
    }

    /// Reads the statistics on offer and leaves them there.
    fn read_stats(&self, stats: &mut Queue, memory: &GuestMemory) -> Result<(), QueueError> {
        let Some(chain) = queue::pop(stats, memory)? else { return Ok(()) };
        queue::unpop(stats);
        let mut buffer = [0; STATS_BYTES_MAX];
        let bytes = queue::gather(chain, memory, &mut buffer)?;
        self.gauge.update(|report| {
            for stat in buffer[..bytes].as_chunks::<STAT_BYTES>().0 {
                let [t0, t1, value @ ..] = *stat;
                let field = match u16::from_le_bytes([t0, t1]) {
                    TAG_FREE => &mut report.free_bytes,
                    TAG_TOTAL => &mut report.total_bytes,
                    TAG_AVAILABLE => &mut report.available_bytes,
                    TAG_CACHES => &mut report.caches_bytes,
                    _ => continue,
                };
                *field = Some(u64::from_le_bytes(value));
            }
        });
        Ok(())
    }

    /// Acknowledges what the driver puts into the balloon or takes out of it.
    fn acknowledge(pages: &mut Queue, memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(pages, memory)? else { return Ok(progress) };
            queue::push(pages, memory, chain.head_index(), 0)?;
            progress.used |= queue::wants_interrupt(pages, memory);
        }
        progress.more = true;
        Ok(progress)
    }
}

impl Device for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn id(&self) -> u32 {
        5
    }

    fn features(&self) -> u64 {
        F_STATS | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 128, 128, 128]
    }

    /// Target and actual size: 0 pages.
    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let Some(Some(queue)) = queues.get_mut(index) else { return Ok(Progress::default()) };
        if self.is_report(index) {
            return self.take_report(queue, memory);
        }
        if index == STATS && self.features & F_STATS != 0 {
            self.read_stats(queue, memory)?;
            return Ok(Progress::default());
        }
        Self::acknowledge(queue, memory)
    }

    /// Somebody has asked: the driver gets its buffer of statistics back.
    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let _drained = self.gauge.0.ask.read();
        let Some(Some(stats)) = queues.get_mut(STATS).filter(|_| self.features & F_STATS != 0) else {
            return Ok(Progress::default());
        };
        let Some(chain) = queue::pop(stats, memory)? else { return Ok(Progress::default()) };
        queue::push(stats, memory, chain.head_index(), 0)?;
        Ok(Progress { used: queue::wants_interrupt(stats, memory), more: false })
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(borrow(&self.gauge.0.ask))
    }

    fn wants_host_event(&self) -> bool {
        true
    }

    fn started(&mut self, features: u64, _restored: bool) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = 0;
        self.gauge.update(|report| {
            *report = BalloonReport { reported_bytes: report.reported_bytes, ..BalloonReport::default() };
        });
    }
}
