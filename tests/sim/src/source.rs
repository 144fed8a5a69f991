//! The model of the source's host: carries out the actions of the shipped [`Source`] machine on a model VMM.

use rkyv::util::AlignedVec;
use wire::fleet::{Outcome, RefusalCode};
use wire::ids::{Epoch, MigrationId};
use wire::migration::lane::{Batch, LaneRecord, LaneSender, WireRun};
use wire::migration::ledger::Ledger;
use wire::migration::messages::{Commit, ConsoleBytes, SourceMessage, TargetMessage};
use wire::migration::source::{
    ACTIONS_MAX, Sent, Source, SourceAction, SourceConfig, SourceEvent, SourceOperation,
};
use wire::pages::{PageRun, PageSet, lane_of};
use wire::units::{Instant, PageIndex};

use crate::control::{Request, Response, Standing};
use crate::guest::{CHUNKS, Memory, PAGES_PER_CHUNK, Phase, Vmm, index_of, page_of, serial_byte};
use crate::net::{LANES, Session};
use crate::options::Mutation;
use crate::target::LaneFrame;
use crate::world::{Event, Side, World, trace};

/// Requests to the VMM, carried out in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the actions that cause them")]
pub enum SourceOp {
    StartLog,
    StopLog,
    Count { round: u32 },
    Pause,
    Save { console_from: u64 },
    Disown { epoch: Epoch },
    Run { epoch: Epoch },
    Reclaim { epoch: Epoch },
    Kill,
}

/// Answers on their way to the machine.
#[derive(Debug, Clone)]
pub enum SourceReply {
    /// To an action.
    Event(SourceEvent),
    /// A round has been handed to the transport; the number of the task tells whether anybody still wants to know.
    Sent(u32, SourceEvent),
}

/// A round being sent.
#[derive(Debug, Clone, Copy)]
struct Task {
    number: u32,
    last: bool,
    chunk: usize,
    started: u64,
    sent: Sent,
}

/// The host.
#[derive(Debug)]
pub struct SourceHost {
    /// Counts starts of the daemon and new machines, so that answers find whom they are for.
    pub daemon: u32,
    /// Whether the daemon lives.
    pub up: bool,
    /// Counts starts of the daemon.
    pub starts: u32,
    /// Highest target's epoch of all migrations that this daemon was told to begin: a command that lost its way begins no older one.
    highest: Epoch,
    /// The VMM; survives the daemon.
    pub vmm: Vmm,
    /// The migration under way, or the last one.
    pub machine: Option<Source>,
    /// How the last one ended.
    pub ended: Option<(MigrationId, Outcome)>,
    /// Whether the VMM was asked to record the disowning.
    pub disown_asked: bool,
    config: Option<SourceConfig>,
    vmm_free_at: u64,
    session: Option<usize>,
    ledger: Option<Ledger>,
    senders: Vec<LaneSender>,
    task: Option<Task>,
    tasks: u32,
    timer: u32,
    actions: Vec<SourceAction>,
}

impl SourceHost {
    /// The machine runs here under the first epoch.
    pub fn new(memory: Memory) -> Self {
        let mut vmm = Vmm::new(1);
        vmm.memory = memory;
        vmm.phase = Phase::Running;
        vmm.epoch = Epoch::FIRST;
        Self {
            daemon: 1,
            up: true,
            starts: 1,
            highest: Epoch(0),
            vmm,
            machine: None,
            ended: None,
            disown_asked: false,
            config: None,
            vmm_free_at: 0,
            session: None,
            ledger: None,
            senders: Vec::new(),
            task: None,
            tasks: 0,
            timer: 0,
            actions: Vec::with_capacity(ACTIONS_MAX),
        }
    }

    /// State of the machine, for messages.
    pub fn state_name(&self) -> &'static str {
        self.machine.as_ref().map_or("none", Source::state_name)
    }
}

