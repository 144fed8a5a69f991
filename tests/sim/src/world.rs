//! The world of one run: time, the queue of events, and the checks after each of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use wire::migration::messages::{SourceMessage, TargetMessage};

use crate::control::{Control, Request, Response};
use crate::faults::Plan;
use crate::guest::{Memory, PAGES, Phase};
use crate::net::Session;
use crate::options::Options;
use crate::rng::Rng;
use crate::source::{SourceHost, SourceOp, SourceReply};
use crate::target::{LaneFrame, TargetHost, TargetOp, TargetReply};

/// Faults are injected for so long, in microseconds of virtual time; then all must come to rest.
pub const FAULTS_US: u64 = 400_000;
/// When a run that has not come to rest is called stuck.
const HORIZON_US: u64 = 20_000_000;
/// Events after which a run is called a live-lock.
const EVENTS_MAX: u64 = 200_000;

/// Whom a command of the control plane is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The source's host.
    Source,
    /// The target's host.
    Target,
}

/// Everything that can happen.
#[derive(Debug, Clone)]
pub enum Event {
    /// The guest, wherever it runs, makes a step.
    GuestStep,
    /// A message arrives.
    ToTarget { session: usize, message: Box<SourceMessage> },
    /// A message arrives.
    ToSource { session: usize, message: Box<TargetMessage> },
    /// A record of a lane arrives.
    ToLane { session: usize, lane: usize, record: LaneFrame },
    /// An opening message arrives once more, as a connection of its own.
    Replay { message: Box<SourceMessage> },
    /// The source's attempt to connect comes to something.
    Dialled { daemon: u32, attempt: u32 },
    /// An end notices that a session is gone.
    SourceLost { session: usize },
    /// An end notices that a session is gone.
    TargetLost { session: usize },
    /// The VMM carries out a request.
    SourceVmm { process: u32, daemon: u32, op: SourceOp },
    /// The answer reaches the daemon.
    SourceAnswer { daemon: u32, reply: SourceReply },
    /// The sender goes on.
    SendStep { daemon: u32, task: u32 },
    /// Bits of a page already read are taken ([`crate::options::Mutation::ReadBeforeTake`]).
    TakeLate { mask: u64 },
    /// Timer of the source.
    SourceTimer { daemon: u32, timer: u32 },
    /// The VMM or the network carries out a request.
    TargetOp { daemon: u32, op: TargetOp },
    /// The answer reaches the daemon.
    TargetAnswer { daemon: u32, reply: TargetReply },
    /// A batch is written late ([`crate::options::Mutation::RoundEndBeforePages`]).
    WriteLate { process: u32, pages: Vec<(usize, u32)> },
    /// Timer of the target.
    TargetTimer { daemon: u32, timer: u32 },
    /// A daemon comes back.
    Restart { side: Side },
    /// The control plane looks at where it stands.
    ControlTick,
    /// A command arrives, on a connection with the start of the daemon that it was sent to.
    Command { side: Side, daemon: u32, request: Request },
    /// An answer arrives.
    Answer { response: Response },
    /// A planned fault is due.
    Fault { index: usize },
}

