//! A deterministic simulator of the migration protocol.
//!
//! Both ends are the machines that ship ([`wire::migration::source::Source`], [`wire::migration::target::Target`]), with the
//! ledger and the lane checks that ship; the hosts around them, the VMMs, the network, the control plane and the guest are
//! models. Time is virtual and chance comes from the seed, so a run can be repeated exactly. Faults come at drawn times and
//! when an end reaches a drawn state: the link is cut in one direction or both, daemons crash and come back,
//! VMMs die, users cancel, the control plane fences, forgets or is silent, messages are late or doubled.
//!
//! After each event these are checked (DESIGN.md section 4): never two running copies; whoever begins to run holds just what
//! the guest held when it last stood still; no dirty bit is lost when bits are given back; the guest runs while it is
//! copied; a cancel before the disowning takes effect at once; neither end takes the other's message for a breach of
//! protocol. Once faults have stopped, the machine must come to be moved, unless a fault killed the guest.
//!
//! [`Mutation`]s break one rule each; the tests demand that every one of them is found.

mod control;
mod faults;
mod guest;
mod net;
mod options;
mod rng;
mod source;
mod target;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

pub use options::{Mutation, Options};
use world::World;

/// What one run showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Events.
    pub events: u64,
    /// What must not have happened; empty is good.
    pub violations: Vec<String>,
    /// What happened, if [`Options::trace`] is set.
    pub trace: Vec<String>,
    /// Whether the machine moved in the end; if not, a fault killed the guest.
    pub moved: bool,
    /// What the run exercised.
    pub reached: Reached,
}

/// How often the paths were taken that matter most: a campaign that never takes them proves nothing about them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reached {
    /// Reconnects after which the source went on where it was.
    pub resumed: u64,
    /// Switch-overs after which the guest was resumed on the source.
    pub rolled_back: u64,
    /// Reclaims of a machine given away.
    pub reclaimed: u64,
    /// Doubts that the control plane settled for the target.
    pub settled: u64,
    /// Targets that told a source in doubt that they had dropped their copy.
    pub dropped: u64,
    /// Migrations cancelled.
    pub cancelled: u64,
}

impl Reached {
    fn add(&mut self, other: &Self) {
        self.resumed += other.resumed;
        self.rolled_back += other.rolled_back;
        self.reclaimed += other.reclaimed;
        self.settled += other.settled;
        self.dropped += other.dropped;
        self.cancelled += other.cancelled;
    }
}

/// What many runs showed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Runs.
    pub seeds: u64,
    /// Events in all.
    pub events: u64,
    /// Runs at whose end the machine had moved.
    pub moved: u64,
    /// What the runs exercised.
    pub reached: Reached,
    /// First violation of each bad seed, in the order of seeds; at most [`VIOLATIONS_MAX`].
    pub violations: Vec<(u64, String)>,
}

/// Bad seeds after which a campaign stops: one is enough to fail, more help to see what they share.
pub const VIOLATIONS_MAX: usize = 20;

/// Runs one seed.
pub fn run(seed: u64, options: &Options) -> Report {
    let mut world = World::new(seed, options);
    world.plan_faults();
    world.run();
    Report {
        seed,
        events: world.events,
        moved: world.control.moved(),
        reached: world.reached,
        violations: world.violations,
        trace: world.trace,
    }
}

/// Runs `count` seeds from `first` on, on `threads` threads.
pub fn campaign(first: u64, count: u64, threads: usize, options: &Options) -> Summary {
    let next = AtomicU64::new(0);
    let total = Mutex::new(Summary::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut mine = Summary::default();
                while mine.violations.len() < VIOLATIONS_MAX {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let report = run(first.wrapping_add(index), options);
                    mine.seeds += 1;
                    mine.events += report.events;
                    mine.moved += u64::from(report.moved);
                    mine.reached.add(&report.reached);
                    mine.violations.extend(report.violations.into_iter().take(1).map(|v| (report.seed, v)));
                }
                if let Ok(mut total) = total.lock() {
                    total.seeds += mine.seeds;
                    total.events += mine.events;
                    total.moved += mine.moved;
                    total.reached.add(&mine.reached);
                    total.violations.append(&mut mine.violations);
                }
            });
        }
    });
    let mut summary = total.into_inner().unwrap_or_default();
    summary.violations.sort();
    summary.violations.truncate(VIOLATIONS_MAX);
    summary
}