impl World {
    /// Gives the machine an event and carries out what it wants.
    pub fn source_event(&mut self, event: SourceEvent) {
        let Some(mut machine) = self.source.machine.take() else { return };
        let mut actions = std::mem::take(&mut self.source.actions);
        trace!(self, "source {} <- {:?}", machine.state_name(), event);
        let is_owns = matches!(event, SourceEvent::TargetOwns { .. });
        let result = machine.handle(Instant(self.now), event, &mut actions);
        if let Err(illegal) = result {
            trace!(self, "source: {illegal}");
            if self.options.mutation.is_none() && !is_owns {
                self.violation(format!("source and target disagree: {illegal}"));
            }
        }
        if actions.len() > ACTIONS_MAX {
            self.violation(format!("source wants {} actions at once", actions.len()));
        }
        let state = machine.state_name();
        self.source.machine = Some(machine);
        for action in actions.drain(..) {
            trace!(self, "source {state} -> {action:?}");
            self.source_act(action);
        }
        self.source.actions = actions;
        self.state_reached(Side::Source, state);
    }

    fn source_act(&mut self, action: SourceAction) {
        match action {
            SourceAction::Connect { attempt } => {
                let at = self.now + self.rng.between(100, 3_000);
                let daemon = self.source.daemon;
                self.at(at, Event::Dialled { daemon, attempt });
            }
            SourceAction::Disconnect { .. } => {
                self.source.task = None;
                if let Some(session) = self.source.session.take() {
                    self.close_from_source(session);
                }
            }
            SourceAction::Send(message) => {
                if let Some(session) = self.source.session {
                    self.send_forth(session, message);
                }
            }
            SourceAction::OpenLanes { lanes, .. } => {
                if self.source.ledger.is_none() {
                    self.source.ledger = Some(Ledger::new(lanes));
                }
                self.source.senders = vec![LaneSender::new(); usize::from(lanes)];
            }
            SourceAction::StartDirtyLog => self.ask_source_vmm(SourceOp::StartLog),
            SourceAction::StopDirtyLog => self.ask_source_vmm(SourceOp::StopLog),
            SourceAction::GiveBackDirty { received } => self.give_back(&received),
            SourceAction::Confirm { round } => {
                if let Some(ledger) = &mut self.source.ledger {
                    ledger.confirm(round);
                }
            }
            SourceAction::SendRound { round } => self.begin_round(round, false),
            SourceAction::SendFinal { round } => self.begin_round(round, true),
            SourceAction::CountDirty { round } => self.ask_source_vmm(SourceOp::Count { round }),
            SourceAction::ReadConsole { from } => {
                let console = self.read_console(from);
                self.source_reply(SourceReply::Event(SourceEvent::ConsoleRead(console)));
            }
            SourceAction::Pause => self.ask_source_vmm(SourceOp::Pause),
            SourceAction::Save { console_from, .. } => self.ask_source_vmm(SourceOp::Save { console_from }),
            SourceAction::Disown { epoch } => self.disown(epoch),
            SourceAction::SwitchForward | SourceAction::Progress(_) | SourceAction::TargetDropped => {}
            SourceAction::ResumeGuest { epoch } => {
                self.source.task = None;
                self.ask_source_vmm(SourceOp::Run { epoch });
            }
            SourceAction::Reclaim { epoch } => self.ask_source_vmm(SourceOp::Reclaim { epoch }),
            SourceAction::Release => self.ask_source_vmm(SourceOp::Kill),
            SourceAction::SetTimer { at } => {
                self.source.timer += 1;
                let (daemon, timer) = (self.source.daemon, self.source.timer);
                self.at(at.0, Event::SourceTimer { daemon, timer });
            }
            SourceAction::CancelRefused | SourceAction::ReclaimRefused { .. } => {}
            SourceAction::Done(outcome) => {
                if let Some(config) = &self.source.config {
                    self.source.ended = Some((config.migration, outcome));
                }
            }
        }
    }