/// An entry of the queue, ordered by time and then by age.
#[derive(Debug)]
struct Entry {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// The world.
#[derive(Debug)]
pub struct World {
    /// What may happen.
    pub options: Options,
    /// Chance.
    pub rng: Rng,
    /// Virtual time, in microseconds.
    pub now: u64,
    /// Until when nobody can connect.
    pub down_until: u64,
    /// All connections ever made.
    pub sessions: Vec<Session>,
    /// The host that the machine starts on.
    pub source: SourceHost,
    /// The host it is to move to.
    pub target: TargetHost,
    /// Who wants it moved.
    pub control: Control,
    /// What will go wrong.
    pub plan: Plan,
    /// The machine as it must be, wherever it runs.
    pub truth: Memory,
    /// Counts page writes.
    pub stamp: u32,
    /// Whether a fault may have ended the guest.
    pub guest_killed: bool,
    /// Pages written in each step, at most.
    pub writes_max: u64,
    /// What went wrong that must not.
    pub violations: Vec<String>,
    /// What happened, if wanted.
    pub trace: Vec<String>,
    /// Events so far.
    pub events: u64,
    /// What was exercised.
    pub reached: crate::Reached,
    queue: BinaryHeap<Reverse<Entry>>,
    number: u64,
}

/// Adds a line to the trace, if one is kept.
macro_rules! trace {
    ($world:expr, $($part:tt)*) => {
        if $world.options.trace {
            let line = format!("{:>9} {}", $world.now, format_args!($($part)*));
            $world.trace.push(line);
        }
    };
}
pub(crate) use trace;

impl World {
    /// The world of `seed`, before anything happened: the machine runs on the source, all its pages written.
    pub fn new(seed: u64, options: &Options) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng, options);
        let mut truth = Memory::BLANK;
        let mut stamp = 0;
        for index in 0..PAGES {
            if rng.chance(70) {
                stamp += 1;
                truth.pages[index] = stamp;
            }
        }
        let writes_max = rng.between(0, 6);
        let mut world = Self {
            options: *options,
            now: 0,
            down_until: 0,
            sessions: Vec::new(),
            source: SourceHost::new(truth),
            target: TargetHost::new(&mut rng, options),
            control: Control::new(&mut rng),
            plan,
            truth,
            stamp,
            guest_killed: false,
            writes_max,
            violations: Vec::new(),
            trace: Vec::new(),
            events: 0,
            reached: crate::Reached::default(),
            queue: BinaryHeap::new(),
            number: 0,
            rng,
        };
        world.at(1, Event::GuestStep);
        world.at(1, Event::ControlTick);
        world
    }

    /// Puts an event into the queue.
    pub fn at(&mut self, at: u64, event: Event) {
        self.number += 1;
        self.queue.push(Reverse(Entry { at: at.max(self.now), number: self.number, event }));
    }

    /// Notes a violation, with the time.
    pub fn violation(&mut self, what: impl Into<String>) {
        let line = format!("at {} us: {}", self.now, what.into());
        trace!(self, "VIOLATION {line}");
        if self.violations.len() < 8 {
            self.violations.push(line);
        }
    }

    /// Runs to the end.
    pub fn run(&mut self) {
        while let Some(Reverse(Entry { at, event, .. })) = self.queue.pop() {
            self.now = at;
            self.events += 1;
            self.dispatch(event);
            self.check();
            if self.control.finished() || !self.violations.is_empty() {
                break;
            }
            if at > HORIZON_US || self.events > EVENTS_MAX {
                let what = format!(
                    "no rest: control plane {:?}, source {}, target {}",
                    self.control.step_name(),
                    self.source.state_name(),
                    self.target.state_name()
                );
                self.violation(what);
                break;
            }
        }
        self.check_end();
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::GuestStep => self.guest_step(),
            Event::ToTarget { session, message } => self.message_to_target(session, *message),
            Event::ToSource { session, message } => self.message_to_source(session, *message),
            Event::ToLane { session, lane, record } => self.record_to_target(session, lane, record),
            Event::Replay { message } => self.replay(*message),
            Event::Dialled { daemon, attempt } => self.dialled(daemon, attempt),
            Event::SourceLost { session } => self.source_lost(session),
            Event::TargetLost { session } => self.target_lost(session),
            Event::SourceVmm { process, daemon, op } => self.source_vmm(process, daemon, op),
            Event::SourceAnswer { daemon, reply } => self.source_answer(daemon, reply),
            Event::SendStep { daemon, task } => self.send_step(daemon, task),
            Event::TakeLate { mask } => self.source.vmm.dirty &= !mask,
            Event::SourceTimer { daemon, timer } => self.source_timer(daemon, timer),
            Event::TargetOp { daemon, op } => self.target_op(daemon, op),
            Event::TargetAnswer { daemon, reply } => self.target_answer(daemon, reply),
            Event::WriteLate { process, pages } => self.write_pages(process, &pages),
            Event::TargetTimer { daemon, timer } => self.target_timer(daemon, timer),
            Event::Restart { side: Side::Source } => self.restart_source(),
            Event::Restart { side: Side::Target } => self.restart_target(),
            Event::ControlTick => self.control_tick(),
            Event::Command { side: Side::Source, daemon, request } if daemon == self.source.starts => {
                self.command_source(request);
            }
            Event::Command { side: Side::Target, daemon, request } if daemon == self.target.starts => {
                self.command_target(request);
            }
            // It was sent to a daemon that is no more, on a connection that went with it.
            Event::Command { .. } => {}
            Event::Answer { response } => self.control_answer(response),
            Event::Fault { index } => self.inject(index),
        }
    }

    /// Wherever the guest runs, it writes; what it wrote is the truth from then on.
    fn guest_step(&mut self) {
        let mut written = 0_u64;
        for _ in 0..self.rng.below(self.writes_max + 1) {
            written |= 1 << self.rng.below(PAGES as u64);
        }
        let serial = if self.rng.chance(10) { self.rng.between(1, 8) } else { 0 };
        self.stamp += 1;
        for vmm in [Some(&mut self.source.vmm), self.target.vmm.as_mut()].into_iter().flatten() {
            if vmm.phase == Phase::Running {
                vmm.step(written, self.stamp, serial);
                self.truth = vmm.memory;
            }
        }
        let next = self.now + self.rng.between(100, 900);
        self.at(next, Event::GuestStep);
    }

    /// A VMM begins to run: it must hold just what the guest held when it last stood still.
    pub fn check_run(&mut self, where_: &str, memory: &Memory) {
        if *memory != self.truth {
            let mask = memory.difference(&self.truth);
            let what = format!(
                "invariant 2: {where_} runs with other content: pages {mask:#x}, cpu {} for {}, console {} for {}",
                memory.cpu, self.truth.cpu, memory.console, self.truth.console
            );
            self.violation(what);
        }
    }

    /// What must hold after each event.
    fn check(&mut self) {
        let here = self.source.vmm.phase == Phase::Running;
        let there = self.target.vmm.as_ref().is_some_and(|vmm| vmm.phase == Phase::Running);
        if here && there {
            self.violation("invariant 1: both copies run");
        }
        self.check_source();
    }

    /// What must hold when all has come to rest.
    fn check_end(&mut self) {
        if !self.violations.is_empty() {
            return;
        }
        let here = self.source.vmm.phase == Phase::Running;
        let there = self.target.vmm.as_ref().is_some_and(|vmm| vmm.phase == Phase::Running);
        match (here, there) {
            (true, true) => self.violation("invariant 1: both copies run"),
            (true, false) | (false, true) => {}
            (false, false) if self.guest_killed => {}
            (false, false) => self.violation("no copy runs, and no fault ended the guest"),
        }
        if self.control.moved() && here {
            self.violation("said to have moved, and runs on the source");
        }
    }
}
