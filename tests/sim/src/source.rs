//! The model of the source's host: carries out the actions of the shipped [`Source`] machine on a model VMM.

mod requests;
mod sending;

pub use requests::SourceOp;
use sending::Task;
use wire::fleet::{Outcome, RefusalCode};
use wire::ids::{Epoch, MigrationId};
use wire::migration::lane::LaneSender;
use wire::migration::ledger::Ledger;
use wire::migration::messages::{Commit, ConsoleBytes, SourceMessage, TargetMessage};
use wire::migration::source::{
    ACTIONS_MAX, Source, SourceAction, SourceConfig, SourceEvent, SourceOperation,
};
use wire::units::Instant;

use crate::control::{Request, Response, Standing};
use crate::guest::{Memory, Phase, Vmm, serial_byte};
use crate::net::Session;
use crate::options::Mutation;
use crate::world::{Event, Side, World, trace};

/// Answers on their way to the machine.
#[derive(Debug, Clone)]
pub enum SourceReply {
    /// To an action.
    Event(SourceEvent),
    /// A round has been handed to the transport; the number of the task tells whether anybody still wants to know.
    Sent(u32, SourceEvent),
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
            self.count_reached(&action);
            self.source_act(action);
        }
        self.source.actions = actions;
        self.state_reached(Side::Source, state);
    }

    fn count_reached(&mut self, action: &SourceAction) {
        let reached = &mut self.reached;
        let count = match action {
            SourceAction::GiveBackDirty { .. } => &mut reached.resumed,
            SourceAction::ResumeGuest { .. } => &mut reached.rolled_back,
            SourceAction::Reclaim { .. } => &mut reached.reclaimed,
            SourceAction::TargetDropped => &mut reached.dropped,
            SourceAction::Done(Outcome::Cancelled) => &mut reached.cancelled,
            _ => return,
        };
        *count += 1;
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
                    self.reached.settled += u64::from(self.source.state_name() == "InDoubt");
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
