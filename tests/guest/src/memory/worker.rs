//! Dirties, populates and verifies one vCPU's share of the managed pages, a slice of time per call.
//!
//! The same worker runs on every vCPU; on vCPU 0 between two looks at the network, elsewhere alone. All its state moves
//! with the machine, so a migration needs no cooperation.

use super::managed::Managed;
use super::orders::{Load, ORDERS, Report, Tally, Task};
use crate::cpu;
use core::ops::Range;
use core::sync::atomic::Ordering;
use guest_core::budget::Budget;
use guest_core::command::Pattern;
use guest_core::page::{Wrong, below, mix, random_words};

/// Longest slice of each kind of work in one call, microseconds.
const SLICE_US: u64 = 80;

/// The work of one vCPU.
pub struct Worker {
    managed: &'static Managed,
    report: &'static Report,
    share: Range<u64>,
    number: u64,
    vcpus: u64,
    slice: u64,
    load: Load,
    load_seen: u64,
    budget: Budget,
    cursor: u64,
    random: u64,
    written: u64,
    job: Option<Job>,
    task_seen: u64,
}

/// A task under way.
struct Job {
    task: Task,
    next: u64,
    /// Sum of the generations of the pages before `next`.
    sum: u64,
    tally: Tally,
}

impl Worker {
    /// The worker of vCPU `number` out of `vcpus`, for a TSC of `hz`.
    #[must_use]
    pub fn new(managed: &'static Managed, report: &'static Report, number: u32, vcpus: u32, hz: u64) -> Self {
        let (number, vcpus) = (u64::from(number), u64::from(vcpus.max(1)));
        let edge = |n: u64| managed.pages() * n / vcpus;
        let (load_seen, load) = (0, Load { rate: 0, ws: 0, entropy: 100, pattern: Pattern::Rand });
        Self {
            managed,
            report,
            share: edge(number)..edge(number + 1),
            number,
            vcpus,
            slice: hz / 1_000_000 * SLICE_US,
            load,
            load_seen,
            budget: Budget::new(hz),
            cursor: 0,
            random: mix(number + 1),
            written: 0,
            job: None,
            task_seen: 0,
        }
    }

    /// Works for a slice; whether there is more to do at once.
    pub fn step(&mut self) -> bool {
        let now = cpu::tsc();
        self.take_orders(now);
        let more = self.dirty(now);
        self.job_slice() || more
    }

    fn take_orders(&mut self, now: u64) {
        if ORDERS.load_number() != self.load_seen {
            (self.load_seen, self.load) = ORDERS.load();
            self.budget.set_rate(self.part(self.load.rate), now);
        }
        let (number, task) = ORDERS.task();
        if number != self.task_seen {
            self.task_seen = number;
            self.job = Some(Job { task, next: self.share.start, sum: 0, tally: Tally::default() });
        }
    }

    /// This vCPU's part of a number that is divided among all.
    fn part(&self, whole: u64) -> u64 {
        whole / self.vcpus + u64::from(self.number < whole % self.vcpus)
    }

    fn dirty(&mut self, now: u64) -> bool {
        let mut due = self.budget.due(now);
        if due == 0 {
            return false;
        }
        let share = self.share.end - self.share.start;
        let ws = match self.load.ws {
            0 => share,
            ws => self.part(ws).clamp(1, share.max(1)),
        };
        if share == 0 {
            return false;
        }
        let words = random_words(self.load.entropy);
        let until = now + self.slice;
        while due > 0 && cpu::tsc() < until {
            let offset = match self.load.pattern {
                Pattern::Seq => {
                    self.cursor = if self.cursor + 1 >= ws { 0 } else { self.cursor + 1 };
                    self.cursor
                }
                Pattern::Rand => {
                    self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    below(ws, mix(self.random))
                }
            };
            self.write(self.share.start + offset, words);
            self.budget.spend(1);
            due -= 1;
        }
        due > 0
    }

    fn write(&mut self, index: u64, words: u64) {
        self.managed.write(index, words);
        self.written += 1;
        self.report.written.store(self.written, Ordering::Relaxed);
        // A page that the running verification has passed already counts once more.
        if let Some(job) = &mut self.job
            && index < job.next
        {
            job.sum += 1;
        }
    }

    /// A slice of the job; whether it goes on.
    fn job_slice(&mut self) -> bool {
        let Some(mut job) = self.job.take() else { return false };
        let until = cpu::tsc() + self.slice;
        while job.next < self.share.end && cpu::tsc() < until {
            let index = job.next;
            job.next += 1;
            match job.task {
                Task::Populate { entropy } => {
                    self.write(index, random_words(entropy));
                    job.tally.pages += 1;
                }
                Task::Verify => self.verify(index, &mut job),
            }
        }
        if job.next < self.share.end {
            self.job = Some(job);
            return true;
        }
        if job.task == Task::Verify {
            job.tally.sum_wrong = job.sum != self.written;
        }
        self.report.finish(self.task_seen, &job.tally);
        false
    }

    fn verify(&self, index: u64, job: &mut Job) {
        let generation = self.managed.generation(index);
        job.sum += u64::from(generation);
        if generation == 0 {
            job.tally.unwritten += 1;
            return;
        }
        job.tally.pages += 1;
        if let Err(wrong) = self.managed.check(index) {
            let kind = match wrong {
                Wrong::Stale => 0,
                Wrong::Foreign => 1,
                Wrong::Corrupt => 2,
            };
            job.tally.wrong[kind] += 1;
            job.tally.first_wrong.get_or_insert(index);
        }
    }
}
