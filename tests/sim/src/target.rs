//! The model of the target's host: carries out the actions of the shipped [`Target`] machine on a model VMM.

use rkyv::util::AlignedVec;
use wire::fleet::{MigrationStanding, RefusalCode};
use wire::ids::{Epoch, MigrationId};
use wire::migration::lane::{ArchivedLaneRecord, LaneReceiver};
use wire::migration::messages::SourceMessage;
use wire::migration::target::{
    ACTIONS_MAX, Target, TargetAction, TargetConfig, TargetEvent, TargetOperation,
};
use wire::pages::Lane;
use wire::units::Instant;

use crate::control::{Request, Response};
use crate::guest::{Phase, Vmm, serial_byte};
use crate::net::Session;
use crate::options::{Mutation, Options};
use crate::rng::Rng;
use crate::world::{Event, Side, World, trace};

/// A record of a lane: the archive as it travels, and the content of the pages it lists.
#[derive(Debug, Clone)]
pub struct LaneFrame {
    /// The archived record.
    pub body: AlignedVec,
    /// Length of the payload, in bytes.
    pub payload: u32,
    /// Model pages and their content.
    pub pages: Vec<(usize, u32)>,
}

/// What the host does for the machine, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the actions that cause them")]
pub enum TargetOp {
    Reserve,
    Halt,
    Load { process: u32, round: u32, state: Vec<u8> },
    Route { round: u32 },
    Run { process: u32, epoch: Epoch },
    Discard,
}

/// Answers on their way to the machine.
pub type TargetReply = TargetEvent;

/// The host.
#[derive(Debug)]
pub struct TargetHost {
    /// Counts starts of the daemon and new machines.
    pub daemon: u32,
    /// Whether the daemon lives.
    pub up: bool,
    /// Counts starts of the daemon.
    pub starts: u32,
    /// Highest epoch of all migrations that this daemon was told to expect.
    highest: Epoch,
    /// The incoming VMM; survives the daemon.
    pub vmm: Option<Vmm>,
    machine: Option<Target>,
    config: Option<TargetConfig>,
    accepted: Option<u32>,
    receivers: Vec<LaneReceiver>,
    console_end: u64,
    ops_free_at: u64,
    fenced: Epoch,
    timer: u32,
    processes: u32,
    refusals_left: u64,
    actions: Vec<TargetAction>,
}

impl TargetHost {
    /// An empty host.
    pub fn new(rng: &mut Rng, options: &Options) -> Self {
        Self {
            daemon: 1,
            up: true,
            starts: 1,
            highest: Epoch(0),
            vmm: None,
            machine: None,
            config: None,
            accepted: None,
            receivers: Vec::new(),
            console_end: 0,
            ops_free_at: 0,
            fenced: Epoch(0),
            timer: 0,
            processes: 0,
            refusals_left: if options.failing_operations && rng.chance(10) { rng.between(1, 2) } else { 0 },
            actions: Vec::with_capacity(ACTIONS_MAX),
        }
    }

    /// State of the machine, for messages.
    pub fn state_name(&self) -> &'static str {
        self.machine.as_ref().map_or("none", Target::state_name)
    }

    /// Whether the machine here is of this migration.
    pub fn machine_of(&self, migration: Option<MigrationId>) -> bool {
        self.machine.is_some() && self.config.as_ref().map(|c| c.migration) == migration
    }

    /// Whether the guest runs here.
    pub fn vmm_runs(&self) -> bool {
        self.vmm.as_ref().is_some_and(|vmm| vmm.phase == Phase::Running)
    }
}