    fn disown(&mut self, epoch: Epoch) {
        self.source.disown_asked = true;
        if self.options.mutation == Some(Mutation::CommitBeforeDisown)
            && let (Some(session), Some(config), Some(machine)) =
                (self.source.session, &self.source.config, &self.source.machine)
        {
            let (migration, attempt) = (config.migration, machine.attempt());
            self.send_forth(session, SourceMessage::Commit(Commit { migration, epoch, attempt }));
            if self.rng.chance(30) {
                let operation = SourceOperation::Disown;
                let detail = "injected".to_owned();
                self.source_reply(SourceReply::Event(SourceEvent::OperationFailed { operation, detail }));
                return;
            }
        }
        self.ask_source_vmm(SourceOp::Disown { epoch });
    }

    fn read_console(&self, from: u64) -> ConsoleBytes {
        ConsoleBytes {
            offset: from,
            bytes: (from..self.source.vmm.memory.console).map(serial_byte).collect(),
        }
    }

    fn source_reply(&mut self, reply: SourceReply) {
        let at = self.now + self.rng.between(1, 30);
        let daemon = self.source.daemon;
        self.at(at, Event::SourceAnswer { daemon, reply });
    }

    fn ask_source_vmm(&mut self, op: SourceOp) {
        let at = self.now.max(self.source.vmm_free_at) + self.rng.between(5, 300);
        self.source.vmm_free_at = at;
        let (process, daemon) = (self.source.vmm.process, self.source.daemon);
        self.at(at, Event::SourceVmm { process, daemon, op });
    }

    /// The VMM carries out a request, whoever may still wait for the answer.
    pub fn source_vmm(&mut self, process: u32, daemon: u32, op: SourceOp) {
        if self.source.vmm.process != process || self.source.vmm.phase == Phase::Dead {
            if op == SourceOp::Kill && daemon == self.source.daemon {
                self.source_reply(SourceReply::Event(SourceEvent::Released));
            }
            return;
        }
        let fails = self.may_fail();
        let mutation = self.options.mutation;
        let console = match op {
            SourceOp::Save { console_from } => self.read_console(console_from),
            _ => ConsoleBytes::default(),
        };
        let vmm = &mut self.source.vmm;
        let mut ran = false;
        let failed = |operation| SourceEvent::OperationFailed { operation, detail: "injected".to_owned() };
        let answer = match op {
            SourceOp::StartLog if fails => Some(failed(SourceOperation::StartDirtyLog)),
            SourceOp::StartLog => {
                vmm.log = true;
                vmm.dirty = u64::MAX;
                if daemon == self.source.daemon
                    && let Some(ledger) = &mut self.source.ledger
                {
                    ledger.clear();
                }
                Some(SourceEvent::DirtyLogStarted)
            }
            SourceOp::StopLog => {
                vmm.log = false;
                None
            }
            SourceOp::Count { round } => {
                Some(SourceEvent::Dirty { round, pages: vmm.dirty.count_ones().into() })
            }
            SourceOp::Pause if mutation == Some(Mutation::NoPause) => {
                Some(SourceEvent::Paused { stop_us: 1, harvest_us: 1, dirty_pages: 0 })
            }
            SourceOp::Pause => Some(match vmm.pause() {
                Ok(()) if !fails => {
                    let dirty_pages = vmm.dirty.count_ones().into();
                    SourceEvent::Paused { stop_us: 50, harvest_us: 10, dirty_pages }
                }
                _ => failed(SourceOperation::Pause),
            }),
            SourceOp::Save { .. } => Some(match vmm.phase {
                Phase::Paused if !fails => {
                    SourceEvent::Saved { state: vmm.memory.cpu.to_le_bytes().to_vec(), console, us: 80 }
                }
                Phase::Running if mutation == Some(Mutation::NoPause) => {
                    SourceEvent::Saved { state: vmm.memory.cpu.to_le_bytes().to_vec(), console, us: 80 }
                }
                _ => failed(SourceOperation::Save),
            }),
            SourceOp::Disown { .. } if mutation == Some(Mutation::CommitBeforeDisown) => {
                Some(SourceEvent::Disowned)
            }
            SourceOp::Disown { .. } if fails => Some(failed(SourceOperation::Disown)),
            SourceOp::Disown { epoch } => {
                if mutation == Some(Mutation::NoPause) {
                    vmm.phase = Phase::Paused;
                }
                Some(match vmm.disown(epoch) {
                    Ok(()) => SourceEvent::Disowned,
                    Err(_) => failed(SourceOperation::Disown),
                })
            }
            SourceOp::Run { epoch } => Some(match vmm.run(epoch) {
                Ok(began) => {
                    ran = began;
                    SourceEvent::Resumed
                }
                Err(_) => failed(SourceOperation::ResumeGuest),
            }),
            SourceOp::Reclaim { epoch } => Some(match vmm.reclaim(epoch).and_then(|()| vmm.run(epoch)) {
                Ok(began) => {
                    ran = began;
                    SourceEvent::Reclaimed
                }
                Err(_) => failed(SourceOperation::Reclaim),
            }),
            SourceOp::Kill => {
                vmm.die();
                Some(SourceEvent::Released)
            }
        };
        let memory = vmm.memory;
        trace!(self, "source VMM: {op:?} by {daemon} -> {answer:?}");
        if ran {
            self.check_run("the source", &memory);
        }
        if let Some(answer) = answer
            && daemon == self.source.daemon
        {
            self.source_reply(SourceReply::Event(answer));
        }
    }

