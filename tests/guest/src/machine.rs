//! Everything the machine knows about itself, apart from the network.

use crate::clock::Clock;
use crate::cpu;
use crate::kvmclock::KvmClock;
use crate::memory::managed::Managed;
use crate::memory::orders::{Load, ORDERS, REPORTS, Tally, Task};
use crate::observe::{self, Observer};
use crate::serial::Serial;
use crate::virtio::blk::{Blk, BlkTally, BlkTask};
use core::sync::atomic::Ordering;
use guest_core::cmdline::Config;
use guest_core::command::Mode;
use guest_core::gap::Gaps;

/// A gap that is told on the serial line, and how often at most.
const GAP_REPORT_US: u64 = 20_000;
const GAP_REPORT_EVERY_US: u64 = 1_000_000;
/// Between the reply to `shutdown` and the end, so that the reply is sent.
const SHUTDOWN_DELAY_US: u64 = 50_000;

/// What ends the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A clean power off.
    Off,
    /// A panic on demand.
    Panic,
}

/// The machine.
pub struct Machine {
    /// The command line.
    pub config: Config,
    /// Drawn at boot.
    pub boot_id: u64,
    /// Whether virtio-rng gave the seed.
    pub rng_ok: bool,
    /// All RAM, bytes.
    pub ram_bytes: u64,
    /// vCPUs that run.
    pub vcpus: u32,
    /// Time.
    pub clock: Clock,
    kvmclock: Option<KvmClock>,
    /// Serial output.
    pub serial: Serial,
    /// Gaps of the loop on vCPU 0.
    pub gaps: Gaps,
    /// The largest gap since boot, ticks.
    pub gap_max: u64,
    gap_report_at: u64,
    /// When silent connections are looked for next, microseconds since boot.
    pub make_room_at: u64,
    /// Watches registers and controllers.
    pub observer: Observer,
    /// Times the vector registers were found changed.
    pub vector_errors: u64,
    /// From the first Rust instruction to the first turn of the loop.
    pub boot_us: u64,
    /// What the loops do when there is nothing to do.
    pub mode: Mode,
    /// Managed pages.
    pub managed: &'static Managed,
    /// The load that was ordered.
    pub load: Load,
    /// Whether every page was written since boot.
    pub populated: bool,
    /// The task under way: number, what, since when (ticks).
    pub task: Option<(u64, Task, u64)>,
    /// The disk, if there is one.
    pub blk: Option<Blk>,
    /// The disk task under way, and since when (ticks).
    pub blk_task: Option<(BlkTask, u64)>,
    /// Load to order when populating is done.
    pub load_after_populate: Option<Load>,
    /// Turns of the loop.
    pub loops: u64,
    /// Times a clock was seen to step back.
    pub clock_backwards: u64,
    last_ns: u64,
    /// When and how the guest ends, microseconds since boot.
    pub end: Option<(u64, End)>,
    /// Frames received and sent, as of the last turn.
    pub net_frames: (u64, u64),
}

/// What boot found out.
pub struct Boot {
    /// The command line.
    pub config: Config,
    /// The seed, and whether a device gave it.
    pub seed: (u64, bool),
    /// All RAM, bytes.
    pub ram_bytes: u64,
    /// Time.
    pub clock: Clock,
    /// kvmclock, on KVM.
    pub kvmclock: Option<KvmClock>,
    /// Managed pages.
    pub managed: &'static Managed,
    /// vCPUs that run.
    pub vcpus: u32,
    /// The disk, if there is one.
    pub blk: Option<Blk>,
    /// Watches registers and controllers.
    pub observer: Observer,
}

impl Machine {
    /// A machine that has just booted. Orders the load of the command line.
    #[must_use]
    pub fn new(boot: Boot) -> Self {
        let Boot {
            config,
            seed: (boot_id, rng_ok),
            ram_bytes,
            clock,
            kvmclock,
            managed,
            vcpus,
            blk,
            observer,
        } = boot;
        let now = cpu::tsc();
        let load =
            Load { rate: config.dirty_rate, ws: config.ws, entropy: config.entropy, pattern: config.pattern };
        let idle = Load { rate: 0, ..load };
        let mut machine = Self {
            boot_id,
            rng_ok,
            ram_bytes,
            vcpus,
            clock,
            kvmclock,
            serial: Serial::new(),
            gaps: Gaps::new(clock.hz, now),
            gap_max: 0,
            gap_report_at: 0,
            make_room_at: 0,
            observer,
            vector_errors: 0,
            boot_us: clock.uptime_us(),
            mode: config.mode,
            managed,
            load: idle,
            populated: false,
            task: None,
            blk,
            blk_task: None,
            load_after_populate: None,
            loops: 0,
            clock_backwards: 0,
            last_ns: 0,
            end: None,
            net_frames: (0, 0),
            config,
        };
        if machine.config.populate {
            machine.start(Task::Populate { entropy: load.entropy });
            machine.load_after_populate = Some(load);
            ORDERS.set_load(idle);
        } else {
            machine.set_load(load);
        }
        machine
    }