impl World {
    /// Gives the machine an event and carries out what it wants.
    pub fn target_event(&mut self, event: TargetEvent) {
        let Some(mut machine) = self.target.machine.take() else { return };
        let mut actions = std::mem::take(&mut self.target.actions);
        trace!(self, "target {} <- {:?}", machine.state_name(), event);
        let session = match &event {
            TargetEvent::Message { session, .. } => usize::try_from(*session).ok(),
            _ => None,
        };
        let result = machine.handle(Instant(self.now), event, &mut actions);
        if let Err(illegal) = result {
            trace!(self, "target: {illegal}");
            // A replayed message may come at any time; nothing else may come out of place.
            let replayed = session.is_some_and(|session| self.sessions[session].replayed);
            if self.options.mutation.is_none() && illegal.event != "Offer" && !replayed {
                self.violation(format!("target and source disagree: {illegal}"));
            }
        }
        if actions.len() > ACTIONS_MAX {
            self.violation(format!("target wants {} actions at once", actions.len()));
        }
        let state = machine.state_name();
        self.target.machine = Some(machine);
        for action in actions.drain(..) {
            trace!(self, "target {state} -> {action:?}");
            self.target_act(action);
        }
        self.target.actions = actions;
        self.state_reached(Side::Target, state);
    }

    fn target_act(&mut self, action: TargetAction) {
        let process = self.target.processes;
        match action {
            TargetAction::Send { session, message } => {
                self.send_back(usize::try_from(session).unwrap_or(usize::MAX), message);
            }
            TargetAction::Reserve { .. } => self.ask_target(TargetOp::Reserve),
            TargetAction::AcceptLanes { attempt, lanes, .. } => {
                self.target.accepted = Some(attempt);
                if self.target.receivers.is_empty()
                    && let Some(config) = &self.target.config
                {
                    let ram = config.spec.ram;
                    self.target.receivers =
                        (0..lanes).map(|lane| LaneReceiver::new(Lane(lane), lanes, ram.pages())).collect();
                }
                self.target.receivers.iter_mut().for_each(LaneReceiver::reconnected);
            }
            TargetAction::HaltLanes => self.ask_target(TargetOp::Halt),
            TargetAction::WriteConsole(console) => {
                let good = console.bytes.iter().zip(console.offset..).all(|(&b, at)| b == serial_byte(at));
                if !good || console.offset > self.target.console_end {
                    self.violation("serial output has a gap or is wrong");
                }
                self.target.console_end = self.target.console_end.max(console.end());
            }
            TargetAction::LoadState { round, state, .. } => {
                self.ask_target(TargetOp::Load { process, round, state });
            }
            TargetAction::InstallRoute { round } => self.ask_target(TargetOp::Route { round }),
            TargetAction::RemoveRoute => {}
            TargetAction::Run { epoch } => self.ask_target(TargetOp::Run { process, epoch }),
            TargetAction::Discard => self.ask_target(TargetOp::Discard),
            TargetAction::Close { session } => {
                self.close_from_target(usize::try_from(session).unwrap_or(usize::MAX));
            }
            TargetAction::SetTimer { at } => {
                self.target.timer += 1;
                let (daemon, timer) = (self.target.daemon, self.target.timer);
                self.at(at.0, Event::TargetTimer { daemon, timer });
            }
            TargetAction::Fenced { epoch } => {
                self.target.fenced = self.target.fenced.max(epoch);
                self.respond(Response::Fenced { epoch });
            }
            TargetAction::Owns { epoch } => self.respond(Response::Owns { epoch }),
            TargetAction::Forgotten => self.answer_forget(true),
            TargetAction::ForgetRefused => self.answer_forget(false),
            TargetAction::Done(_) => {}
        }
    }

    fn answer_forget(&mut self, gone: bool) {
        if let Some(migration) = self.target.config.as_ref().map(|c| c.migration) {
            self.respond(Response::Forgotten { migration, gone });
        }
    }

    fn ask_target(&mut self, op: TargetOp) {
        let at = self.now.max(self.target.ops_free_at) + self.rng.between(5, 400);
        self.target.ops_free_at = at;
        let daemon = self.target.daemon;
        self.at(at, Event::TargetOp { daemon, op });
    }

