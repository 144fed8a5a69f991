//! What vCPU 0 wants of all vCPUs, and what they report: plain words in shared memory.
//!
//! Only vCPU 0 gives orders. It writes the words of an order and then raises its number; a worker that sees a new number
//! reads the words. If they change under it, the number changes too and it reads again.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use guest_core::cmdline::MAX_VCPUS;
use guest_core::command::Pattern;

/// How memory is to be dirtied, by all vCPUs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Pages/s.
    pub rate: u64,
    /// Working set in pages, 0 = all.
    pub ws: u64,
    /// Share of random content, 0..=100.
    pub entropy: u8,
    /// Order of the pages.
    pub pattern: Pattern,
}

/// Work that ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Write every page once.
    Populate {
        /// Share of random content, 0..=100.
        entropy: u8,
    },
    /// Check every page once.
    Verify,
}

/// Result of a task, of one vCPU or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages written or checked.
    pub pages: u64,
    /// Pages that were never written.
    pub unwritten: u64,
    /// Wrong pages: stale, foreign, corrupt.
    pub wrong: [u64; 3],
    /// The first wrong page.
    pub first_wrong: Option<u64>,
    /// Whether the generations do not add up to the writes.
    pub sum_wrong: bool,
}

impl Tally {
    /// Joins the results of two shares.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let [a, b, c] = self.wrong;
        let [d, e, f] = other.wrong;
        Self {
            pages: self.pages + other.pages,
            unwritten: self.unwritten + other.unwritten,
            wrong: [a + d, b + e, c + f],
            first_wrong: [self.first_wrong, other.first_wrong].into_iter().flatten().min(),
            sum_wrong: self.sum_wrong || other.sum_wrong,
        }
    }
}

/// The orders.
pub struct Orders {
    load_number: AtomicU64,
    rate: AtomicU64,
    ws: AtomicU64,
    entropy: AtomicU8,
    sequential: AtomicU8,
    task_number: AtomicU64,
    /// 0..=100: populate with this entropy; [`VERIFY`]: verify.
    task: AtomicU8,
}

const VERIFY: u8 = 255;

impl Orders {
    /// No load, no task.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            load_number: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            ws: AtomicU64::new(0),
            entropy: AtomicU8::new(100),
            sequential: AtomicU8::new(0),
            task_number: AtomicU64::new(0),
            task: AtomicU8::new(0),
        }
    }

    /// Orders a load.
    pub fn set_load(&self, load: Load) {
        self.rate.store(load.rate, Ordering::Relaxed);
        self.ws.store(load.ws, Ordering::Relaxed);
        self.entropy.store(load.entropy, Ordering::Relaxed);
        self.sequential.store(u8::from(load.pattern == Pattern::Seq), Ordering::Relaxed);
        self.load_number.fetch_add(1, Ordering::Release);
    }

    /// The load, and its number.
    #[must_use]
    pub fn load(&self) -> (u64, Load) {
        let number = self.load_number.load(Ordering::Acquire);
        let pattern = if self.sequential.load(Ordering::Relaxed) == 1 { Pattern::Seq } else { Pattern::Rand };
        let load = Load {
            rate: self.rate.load(Ordering::Relaxed),
            ws: self.ws.load(Ordering::Relaxed),
            entropy: self.entropy.load(Ordering::Relaxed),
            pattern,
        };
        (number, load)
    }

    /// Orders a task; its number. The one before must be done.
    pub fn start(&self, task: Task) -> u64 {
        let code = match task {
            Task::Populate { entropy } => entropy.min(100),
            Task::Verify => VERIFY,
        };
        self.task.store(code, Ordering::Relaxed);
        self.task_number.fetch_add(1, Ordering::Release) + 1
    }

    /// Number of the last load ordered, to see cheaply that there is a new one.
    #[must_use]
    pub fn load_number(&self) -> u64 {
        self.load_number.load(Ordering::Relaxed)
    }

    /// The last task ordered, and its number; number 0: none yet.
    #[must_use]
    pub fn task(&self) -> (u64, Task) {
        let number = self.task_number.load(Ordering::Acquire);
        match self.task.load(Ordering::Relaxed) {
            VERIFY => (number, Task::Verify),
            entropy => (number, Task::Populate { entropy }),
        }
    }
}

/// What one vCPU reports.
pub struct Report {
    task_done: AtomicU64,
    tally: [AtomicU64; 7],
    /// Pages written since boot.
    pub written: AtomicU64,
    /// Largest gap in its loop, TSC ticks. Not kept for vCPU 0.
    pub gap_max: AtomicU64,
    /// 1 once the vCPU runs.
    pub alive: AtomicU8,
}

const NO_PAGE: u64 = u64::MAX;

impl Report {
    /// Nothing done yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            task_done: AtomicU64::new(0),
            tally: [const { AtomicU64::new(0) }; 7],
            written: AtomicU64::new(0),
            gap_max: AtomicU64::new(0),
            alive: AtomicU8::new(0),
        }
    }

    /// Reports a task as done.
    pub fn finish(&self, number: u64, tally: &Tally) {
        let [stale, foreign, corrupt] = tally.wrong;
        let words = [
            tally.pages,
            tally.unwritten,
            stale,
            foreign,
            corrupt,
            tally.first_wrong.unwrap_or(NO_PAGE),
            u64::from(tally.sum_wrong),
        ];
        for (place, word) in self.tally.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.task_done.store(number, Ordering::Release);
    }

    /// The result of this task, once it is done.
    #[must_use]
    pub fn result(&self, number: u64) -> Option<Tally> {
        if self.task_done.load(Ordering::Acquire) != number {
            return None;
        }
        let [pages, unwritten, stale, foreign, corrupt, first, sum_wrong] =
            self.tally.each_ref().map(|word| word.load(Ordering::Relaxed));
        let first_wrong = (first != NO_PAGE).then_some(first);
        Some(Tally {
            pages,
            unwritten,
            wrong: [stale, foreign, corrupt],
            first_wrong,
            sum_wrong: sum_wrong == 1,
        })
    }
}

/// Orders to all vCPUs.
pub static ORDERS: Orders = Orders::new();
/// Reports, one per vCPU.
pub static REPORTS: [Report; MAX_VCPUS as usize] = [const { Report::new() }; MAX_VCPUS as usize];
