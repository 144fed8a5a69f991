//! The session that receives a machine: carries out what [`wire::migration::target::Target`] asks for.
//!
//! Built as [`super::source`] is: one task owns the protocol machine, everything that takes time comes back as an event. The session
//! lives on after the machine is owned here, to answer a source that asks again whether its Commit arrived, until the agent forgets it.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use glommio::timer::TimerActionOnce;
use tokio::sync::mpsc;
use wire::fleet::{MigrationStanding, RefusalCode};
use wire::ids::{Epoch, HostName};
use wire::migration::messages::{ConsoleBytes, SourceMessage, TargetMessage, VERSION};
use wire::migration::target::{
    ACTIONS_MAX, Target, TargetAction, TargetConfig, TargetEvent, TargetOperation,
};
use wire::units::Instant;
use wire::vmm::MachineSpec;

use super::target_lane::LaneSink;
use crate::doorbell::{Doorbell, Ringer};
use crate::memory::{ConsoleText, MachineMemory};
use crate::quic::{Connection, SendStream};
use crate::shard::{ShardContext, ShardReport, TargetReport, Work, now, stream};
use crate::vm::VmmError;
use crate::vm::claim::Claim;
use crate::vm::client::VmmClient;

/// Events that may wait for a session: one for each lane's round, and a few of the agent.
pub const EVENTS_MAX: usize = 2048;
/// Longest wait for the source's acknowledgement of the last message before its connection is closed.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// A machine to receive. Its VMM is created, its RAM accounted for.
pub struct TargetJob {
    /// What to expect.
    pub config: TargetConfig,
    /// Its memory, empty.
    pub memory: Arc<MachineMemory>,
    /// Where its lanes go.
    pub sink: Arc<LaneSink>,
    /// Where it is written down that the machine runs.
    pub claim: Claim,
    /// Where lanes of all shards and the agent reach the session.
    pub events: Doorbell<Outside>,
    /// The other end of `events`.
    pub session: Ringer<Outside>,
}

/// What a session is told on its own shard.
pub enum TargetInput {
    /// A source has connected.
    Opened(ControlStream),
    /// It said something.
    Message {
        /// The connection's number.
        session: u64,
        /// The message.
        message: SourceMessage,
    },
    /// It is gone.
    LinkLost {
        /// The connection's number.
        session: u64,
    },
    /// An event of this shard's own work.
    Event(TargetEvent),
    /// From other threads.
    Outside(Outside),
}

/// What other threads tell a session.
#[derive(Debug)]
pub enum Outside {
    /// An event for the protocol machine.
    Event(TargetEvent),
    /// The VMM is a fresh one: load this state into it.
    VmmRenewed {
        /// The final round it belongs to.
        round: u32,
        /// The archive.
        state: Vec<u8>,
    },
    /// The agent forgets the migration: end.
    End,
}

/// A connection of the source.
pub struct ControlStream {
    /// Its number.
    pub session: u64,
    /// The connection.
    pub connection: Connection,
    /// Towards the source.
    pub send: SendStream,
}

/// The session as the rest of its shard sees it.
#[derive(Clone)]
pub struct TargetSession {
    source: HostName,
    local: mpsc::UnboundedSender<TargetInput>,
}

impl TargetSession {
    /// Who may connect.
    pub fn source(&self) -> &HostName {
        &self.source
    }

    /// Tells it something. A session that has ended hears nothing.
    pub fn input(&self, input: TargetInput) {
        let _session_ended = self.local.send(input);
    }
}

/// Starts the session on this shard, which must be the home of the VMM.
pub fn start(context: &Rc<ShardContext>, job: TargetJob) {
    let (migration, source) = (job.config.migration, job.config.source.clone());
    let (local, inputs) = mpsc::unbounded_channel();
    let handle = TargetSession { source, local: local.clone() };
    context.targets.borrow_mut().insert(migration, handle);
    glommio::spawn_local(run(context.clone(), job, local, inputs)).detach();
}

async fn run(
    context: Rc<ShardContext>,
    job: TargetJob,
    local: mpsc::UnboundedSender<TargetInput>,
    mut inputs: mpsc::UnboundedReceiver<TargetInput>,
) {
    let forward = local.clone();
    let mut outside = job.events.attach();
    let bridge = glommio::spawn_local(async move {
        while let Some(input) = outside.recv().await {
            let _session_ended = forward.send(TargetInput::Outside(input));
        }
    });
    let mut machine = Target::new(job.config.clone());
    let mut session = Session {
        context,
        config: job.config,
        memory: job.memory,
        sink: job.sink,
        claim: job.claim,
        outside: job.session,
        local,
        links: HashMap::new(),
        timer: None,
        state_loaded: false,
        said_ready: false,
        ended: false,
    };
    let mut actions = Vec::with_capacity(ACTIONS_MAX);
    let mut next = Some(TargetInput::Event(TargetEvent::Start));
    while let Some(input) = next {
        if let Some(event) = session.event_of(input) {
            if let Err(illegal) = machine.handle(now(), event, &mut actions) {
                tracing::warn!(migration = %session.config.migration, %illegal, "protocol");
            }
            actions.drain(..).for_each(|action| session.apply(action));
            session.announce_ready(machine.standing().as_ref());
        }
        next = if session.ended { None } else { inputs.recv().await };
    }
    session.close();
    bridge.cancel().await;
}

