//! What goes wrong in a run, and when: at a time, or when one end reaches a state.

use crate::control::Request;
use crate::options::Options;
use crate::rng::Rng;
use crate::world::{Event, FAULTS_US, Side, World, trace};

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    CutLink,
    CrashSource,
    CrashTarget,
    KillSourceVmm,
    KillTargetVmm,
    Cancel,
    Fence,
    Forget,
    ControlDown,
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    At(u64),
    Reached(Side, &'static str, u64),
}

/// The faults of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    faults: Vec<(Kind, Trigger)>,
    fired: u64,
}

const SOURCE_STATES: [&str; 11] = [
    "Linking",
    "StartingLog",
    "Sending",
    "Counting",
    "Draining",
    "Pausing",
    "Finishing",
    "Disowning",
    "InDoubt",
    "Resuming",
    "Releasing",
];
const TARGET_STATES: [&str; 9] = [
    "Expecting",
    "Reserving",
    "Receiving",
    "Halting",
    "Finishing",
    "Ready",
    "Committing",
    "Owned",
    "Discarding",
];

impl Plan {
    /// Draws what goes wrong in this run.
    pub fn draw(rng: &mut Rng, options: &Options) -> Self {
        let mut faults = Vec::new();
        let mut some = |rng: &mut Rng, most: u64, kind: &dyn Fn(&mut Rng) -> Kind| {
            // Half of all runs are free of a given fault, so that the others are seen alone, too.
            let count = if most > 0 && rng.chance(50) { rng.between(1, most) } else { 0 };
            for _ in 0..count {
                let kind = kind(rng);
                faults.push((kind, Trigger::draw(rng)));
            }
        };
        some(rng, options.link_cuts, &|_| Kind::CutLink);
        some(rng, options.source_crashes, &|_| Kind::CrashSource);
        some(rng, options.target_crashes, &|_| Kind::CrashTarget);
        if rng.chance(20) {
            some(rng, options.vmm_deaths, &|rng| {
                if rng.chance(50) { Kind::KillSourceVmm } else { Kind::KillTargetVmm }
            });
        }
        some(rng, options.cancels, &|_| Kind::Cancel);
        if rng.chance(50) {
            some(rng, options.fences, &|rng| match rng.below(3) {
                0 => Kind::Fence,
                1 => Kind::Forget,
                _ => Kind::ControlDown,
            });
        }
        Self { faults, fired: 0 }
    }
}

impl Trigger {
    fn draw(rng: &mut Rng) -> Self {
        let delay = if rng.chance(30) { 0 } else { rng.below(1_500) };
        match rng.below(5) {
            0 => Self::At(rng.between(1, 60_000)),
            1 | 2 => {
                let index = rng.index(SOURCE_STATES.len());
                Self::Reached(Side::Source, SOURCE_STATES[index], delay)
            }
            _ => {
                let index = rng.index(TARGET_STATES.len());
                Self::Reached(Side::Target, TARGET_STATES[index], delay)
            }
        }
    }
}

impl World {
    /// Schedules the faults that have a time.
    pub fn plan_faults(&mut self) {
        for index in 0..self.plan.faults.len() {
            if let Trigger::At(at) = self.plan.faults[index].1 {
                self.at(at, Event::Fault { index });
            }
        }
    }

    /// One end is in this state now: what waited for it comes.
    pub fn state_reached(&mut self, side: Side, state: &'static str) {
        for index in 0..self.plan.faults.len() {
            if let Trigger::Reached(where_, name, delay) = self.plan.faults[index].1
                && where_ == side
                && name == state
                && self.plan.fired & (1 << index) == 0
            {
                self.plan.fired |= 1 << index;
                let at = self.now + delay;
                self.at(at, Event::Fault { index });
            }
        }
    }

    /// Whether an operation of a host fails now.
    pub fn may_fail(&mut self) -> bool {
        self.options.failing_operations && self.now < FAULTS_US && self.rng.below(200) == 0
    }

    /// A planned fault is due.
    pub fn inject(&mut self, index: usize) {
        if self.now >= FAULTS_US {
            return;
        }
        let kind = self.plan.faults[index].0;
        trace!(self, "FAULT {kind:?}");
        match kind {
            Kind::CutLink => self.cut_link(),
            Kind::CrashSource => self.crash_source(),
            Kind::CrashTarget => self.crash_target(),
            Kind::KillSourceVmm => self.kill_source_vmm(),
            Kind::KillTargetVmm => self.kill_target_vmm(),
            Kind::Cancel => {
                let migration = self.control.migration();
                self.command(Side::Source, Request::Cancel { migration });
            }
            Kind::Fence => {
                let epoch = self.control.to_epoch();
                self.command(Side::Target, Request::Fence { epoch });
            }
            Kind::Forget => {
                let migration = self.control.migration();
                self.command(Side::Target, Request::Forget { migration });
            }
            Kind::ControlDown => self.control.down_until = self.now + self.rng.between(1_000, 100_000),
        }
    }

    /// A daemon died: its connections end, and the other end notices in its own time.
    pub fn drop_sessions(&mut self, side: Side) {
        for index in 0..self.sessions.len() {
            let session = &mut self.sessions[index];
            let (open, event) = match side {
                Side::Source => (&mut session.source_open, Event::TargetLost { session: index }),
                Side::Target => (&mut session.target_open, Event::SourceLost { session: index }),
            };
            if std::mem::replace(open, false) {
                let at = self.now + self.rng.between(10, 40_000);
                self.at(at, event);
            }
        }
    }
}