    /// An answer reaches the daemon that asked, if it is still the one.
    pub fn source_answer(&mut self, daemon: u32, reply: SourceReply) {
        if daemon != self.source.daemon || !self.source.up {
            return;
        }
        match reply {
            SourceReply::Event(event) => self.source_event(event),
            SourceReply::Sent(task, event) => {
                if self.source.task.is_some_and(|t| t.number == task) {
                    self.source.task = None;
                    self.source_event(event);
                }
            }
        }
    }

    fn begin_round(&mut self, round: u32, last: bool) {
        self.source.tasks += 1;
        let number = self.source.tasks;
        let sent = Sent { round, ..Sent::default() };
        self.source.task = Some(Task { number, last, chunk: 0, started: self.now, sent });
        let at = self.now + self.rng.between(1, 50);
        let daemon = self.source.daemon;
        self.at(at, Event::SendStep { daemon, task: number });
    }

    /// Takes the dirty pages of the next chunk and sends them; after the last chunk, ends the round.
    pub fn send_step(&mut self, daemon: u32, number: u32) {
        let Some(mut task) = self.source.task else { return };
        if daemon != self.source.daemon || task.number != number {
            return;
        }
        let mask_of = |chunk: usize| 0xff_u64 << (chunk * PAGES_PER_CHUNK);
        while task.chunk < CHUNKS && self.source.vmm.dirty & mask_of(task.chunk) == 0 {
            task.chunk += 1;
        }
        if task.chunk == CHUNKS {
            self.end_round(task);
            return;
        }
        let mask = self.source.vmm.dirty & mask_of(task.chunk);
        if self.options.mutation == Some(Mutation::ReadBeforeTake) {
            let at = self.now + self.rng.between(1, 400);
            self.at(at, Event::TakeLate { mask });
        } else {
            self.source.vmm.dirty &= !mask;
        }
        self.send_chunk(&mut task, mask);
        task.chunk += 1;
        self.source.task = Some(task);
        let at = self.now + if task.last { self.rng.between(1, 10) } else { self.rng.between(5, 120) };
        self.at(at, Event::SendStep { daemon, task: number });
    }