    /// The host or the VMM carries out a request.
    pub fn target_op(&mut self, daemon: u32, op: TargetOp) {
        let alive = daemon == self.target.daemon && self.target.up;
        let fails = self.may_fail();
        let failed = |operation| TargetEvent::OperationFailed {
            operation,
            code: RefusalCode::HostError,
            detail: "injected".to_owned(),
        };
        let answer = match op {
            TargetOp::Load { process, round, state } => self.load_state(process, round, &state, fails),
            TargetOp::Run { process, epoch } => self.run_target(process, epoch, fails),
            // What follows the daemon does itself: it dies with it.
            _ if !alive => None,
            TargetOp::Reserve if fails || self.target.refusals_left > 0 => {
                self.target.refusals_left = self.target.refusals_left.saturating_sub(1);
                Some(failed(TargetOperation::Reserve))
            }
            TargetOp::Reserve => {
                self.target.processes += 1;
                self.target.vmm = Some(Vmm::new(self.target.processes));
                Some(TargetEvent::Reserved)
            }
            TargetOp::Halt => {
                if self.options.mutation != Some(Mutation::LanesNotHalted) {
                    self.target.accepted = None;
                }
                let lanes = self.target.receivers.iter().map(LaneReceiver::point).collect();
                Some(TargetEvent::LanesHalted { lanes })
            }
            TargetOp::Route { .. } if fails => Some(failed(TargetOperation::InstallRoute)),
            TargetOp::Route { round } => Some(TargetEvent::RouteInstalled { round }),
            TargetOp::Discard => {
                self.target.vmm = None;
                Some(TargetEvent::Discarded)
            }
        };
        if alive && let Some(answer) = answer {
            self.target_reply(answer);
        }
    }

    fn load_state(&mut self, process: u32, round: u32, state: &[u8], fails: bool) -> Option<TargetEvent> {
        let stale = self.options.mutation == Some(Mutation::StaleState);
        let vmm =
            self.target.vmm.as_mut().filter(|vmm| vmm.process == process && vmm.phase != Phase::Dead)?;
        let cpu = state.try_into().map(u64::from_le_bytes);
        let (false, Ok(cpu), Phase::Created | Phase::Paused) = (fails, cpu, vmm.phase) else {
            return Some(TargetEvent::OperationFailed {
                operation: TargetOperation::LoadState,
                code: RefusalCode::HostError,
                detail: "injected".to_owned(),
            });
        };
        if !(stale && vmm.loaded) {
            vmm.memory.cpu = cpu;
        }
        vmm.loaded = true;
        vmm.phase = Phase::Paused;
        Some(TargetEvent::StateLoaded { round, us: 90 })
    }

    fn run_target(&mut self, process: u32, epoch: Epoch, fails: bool) -> Option<TargetEvent> {
        let console = self.target.console_end;
        let vmm =
            self.target.vmm.as_mut().filter(|vmm| vmm.process == process && vmm.phase != Phase::Dead)?;
        if !fails {
            vmm.memory.console = vmm.memory.console.max(console);
        }
        let began = if fails { Err("injected") } else { vmm.run(epoch) };
        let memory = vmm.memory;
        trace!(self, "target VMM: run {epoch} -> {began:?}");
        match began {
            Ok(began) => {
                if began {
                    self.check_run("the target", &memory);
                }
                Some(TargetEvent::Running { us: 120 })
            }
            Err(detail) => Some(TargetEvent::OperationFailed {
                operation: TargetOperation::Run,
                code: RefusalCode::HostError,
                detail: detail.to_owned(),
            }),
        }
    }

    fn target_reply(&mut self, reply: TargetReply) {
        let at = self.now + self.rng.between(1, 30);
        let daemon = self.target.daemon;
        self.at(at, Event::TargetAnswer { daemon, reply });
    }

    /// An answer reaches the daemon that asked, if it is still the one.
    pub fn target_answer(&mut self, daemon: u32, reply: TargetReply) {
        if daemon == self.target.daemon && self.target.up {
            self.target_event(reply);
        }
    }

    /// A control message arrives.
    pub fn message_to_target(&mut self, session: usize, message: SourceMessage) {
        let from = &self.sessions[session];
        if !self.target.up || !from.target_open || from.cut_forth {
            return;
        }
        if self.target.machine_of(Some(from.migration)) {
            self.target_event(TargetEvent::Message { session: session as u64, message });
        } else if message.opens().is_some() {
            let answer = message.answer_of_a_stranger();
            self.send_back(session, answer);
            self.close_from_target(session);
        }
    }