    /// Orders a load.
    pub fn set_load(&mut self, load: Load) {
        self.load = load;
        self.load_after_populate = None;
        ORDERS.set_load(load);
    }

    /// Starts a task, if none runs.
    pub fn start(&mut self, task: Task) -> bool {
        if self.task.is_some() || self.blk_task.is_some() {
            return false;
        }
        self.task = Some((ORDERS.start(task), task, cpu::tsc()));
        true
    }

    /// The task that has just ended, if one did: what it was, its result, how long it took (microseconds).
    pub fn finished(&mut self) -> Option<(Task, Tally, u64)> {
        let (number, task, since) = self.task?;
        let mut tally = Tally::default();
        for report in self.reports() {
            tally = tally.and(report.result(number)?);
        }
        self.task = None;
        let us = self.clock.us(cpu::tsc().saturating_sub(since));
        if let Task::Populate { .. } = task {
            self.populated = true;
            self.serial.line(format_args!("populated pages={} us={us}", tally.pages));
            if let Some(load) = self.load_after_populate {
                self.set_load(load);
            }
        }
        Some((task, tally, us))
    }

    /// Starts a disk task over the first `blocks`.
    ///
    /// # Errors
    /// A text, if there is no disk or something else is under way.
    pub fn start_blk(&mut self, task: BlkTask, blocks: Option<u64>) -> Result<(), &'static str> {
        if self.task.is_some() || self.blk_task.is_some() {
            return Err("busy");
        }
        self.blk.as_mut().ok_or("no block device")?.begin(task, blocks);
        self.blk_task = Some((task, cpu::tsc()));
        Ok(())
    }

    /// Goes on with the disk: whether it has work, and a task that has just ended, with its microseconds.
    pub fn step_blk(&mut self) -> (bool, Option<(BlkTask, BlkTally, u64)>) {
        let Some(blk) = &mut self.blk else { return (false, None) };
        let now = cpu::tsc();
        let (busy, done) = blk.step(now);
        let done = done.zip(self.blk_task);
        let done =
            done.map(|((task, tally), (_, since))| (task, tally, self.clock.us(now.saturating_sub(since))));
        if done.is_some() {
            self.blk_task = None;
        }
        (busy, done)
    }

    /// Pages written since boot, by all vCPUs.
    #[must_use]
    pub fn pages_written(&self) -> u64 {
        self.reports().map(|r| r.written.load(Ordering::Relaxed)).sum()
    }

    /// The largest gap on the other vCPUs, microseconds.
    #[must_use]
    pub fn gap_max_others_us(&self) -> u64 {
        let max = self.reports().skip(1).map(|r| r.gap_max.load(Ordering::Relaxed)).max();
        self.clock.us(max.unwrap_or(0))
    }

    /// Forgets the gaps.
    pub fn reset_gaps(&mut self) {
        self.gaps.reset();
        for report in self.reports() {
            report.gap_max.store(0, Ordering::Relaxed);
        }
    }

    /// Begins a turn of the loop: looks at the clocks. The time, microseconds since boot.
    pub fn turn(&mut self) -> u64 {
        let now = cpu::tsc();
        self.loops += 1;
        let gap = self.gaps.sample(now);
        self.gap_max = self.gap_max.max(gap);
        let now_us = self.clock.us(now.saturating_sub(self.clock.boot));
        if gap > self.clock.ticks(GAP_REPORT_US) && now_us >= self.gap_report_at {
            self.gap_report_at = now_us + GAP_REPORT_EVERY_US;
            self.serial.line(format_args!("gap us={} at_us={now_us}", self.clock.us(gap)));
        }
        if let Some(ns) = self.kvmclock_ns(now) {
            self.clock_backwards += u64::from(ns < self.last_ns);
            self.last_ns = ns;
        }
        if self.mode == Mode::Spin {
            self.vector_errors += u64::from(!observe::vector_registers_keep());
        }
        now_us
    }

    /// kvmclock at this TSC value, nanoseconds.
    #[must_use]
    pub fn kvmclock_ns(&self, tsc: u64) -> Option<u64> {
        self.kvmclock.as_ref()?.ns(tsc)
    }

    /// The wall clock, microseconds since 1970, where the host tells it.
    #[must_use]
    pub fn wall_us(&self) -> Option<u64> {
        self.kvmclock.as_ref()?.wall_us(cpu::tsc())
    }

    /// Ends the guest soon.
    pub fn end_soon(&mut self, end: End) {
        self.end.get_or_insert((self.clock.uptime_us() + SHUTDOWN_DELAY_US, end));
    }

    fn reports(&self) -> impl Iterator<Item = &'static crate::memory::orders::Report> + use<> {
        REPORTS.iter().take(usize::try_from(self.vcpus).unwrap_or(1))
    }
}