    fn send_chunk(&mut self, task: &mut Task, mask: u64) {
        let lanes = self.source.senders.len();
        let lane = usize::from(lane_of(task.chunk as u64, u16::try_from(lanes).unwrap_or(1)).0);
        let mut batch = Batch { round: task.sent.round, ..Batch::default() };
        let (mut pages, mut runs) = (Vec::new(), Vec::new());
        for index in (0..64).filter(|i| mask & (1 << i) != 0) {
            let version = self.source.vmm.memory.pages[index];
            let first = page_of(index);
            let run = WireRun { first: u32::try_from(first.0).unwrap_or(u32::MAX), count: 1 };
            if version == 0 {
                batch.zero.push(run)
            } else {
                batch.content.push(run)
            }
            runs.push(PageRun { first, count: 1 });
            pages.push((index, version));
        }
        task.sent.pages += batch.content.len() as u64;
        task.sent.zero_pages += batch.zero.len() as u64;
        let payload = u32::try_from(batch.content.len()).unwrap_or(0) * 4096;
        task.sent.bytes += u64::from(payload) + 100;
        let number = self.source.senders[lane].batch(&batch);
        if let Some(ledger) = &mut self.source.ledger {
            ledger.record(u16::try_from(lane).unwrap_or(0), task.sent.round, number, runs);
        }
        self.send_record(lane, LaneRecord::Batch(batch), payload, pages);
    }

    fn send_record(&mut self, lane: usize, record: LaneRecord, payload: u32, pages: Vec<(usize, u32)>) {
        let Some(session) = self.source.session else { return };
        let body = rkyv::to_bytes::<rkyv::rancor::Error>(&record).unwrap_or_else(|_| AlignedVec::new());
        self.send_lane(session, lane, LaneFrame { body, payload, pages });
    }

    fn end_round(&mut self, mut task: Task) {
        let round = task.sent.round;
        let mut digests = Vec::with_capacity(LANES);
        for lane in 0..self.source.senders.len() {
            let end = self.source.senders[lane].round_end(round);
            digests.push(end.digest);
            self.send_record(lane, LaneRecord::RoundEnd(end), 0, Vec::new());
        }
        task.sent.us = self.now - task.started;
        let sent = task.sent;
        let event = if task.last {
            SourceEvent::FinalSent { sent, lane_digests: digests }
        } else {
            SourceEvent::RoundSent(sent)
        };
        self.source_reply(SourceReply::Sent(task.number, event));
    }

    /// What the target does not have is dirty again; and then nothing may be missing from the bitmap.
    fn give_back(&mut self, received: &wire::migration::messages::Resume) {
        let Some(ledger) = &mut self.source.ledger else { return };
        let mut dirty = PageSet::empty(16 << 20 >> 12);
        ledger.give_back(received, &mut dirty);
        if self.options.mutation == Some(Mutation::DirtyBitsNotGivenBack) {
            return;
        }
        for run in dirty.runs() {
            for page in run.pages() {
                self.source.vmm.dirty |= index_of(PageIndex(page.0)).map_or(0, |index| 1 << index);
            }
        }
        let same = self.target.machine_of(self.source.config.as_ref().map(|c| c.migration));
        if let Some(copy) = self.target.vmm.as_ref().filter(|_| same && self.options.mutation.is_none()) {
            let differs = self.source.vmm.memory.difference(&copy.memory);
            if differs & !self.source.vmm.dirty != 0 {
                self.violation(format!(
                    "invariant 2: dirty bits lost: {:#x}",
                    differs & !self.source.vmm.dirty
                ));
            }
        }
    }

    /// An attempt to connect comes to something.
    pub fn dialled(&mut self, daemon: u32, attempt: u32) {
        if daemon != self.source.daemon || !self.source.up {
            return;
        }
        let wanted = self.source.machine.as_ref().is_some_and(|m| m.attempt() == attempt);
        if !wanted || self.now < self.down_until || !self.target.up {
            self.source_event(SourceEvent::LinkLost { attempt });
            return;
        }
        let Some(config) = &self.source.config else { return };
        self.sessions.push(Session::new(config.migration, attempt));
        self.source.session = Some(self.sessions.len() - 1);
        self.source_event(SourceEvent::Connected { attempt });
        // Given up in the very moment it came up: the machine did not want it.
        if self.source.machine.as_ref().is_none_or(|m| m.attempt() != attempt) {
            self.source.session = None;
        }
    }