struct Session {
    context: Rc<ShardContext>,
    config: TargetConfig,
    memory: Arc<MachineMemory>,
    sink: Arc<LaneSink>,
    claim: Claim,
    outside: Ringer<Outside>,
    local: mpsc::UnboundedSender<TargetInput>,
    /// Connections of the source: the newest, and those that are being closed.
    links: HashMap<u64, mpsc::UnboundedSender<TargetMessage>>,
    timer: Option<TimerActionOnce<()>>,
    /// Whether the VMM was given a state: it takes only one.
    state_loaded: bool,
    said_ready: bool,
    ended: bool,
}

impl Session {
    fn event_of(&mut self, input: TargetInput) -> Option<TargetEvent> {
        match input {
            TargetInput::Event(event) | TargetInput::Outside(Outside::Event(event)) => Some(event),
            TargetInput::Outside(Outside::VmmRenewed { round, state }) => {
                self.restore(round, state);
                None
            }
            TargetInput::Outside(Outside::End) => {
                self.ended = true;
                None
            }
            TargetInput::Message { session, message } => Some(TargetEvent::Message { session, message }),
            TargetInput::LinkLost { session } => {
                self.links.remove(&session);
                Some(TargetEvent::LinkLost { session })
            }
            TargetInput::Opened(stream) => {
                let (outgoing, messages) = mpsc::unbounded_channel();
                self.links.insert(stream.session, outgoing);
                glommio::spawn_local(write(stream, messages)).detach();
                None
            }
        }
    }

    fn apply(&mut self, action: TargetAction) {
        match action {
            TargetAction::Send { session, message } => {
                if let Some(link) = self.links.get(&session) {
                    let _link_gone = link.send(message);
                }
            }
            TargetAction::Reserve { spec } => self.reserve(&spec),
            TargetAction::AcceptLanes { attempt, lanes, .. } => self.sink.accept(attempt, lanes),
            TargetAction::HaltLanes => self.tell(TargetEvent::LanesHalted { lanes: self.sink.halt() }),
            TargetAction::WriteConsole(ConsoleBytes { offset, bytes }) => {
                self.memory.console.fill(&ConsoleText { offset, bytes });
            }
            TargetAction::LoadState { round, state, .. } => self.load(round, state),
            TargetAction::InstallRoute { round } => self.work(
                Work::InstallRoute,
                TargetEvent::RouteInstalled { round },
                Some(TargetOperation::InstallRoute),
            ),
            TargetAction::RemoveRoute => {
                self.context.work(self.config.spec.id, Work::RemoveRoute, Box::new(drop))
            }
            TargetAction::Run { epoch } => self.run_guest(epoch),
            TargetAction::Discard => self.work(Work::Discard, TargetEvent::Discarded, None),
            TargetAction::Close { session } => drop(self.links.remove(&session)),
            TargetAction::SetTimer { at } => self.set_timer(at),
            TargetAction::Fenced { epoch } => self.report(TargetReport::Fenced(epoch)),
            TargetAction::Owns { epoch } => self.report(TargetReport::Owns(epoch)),
            TargetAction::Forgotten => self.report(TargetReport::Forgotten),
            TargetAction::ForgetRefused => self.report(TargetReport::ForgetRefused),
            TargetAction::Done(outcome) => self.report(TargetReport::Ended(outcome)),
        }
    }

    fn tell(&self, event: TargetEvent) {
        let _session_ended = self.local.send(TargetInput::Event(event));
    }

    fn report(&self, report: TargetReport) {
        self.context.report(ShardReport::Target { migration: self.config.migration, report });
    }

    /// Tells the agent, once, that everything is here.
    fn announce_ready(&mut self, standing: Option<&MigrationStanding>) {
        let ready = matches!(standing, Some(MigrationStanding::Ready));
        if ready && !self.said_ready {
            self.report(TargetReport::Ready);
        }
        self.said_ready = ready;
    }