    /// An opening message arrives once more, as a connection of its own whose answers nobody hears.
    pub fn replay(&mut self, message: SourceMessage) {
        if let Some((migration, attempt)) = message.opens() {
            trace!(self, "REPLAY {message:?}");
            let mut session = Session::new(migration, attempt);
            session.source_open = false;
            session.replayed = true;
            self.sessions.push(session);
            let session = self.sessions.len() - 1;
            self.message_to_target(session, message);
            let at = self.now + self.rng.between(10, 20_000);
            self.at(at, Event::TargetLost { session });
        }
    }

    /// A record of a lane arrives.
    pub fn record_to_target(&mut self, session: usize, lane: usize, frame: LaneFrame) {
        let from = &self.sessions[session];
        let current = self.target.machine_of(Some(from.migration)) && self.target.up;
        let reads = self.target.accepted == Some(from.attempt);
        if self.options.mutation == Some(Mutation::LanesNotHalted) && current && !reads {
            self.write_pages(self.target.processes, &frame.pages);
            return;
        }
        if !current || !from.target_open || from.cut_forth || !reads {
            return;
        }
        let process = self.target.processes;
        let record = rkyv::access::<ArchivedLaneRecord, rkyv::rancor::Error>(&frame.body);
        let Some(receiver) = self.target.receivers.get_mut(lane) else { return };
        let result = match record {
            Ok(ArchivedLaneRecord::Batch(batch)) => receiver.batch(batch, frame.payload).map(|checked| {
                receiver.applied();
                (None, checked.content_pages() + checked.zero_pages())
            }),
            Ok(ArchivedLaneRecord::RoundEnd(end)) => receiver.round_end(end).map(|done| (Some(done), 0)),
            _ => return self.violation("a lane carried something else"),
        };
        match result {
            Err(error) => {
                self.violation(format!("a lane broke its rules: {error}"));
            }
            Ok((Some((round, digest)), _)) => {
                let lane = u16::try_from(lane).unwrap_or(u16::MAX);
                self.target_event(TargetEvent::LaneRoundDone { lane, round, digest });
            }
            Ok((None, pages)) if pages != frame.pages.len() as u64 => {
                self.violation("a batch lost pages on its way");
            }
            Ok((None, _)) if self.options.mutation == Some(Mutation::RoundEndBeforePages) => {
                let at = self.now + self.rng.between(1, 3_000);
                self.at(at, Event::WriteLate { process, pages: frame.pages });
            }
            Ok((None, _)) => self.write_pages(process, &frame.pages),
        }
    }

    /// Pages go into the memory of an incoming machine.
    pub fn write_pages(&mut self, process: u32, pages: &[(usize, u32)]) {
        if let Some(vmm) = self.target.vmm.as_mut().filter(|vmm| vmm.process == process) {
            for &(index, content) in pages {
                vmm.memory.pages[index] = content;
            }
            if vmm.phase == Phase::Running {
                self.violation("invariant 2: pages written into a running machine");
            }
        }
    }

    /// The target notices that a session is gone.
    pub fn target_lost(&mut self, session: usize) {
        let known = &mut self.sessions[session];
        let migration = known.migration;
        if std::mem::replace(&mut known.target_open, false)
            && self.target.up
            && self.target.machine_of(Some(migration))
        {
            self.target_event(TargetEvent::LinkLost { session: session as u64 });
        }
    }

    /// The timer.
    pub fn target_timer(&mut self, daemon: u32, timer: u32) {
        if daemon == self.target.daemon && timer == self.target.timer && self.target.up {
            self.target_event(TargetEvent::Timer);
        }
    }

    /// `mashined` dies; its VMM does not.
    pub fn crash_target(&mut self) {
        if !self.target.up {
            return;
        }
        trace!(self, "target mashined crashes in {}", self.target.state_name());
        self.target.up = false;
        self.target.daemon += 1;
        self.target.machine = None;
        self.target.accepted = None;
        self.target.fenced = Epoch(0);
        self.drop_sessions(Side::Target);
        let at = self.now + self.rng.between(100, 50_000);
        self.at(at, Event::Restart { side: Side::Target });
    }