    /// A control message arrives.
    pub fn message_to_source(&mut self, session: usize, message: TargetMessage) {
        let from = &self.sessions[session];
        if self.source.up && from.source_open && !from.cut_back && self.source.session == Some(session) {
            let attempt = from.attempt;
            self.source_event(SourceEvent::Message { attempt, message });
        }
    }

    /// The source notices that a session is gone.
    pub fn source_lost(&mut self, session: usize) {
        if !std::mem::replace(&mut self.sessions[session].source_open, false) {
            return;
        }
        if !self.source.up || self.source.session != Some(session) {
            return;
        }
        self.source.session = None;
        self.source.task = None;
        let attempt = self.sessions[session].attempt;
        if self.options.mutation == Some(Mutation::ResumeInDoubt)
            && self.source.machine.as_ref().is_some_and(Source::in_doubt)
        {
            self.source.vmm.phase = Phase::Running;
            let memory = self.source.vmm.memory;
            self.check_run("the source", &memory);
        }
        self.source_event(SourceEvent::LinkLost { attempt });
    }

    /// The timer.
    pub fn source_timer(&mut self, daemon: u32, timer: u32) {
        if daemon == self.source.daemon && timer == self.source.timer && self.source.up {
            self.source_event(SourceEvent::Timer);
        }
    }

    /// `mashined` dies; its VMM does not.
    pub fn crash_source(&mut self) {
        if !self.source.up {
            return;
        }
        trace!(self, "source mashined crashes in {}", self.source.state_name());
        self.source.up = false;
        self.source.daemon += 1;
        self.source.machine = None;
        self.source.ended = None;
        self.source.task = None;
        self.source.ledger = None;
        self.source.session = None;
        self.drop_sessions(Side::Source);
        let at = self.now + self.rng.between(100, 50_000);
        self.at(at, Event::Restart { side: Side::Source });
    }

    /// `mashined` is back and looks at its VMM, once that has done what it was asked before.
    pub fn restart_source(&mut self) {
        if self.source.vmm_free_at >= self.now {
            let at = self.source.vmm_free_at + 1;
            self.at(at, Event::Restart { side: Side::Source });
            return;
        }
        self.source.up = true;
        self.source.starts += 1;
        self.source.highest = Epoch(0);
        trace!(self, "source mashined is back, VMM {:?}", self.source.vmm.phase);
        match self.source.vmm.phase {
            Phase::Paused => {
                let epoch = self.source.vmm.epoch;
                self.ask_source_vmm(SourceOp::Run { epoch });
            }
            Phase::Disowned if self.options.mutation == Some(Mutation::RestartResumesDisowned) => {
                self.source.vmm.phase = Phase::Running;
                let memory = self.source.vmm.memory;
                self.check_run("the source", &memory);
            }
            Phase::Disowned => {
                if let Some(config) = self.source.config.clone() {
                    let attempt = u32::try_from(self.now / 100).unwrap_or(u32::MAX);
                    self.source.disown_asked = true;
                    self.source.machine = Some(Source::recover(config, 1_000_000 + attempt));
                    self.source_event(SourceEvent::Start);
                }
            }
            Phase::Running | Phase::Created | Phase::Dead => {}
        }
    }

    /// The VMM process dies.
    pub fn kill_source_vmm(&mut self) {
        if self.source.vmm.phase == Phase::Dead {
            return;
        }
        trace!(self, "source VMM dies in {:?}", self.source.vmm.phase);
        if self.source.vmm.phase != Phase::Disowned || !self.target.vmm_runs() {
            self.guest_killed = true;
        }
        self.source.vmm.die();
        if self.source.up {
            self.source_reply(SourceReply::Event(SourceEvent::GuestEnded));
        }
    }