    /// The agent has checked and made everything for the machine that the control plane described; the source must offer that one.
    fn reserve(&self, offered: &MachineSpec) {
        if *offered == self.config.spec {
            return self.tell(TargetEvent::Reserved);
        }
        self.tell(TargetEvent::OperationFailed {
            operation: TargetOperation::Reserve,
            code: RefusalCode::NotExpected,
            detail: format!("the machine offered is not the {} that was announced", self.config.spec.name),
        });
    }

    fn vmm(&self) -> Result<VmmClient, VmmError> {
        let found = self.context.machines.borrow().get(&self.config.spec.id).cloned();
        found.ok_or(VmmError::Gone { waiting_for: "anything", source: None })
    }

    fn load(&mut self, round: u32, state: Vec<u8>) {
        if std::mem::replace(&mut self.state_loaded, true) {
            return self.renew_and_load(round, state);
        }
        self.restore(round, state);
    }

    fn restore(&self, round: u32, state: Vec<u8>) {
        let (vmm, local) = (self.vmm(), self.local.clone());
        glommio::spawn_local(async move {
            let started = now();
            let loaded = async { vmm?.restore(state).await }.await;
            let event = match loaded {
                Ok(()) => TargetEvent::StateLoaded { round, us: now().us_since(started) },
                Err(error) => failed(TargetOperation::LoadState, &error.to_string()),
            };
            let _session_ended = local.send(TargetInput::Event(event));
        })
        .detach();
    }

    /// After a switch-over that failed: a fresh VMM first, which the agent attaches to this shard before it answers. The answer comes
    /// through the session's doorbell, as nothing else may wake a task of this shard.
    fn renew_and_load(&mut self, round: u32, state: Vec<u8>) {
        let outside = self.outside.clone();
        let done = move |outcome: Result<u64, String>| {
            let input = match outcome {
                Ok(_) => Outside::VmmRenewed { round, state },
                Err(detail) => Outside::Event(failed(TargetOperation::LoadState, &detail)),
            };
            let _session_ended = outside.try_send(input);
        };
        self.context.work(self.config.spec.id, Work::RenewVmm, Box::new(done));
    }

    fn run_guest(&self, epoch: Epoch) {
        if let Err(error) = self.claim.run_begins() {
            let detail = format!("cannot write down that the machine runs here: {error}");
            return self.tell(failed(TargetOperation::Run, &detail));
        }
        let (vmm, local) = (self.vmm(), self.local.clone());
        glommio::spawn_local(async move {
            let started = now();
            let event = match async { vmm?.run(epoch).await }.await {
                Ok(()) => TargetEvent::Running { us: now().us_since(started) },
                // Nobody knows whether it ran: the agent ends a VMM that hangs up and tells when it is dead.
                Err(VmmError::Gone { .. } | VmmError::Silent(_)) => return,
                Err(error) => failed(TargetOperation::Run, &error.to_string()),
            };
            let _session_ended = local.send(TargetInput::Event(event));
        })
        .detach();
    }

    /// Has the agent do something. `then` follows when it worked; what did not is `operation` failed, or `then` all the same
    /// where failing is not foreseen.
    fn work(&self, work: Work, then: TargetEvent, operation: Option<TargetOperation>) {
        let outside = self.outside.clone();
        let done = move |outcome: Result<u64, String>| {
            let event = match (outcome, operation) {
                (Err(detail), Some(operation)) => failed(operation, &detail),
                _ => then,
            };
            let _session_ended = outside.try_send(Outside::Event(event));
        };
        self.context.work(self.config.spec.id, work, Box::new(done));
    }

    fn set_timer(&mut self, at: Instant) {
        if let Some(old) = self.timer.take() {
            old.destroy();
        }
        let local = self.local.clone();
        let wait = Duration::from_micros(at.us_since(now()));
        self.timer = Some(TimerActionOnce::do_in(wait, async move {
            let _session_ended = local.send(TargetInput::Event(TargetEvent::Timer));
        }));
    }

    fn close(&mut self) {
        self.links.clear();
        if let Some(timer) = self.timer.take() {
            timer.destroy();
        }
    }
}

fn failed(operation: TargetOperation, detail: &str) -> TargetEvent {
    TargetEvent::OperationFailed { operation, code: RefusalCode::HostError, detail: detail.to_owned() }
}

/// Sends messages until the session closes the connection, then sees that the last one arrives.
async fn write(stream: ControlStream, mut messages: mpsc::UnboundedReceiver<TargetMessage>) {
    let ControlStream { connection, mut send, .. } = stream;
    while let Some(message) = messages.recv().await {
        if stream::send(&mut send, VERSION, &message).await.is_err() {
            return;
        }
    }
    if send.finish().is_ok() {
        let acknowledged = async {
            let _peer_gone = send.acknowledged().await;
            Ok(())
        };
        let _gave_up = glommio::timer::timeout(FAREWELL_LIMIT, acknowledged).await;
    }
    connection.close(0, "session closed");
}