    /// `mashined` is back: a VMM that runs is adopted, any other incoming one is discarded.
    pub fn restart_target(&mut self) {
        if self.target.ops_free_at >= self.now {
            let at = self.target.ops_free_at + 1;
            self.at(at, Event::Restart { side: Side::Target });
            return;
        }
        self.target.up = true;
        self.target.starts += 1;
        self.target.highest = Epoch(0);
        trace!(self, "target mashined is back, VMM {:?}", self.target.vmm.as_ref().map(|v| v.phase));
        let keep = self.target.vmm_runs() && self.options.mutation != Some(Mutation::RestartDropsRunning);
        if let Some(config) = self.target.config.clone().filter(|_| keep) {
            self.target.machine = Some(Target::recover(config));
            self.target_event(TargetEvent::Start);
        } else if !self.target.vmm.as_ref().is_some_and(|vmm| vmm.phase == Phase::Dead && vmm.epoch.0 > 0) {
            self.target.vmm = None;
        }
    }

    /// The VMM process dies.
    pub fn kill_target_vmm(&mut self) {
        let asked = matches!(self.target.state_name(), "Ready" | "Committing" | "Owned");
        let Some(vmm) = self.target.vmm.as_mut().filter(|vmm| vmm.phase != Phase::Dead) else { return };
        trace!(self, "target VMM dies in {:?}", vmm.phase);
        // If it is asked to run before its end is known, the machine counts as one that ran and ended here.
        self.guest_killed |= vmm.phase == Phase::Running || asked;
        vmm.die();
        if self.target.up {
            self.target_reply(TargetEvent::GuestEnded);
        }
    }

    /// A command of the control plane.
    pub fn command_target(&mut self, request: Request) {
        if !self.target.up {
            return;
        }
        trace!(self, "target is told {request:?}");
        match request {
            Request::Prepare { config } => self.prepare(*config),
            Request::Forget { migration } if self.target.machine_of(Some(migration)) => {
                self.target_event(TargetEvent::Forget);
            }
            Request::Forget { migration } => self.respond(Response::Forgotten { migration, gone: true }),
            Request::Fence { epoch } if self.options.mutation == Some(Mutation::FenceWithoutDrop) => {
                self.respond(Response::Fenced { epoch });
            }
            Request::Fence { epoch } if self.target.machine.is_some() => {
                self.target_event(TargetEvent::Fence { epoch });
            }
            // The machine ran here and ended, and this daemon was restarted since: it was this host's all the same.
            Request::Fence { epoch } if self.target.vmm.is_some() => self.respond(Response::Owns { epoch }),
            Request::Fence { epoch } => {
                self.target.fenced = self.target.fenced.max(epoch);
                self.respond(Response::Fenced { epoch });
            }
            _ => {}
        }
    }

    fn prepare(&mut self, config: TargetConfig) {
        let migration = config.migration;
        if self.target.machine_of(Some(migration)) {
            let waits = self.target.machine.as_ref().and_then(Target::standing);
            let open = matches!(waits, Some(MigrationStanding::Receiving | MigrationStanding::Ready));
            self.respond(Response::Prepared { migration, ok: open });
            return;
        }
        if config.epoch <= self.target.fenced || config.epoch <= self.target.highest {
            self.respond(Response::Prepared { migration, ok: false });
            return;
        }
        if self.target.machine.is_some() && self.target.state_name() != "Gone" {
            // Another one is still here: it is given up, and the control plane asks again.
            if self.target.config.as_ref().is_some_and(|c| c.epoch < config.epoch) {
                self.target_event(TargetEvent::Forget);
            }
            return;
        }
        self.target.daemon += 1;
        self.target.highest = config.epoch;
        self.target.receivers.clear();
        self.target.accepted = None;
        self.target.console_end = 0;
        self.target.machine = Some(Target::new(config.clone()));
        self.target.config = Some(config);
        self.target_event(TargetEvent::Start);
        self.respond(Response::Prepared { migration, ok: true });
    }
}