    /// A command of the control plane.
    pub fn command_source(&mut self, request: Request) {
        if !self.source.up {
            return;
        }
        trace!(self, "source is told {request:?}");
        match request {
            Request::Migrate { config } => self.begin_migration(*config),
            Request::Inquire { migration } => {
                let standing = self.source_standing(migration);
                self.respond(Response::Standing { migration, standing });
            }
            Request::Cancel { migration } => {
                if self.source.config.as_ref().is_some_and(|c| c.migration == migration) {
                    self.cancel_source();
                }
            }
            Request::Reclaim { migration, epoch } => {
                if self.source.config.as_ref().is_some_and(|c| c.migration == migration) {
                    self.source_event(SourceEvent::Reclaim { epoch });
                }
            }
            Request::TargetOwns { migration, epoch } => {
                if self.source.config.as_ref().is_some_and(|c| c.migration == migration) {
                    self.source_event(SourceEvent::TargetOwns { epoch });
                }
            }
            Request::Prepare { .. } | Request::Forget { .. } | Request::Fence { .. } => {}
        }
    }

    fn begin_migration(&mut self, mut config: SourceConfig) {
        config.incarnation = u64::from(self.source.starts);
        if config.to_epoch < self.source.highest {
            return;
        }
        self.source.highest = config.to_epoch;
        let busy = self.source.machine.as_ref().is_some_and(|m| !m.ended());
        let known = self.source.config.as_ref().is_some_and(|c| c.migration == config.migration)
            && self.source.machine.is_some();
        if busy || known || self.source.vmm.phase != Phase::Running || config.epoch != self.source.vmm.epoch {
            return;
        }
        self.source.daemon += 1;
        self.source.ended = None;
        self.source.disown_asked = false;
        self.source.ledger = None;
        self.source.session = None;
        self.source.task = None;
        self.source.machine = Some(Source::new(config.clone()));
        self.source.config = Some(config);
        self.source_event(SourceEvent::Start);
    }

    fn source_standing(&self, migration: MigrationId) -> Standing {
        if self.source.vmm.phase == Phase::Dead
            && self.source.machine.as_ref().is_none_or(|m| m.ended() || m.in_doubt())
            && !matches!(&self.source.ended, Some((id, Outcome::Succeeded(_))) if *id == migration)
        {
            return Standing::NoGuest;
        }
        let ours = self.source.config.as_ref().is_some_and(|c| c.migration == migration);
        match &self.source.machine {
            Some(machine) if ours && machine.in_doubt() => Standing::InDoubt,
            Some(machine) if ours && !machine.ended() => Standing::Moving,
            Some(_) if ours => match &self.source.ended {
                Some((_, Outcome::Succeeded(_))) => Standing::Moved,
                Some((_, Outcome::Failed { code: RefusalCode::GuestEnded, .. })) => Standing::NoGuest,
                _ => Standing::Stayed,
            },
            Some(machine) if !machine.ended() => match &self.source.config {
                Some(other) => Standing::Other { migration: other.migration, to_epoch: other.to_epoch },
                None => Standing::Moving,
            },
            _ => Standing::Unknown { epoch: self.source.vmm.epoch },
        }
    }

    /// Invariant 4: before the disowning a cancel takes effect at once.
    fn cancel_source(&mut self) {
        let too_late = self.source.disown_asked || self.source.machine.as_ref().is_none_or(Source::ended);
        self.source_event(SourceEvent::Cancel);
        let over = matches!(self.source.state_name(), "Ended" | "Resuming");
        if !too_late && !over {
            self.violation(format!("invariant 4: cancelled, and still {}", self.source.state_name()));
        }
    }

    /// Invariant 3: while it copies, or looks for the target, the guest runs.
    pub fn check_source(&mut self) {
        let copies = matches!(
            self.source.state_name(),
            "Linking" | "StartingLog" | "Sending" | "Counting" | "Draining"
        );
        if copies && self.source.vmm.phase == Phase::Paused && self.source.vmm_free_at < self.now {
            self.violation(format!("invariant 3: the guest stands still in {}", self.source.state_name()));
        }
    }
}
