//! The session that moves a machine out: carries out what [`wire::migration::source::Source`] asks for.
//!
//! One task owns the protocol machine. It takes one input at a time (from its own helpers, the lanes, the agent), hands the event to
//! the machine and starts what the actions ask for. Whatever takes time runs as a task of its own and comes back as an event.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use glommio::Task;
use glommio::timer::TimerActionOnce;
use tokio::sync::mpsc;
use wire::ids::{Epoch, HostName};
use wire::migration::messages::{ConsoleBytes, Resume, SourceMessage, TargetMessage, VERSION};
use wire::migration::source::{Source, SourceAction, SourceConfig, SourceEvent, SourceOperation};
use wire::pages::Lane;
use wire::units::Instant;
use wire::vmm::{CONSOLE_RING_BYTES, Disowned};

use super::in_flight::InFlight;
use super::rounds::{LANE_COMMANDS_MAX, Lanes, RoundError, RoundTotals};
use super::source_lane::{LaneCommand, LaneNews, LaneReport, SourceLaneJob};
use crate::doorbell::{Doorbell, Ringer, doorbell};
use crate::memory::MachineMemory;
use crate::quic::{Connection, QuicError};
use crate::shard::stream::{self, StreamError};
use crate::shard::{ShardContext, ShardOrder, ShardReport, SourceReport, Work, now};
use crate::vm::VmmError;
use crate::vm::client::VmmClient;

/// Inputs that may wait for a session: lanes have at most [`LANE_COMMANDS_MAX`] reports outstanding each, the agent a few.
pub const INPUTS_MAX: usize = 2048;
/// Longest wait for the target's acknowledgement of what was last said before a connection is closed.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// A machine to move.
pub struct SourceJob {
    /// What and where to.
    pub config: SourceConfig,
    /// The target's shards, the session's first.
    pub addresses: Vec<SocketAddr>,
    /// Its memory.
    pub memory: Arc<MachineMemory>,
    /// Most bytes a second before the pause, over all lanes; 0 for no limit.
    pub bytes_per_s_max: u64,
    /// Where the session is reached, both ends: the agent keeps a ringer.
    pub inputs: Doorbell<SourceInput>,
    /// The other end of `inputs`, for lanes and answers of the agent.
    pub session: Ringer<SourceInput>,
}

/// What a session is told.
#[derive(Debug)]
pub enum SourceInput {
    /// An event for the protocol machine.
    Event(SourceEvent),
    /// From a lane.
    Lane(LaneReport),
}

/// Starts the session on this shard, which must be the machine's home.
pub fn start(context: &Rc<ShardContext>, job: SourceJob) {
    let migration = job.config.migration;
    let Some(vmm) = context.machines.borrow().get(&job.config.spec.id).cloned() else {
        let outcome = wire::fleet::Outcome::Failed {
            code: wire::fleet::RefusalCode::WrongState,
            detail: "the machine's VMM is gone".to_owned(),
        };
        let report = SourceReport::Ended(outcome);
        return context.report(ShardReport::Source { migration, report });
    };
    glommio::spawn_local(run(context.clone(), vmm, job)).detach();
}

async fn run(context: Rc<ShardContext>, vmm: VmmClient, job: SourceJob) {
    let (local, mut inputs) = mpsc::unbounded_channel();
    let forward = local.clone();
    let mut outside = job.inputs.attach();
    let bridge = glommio::spawn_local(async move {
        while let Some(input) = outside.recv().await {
            let _session_ended = forward.send(input);
        }
    });
    let mut machine = Source::new(job.config.clone());
    let mut session = Session {
        context,
        vmm,
        config: job.config,
        addresses: job.addresses,
        memory: job.memory,
        bytes_per_s_max: job.bytes_per_s_max,
        outside: job.session,
        local,
        in_flight: InFlight::new(),
        link: None,
        lanes: None,
        lane_reports: None,
        sending: None,
        timer: None,
        ended: false,
    };
    let mut actions = Vec::with_capacity(wire::migration::source::ACTIONS_MAX);
    let mut next = Some(SourceInput::Event(SourceEvent::Start));
    while let Some(input) = next {
        if let Some(event) = session.event_of(input) {
            if let Err(illegal) = machine.handle(now(), event, &mut actions) {
                tracing::warn!(migration = %session.config.migration, %illegal, "protocol");
            }
            actions.drain(..).for_each(|action| session.apply(action));
        }
        next = if session.ended { None } else { inputs.recv().await };
    }
    session.disconnect().await;
    bridge.cancel().await;
}

struct Session {
    context: Rc<ShardContext>,
    vmm: VmmClient,
    config: SourceConfig,
    addresses: Vec<SocketAddr>,
    memory: Arc<MachineMemory>,
    bytes_per_s_max: u64,
    outside: Ringer<SourceInput>,
    local: mpsc::UnboundedSender<SourceInput>,
    in_flight: InFlight,
    link: Option<Link>,
    /// The lanes, while no round uses them.
    lanes: Option<Rc<glommio::sync::RwLock<Lanes>>>,
    lane_reports: Option<mpsc::UnboundedSender<LaneReport>>,
    sending: Option<Task<()>>,
    timer: Option<TimerActionOnce<()>>,
    ended: bool,
}

/// The newest attempt's connection.
struct Link {
    attempt: u32,
    /// Dialling, reading: cancelled with the link.
    task: Option<Task<()>>,
    /// What the writer is still to send; ends with the link.
    outgoing: mpsc::UnboundedSender<SourceMessage>,
}

impl Session {
    /// What an input means to the protocol machine, if anything.
    fn event_of(&mut self, input: SourceInput) -> Option<SourceEvent> {
        match input {
            SourceInput::Event(event) => Some(event),
            SourceInput::Lane(LaneReport { attempt, news: LaneNews::Lost(why), .. }) => {
                tracing::debug!(migration = %self.config.migration, attempt, why, "lane lost");
                Some(SourceEvent::LinkLost { attempt })
            }
            SourceInput::Lane(report) => {
                let current = self.link.as_ref().is_some_and(|link| link.attempt == report.attempt);
                if let Some(reports) = self.lane_reports.as_ref().filter(|_| current) {
                    let _round_over = reports.send(report);
                }
                None
            }
        }
    }

    fn apply(&mut self, action: SourceAction) {
        match action {
            SourceAction::Connect { attempt } => self.connect(attempt),
            SourceAction::Disconnect { attempt } => self.drop_link(attempt),
            SourceAction::Send(message) => self.send(message),
            SourceAction::OpenLanes { attempt, lanes, version } => self.open_lanes(attempt, lanes, version),
            SourceAction::StartDirtyLog => {
                self.in_flight.clear();
                let vmm = self.vmm.clone();
                self.ask(SourceOperation::StartDirtyLog, async move {
                    vmm.dirty_log(true).await.map(|()| SourceEvent::DirtyLogStarted)
                });
            }
            SourceAction::StopDirtyLog => self.stop_dirty_log(),
            SourceAction::GiveBackDirty { received } => self.give_back(&received),
            SourceAction::Confirm { round } => self.in_flight.confirm(round),
            SourceAction::SendRound { round } => self.send_pages(round, true),
            SourceAction::SendFinal { round } => self.send_pages(round, false),
            SourceAction::CountDirty { round } => {
                let vmm = self.vmm.clone();
                self.ask(SourceOperation::Send, async move {
                    vmm.dirty_sync().await.map(|pages| SourceEvent::Dirty { round, pages })
                });
            }
            SourceAction::ReadConsole { from } => self.tell(SourceEvent::ConsoleRead(self.console(from))),
            SourceAction::Pause => {
                let vmm = self.vmm.clone();
                self.ask(SourceOperation::Pause, async move {
                    let pause = vmm.pause(true).await?;
                    let (stop_us, harvest_us, dirty_pages) =
                        (pause.stop_us, pause.harvest_us, pause.dirty_pages);
                    Ok(SourceEvent::Paused { stop_us, harvest_us, dirty_pages })
                });
            }
            SourceAction::Save { console_from, .. } => self.save(console_from),
            SourceAction::Disown { epoch } => self.disown(epoch),
            SourceAction::SwitchForward => {
                self.work(Work::Forward { migration: self.config.migration }, None)
            }
            SourceAction::ResumeGuest { epoch } => {
                let vmm = self.vmm.clone();
                self.ask(SourceOperation::ResumeGuest, async move {
                    vmm.run(epoch).await.map(|()| SourceEvent::Resumed)
                });
            }
            SourceAction::Reclaim { epoch } => self.reclaim(epoch),
            SourceAction::Release => self.work(Work::Release, Some(SourceEvent::Released)),
            SourceAction::Progress(progress) => self.report(SourceReport::Progress(progress)),
            SourceAction::SetTimer { at } => self.set_timer(at),
            SourceAction::TargetDropped => {
                tracing::info!(migration = %self.config.migration, "the target has dropped its copy");
            }
            SourceAction::CancelRefused => self.report(SourceReport::CancelRefused),
            SourceAction::ReclaimRefused { code } => self.report(SourceReport::ReclaimRefused(code)),
            SourceAction::Done(outcome) => {
                self.ended = true;
                self.report(SourceReport::Ended(outcome));
            }
        }
    }

    fn tell(&self, event: SourceEvent) {
        let _session_ended = self.local.send(SourceInput::Event(event));
    }

    fn report(&self, report: SourceReport) {
        self.context.report(ShardReport::Source { migration: self.config.migration, report });
    }

    /// Runs a request to the VMM; its failure is the failure of `operation`.
    fn ask(
        &self,
        operation: SourceOperation,
        request: impl Future<Output = Result<SourceEvent, VmmError>> + 'static,
    ) {
        let local = self.local.clone();
        glommio::spawn_local(async move {
            let event = match request.await {
                Ok(event) => event,
                // The agent ends a VMM that hangs up, and tells when it is dead; until then nobody knows what it does.
                Err(VmmError::Gone { .. } | VmmError::Silent(_)) if operation == SourceOperation::Disown => {
                    return;
                }
                Err(error) => SourceEvent::OperationFailed { operation, detail: error.to_string() },
            };
            let _session_ended = local.send(SourceInput::Event(event));
        })
        .detach();
    }

    /// Has the agent do something; `then` follows when it worked. What the agent cannot do is logged there.
    fn work(&self, work: Work, then: Option<SourceEvent>) {
        let outside = self.outside.clone();
        let done = move |outcome: Result<u64, String>| {
            // What is to be released and is gone already is released.
            if let Some(event) = then.filter(|_| outcome.is_ok() || work == Work::Release) {
                let _session_ended = outside.try_send(SourceInput::Event(event));
            }
        };
        self.context.work(self.config.spec.id, work, Box::new(done));
    }

    fn connect(&mut self, attempt: u32) {
        let (outgoing, messages) = mpsc::unbounded_channel();
        let (context, local) = (self.context.clone(), self.local.clone());
        let (address, target) = (self.addresses.first().copied(), self.config.target.clone());
        let task = glommio::spawn_local(async move {
            if let Err(error) = converse(&context, address, &target, attempt, messages, &local).await {
                tracing::debug!(%target, attempt, %error, "control stream ended");
            }
            let _session_ended = local.send(SourceInput::Event(SourceEvent::LinkLost { attempt }));
        });
        self.link = Some(Link { attempt, task: Some(task), outgoing });
    }

    fn send(&self, message: SourceMessage) {
        if let Some(link) = &self.link {
            let _link_gone = link.outgoing.send(message);
        }
    }

    /// Ends an attempt. Its lanes take no bit from here on; its control stream ends when what was said is sent.
    fn drop_link(&mut self, attempt: u32) {
        if self.link.as_ref().is_none_or(|link| link.attempt != attempt) {
            return;
        }
        self.in_flight.halt();
        self.lanes = None;
        self.lane_reports = None;
        if let Some(sending) = self.sending.take() {
            glommio::spawn_local(async move { sending.cancel().await }).detach();
        }
        if let Some(mut link) = self.link.take()
            && let Some(task) = link.task.take()
        {
            // Dropping `outgoing` lets the writer finish; the limit is for a peer that no longer answers.
            drop(link);
            glommio::spawn_local(async move {
                let finished = async {
                    task.await;
                    Ok(())
                };
                let _gave_up = glommio::timer::timeout(FAREWELL_LIMIT, finished).await;
            })
            .detach();
        }
    }

    async fn disconnect(&mut self) {
        if let Some(attempt) = self.link.as_ref().map(|link| link.attempt) {
            self.drop_link(attempt);
        }
        if let Some(timer) = self.timer.take() {
            timer.destroy();
        }
    }

    fn open_lanes(&mut self, attempt: u32, lanes: u16, version: u16) {
        self.in_flight.begin(attempt, lanes);
        let (reports_in, reports) = mpsc::unbounded_channel();
        let Ok(peer) = pki::PeerIdentity::new(pki::Kind::Host, self.config.target.as_str()) else {
            return self.tell(SourceEvent::LinkLost { attempt });
        };
        let mut commands = Vec::with_capacity(usize::from(lanes));
        for lane in 0..lanes {
            let index = usize::from(lane);
            let Some((ringer, job)) = self.lane_job(attempt, lane, lanes, version, &peer) else {
                return self.tell(SourceEvent::LinkLost { attempt });
            };
            let shard = self.context.shards.at(self.context.seat.index + index);
            if shard.try_send(ShardOrder::SourceLane(Box::new(job))).is_err() {
                return self.tell(SourceEvent::LinkLost { attempt });
            }
            commands.push(ringer);
        }
        self.lane_reports = Some(reports_in);
        self.lanes = Some(Rc::new(glommio::sync::RwLock::new(Lanes::new(commands, reports))));
    }

    fn lane_job(
        &self,
        attempt: u32,
        lane: u16,
        lanes: u16,
        version: u16,
        peer: &pki::PeerIdentity,
    ) -> Option<(Ringer<LaneCommand>, SourceLaneJob)> {
        let (ringer, commands) = doorbell(LANE_COMMANDS_MAX).ok()?;
        let address = *self.addresses.get(usize::from(lane) % self.addresses.len().max(1))?;
        let job = SourceLaneJob {
            migration: self.config.migration,
            attempt,
            lane: Lane(lane),
            lanes,
            version,
            address,
            peer: peer.clone(),
            memory: self.memory.clone(),
            bytes_per_s_max: self.bytes_per_s_max.div_ceil(u64::from(lanes.max(1))),
            in_flight: self.in_flight.clone(),
            commands,
            session: self.outside.clone(),
        };
        Some((ringer, job))
    }

    /// Sends a round: with `precopy` from the dirty log, range by range; else what the pause has put into the bitmap.
    fn send_pages(&mut self, round: u32, precopy: bool) {
        let Some(lanes) = self.lanes.clone() else { return };
        let (vmm, local) = (self.vmm.clone(), self.local.clone());
        let chunks = self.memory.space.chunks();
        self.sending = Some(glommio::spawn_local(async move {
            let Ok(mut lanes) = lanes.write().await else { return };
            let sent = if precopy {
                lanes.send_round(&vmm, chunks, round).await
            } else {
                lanes.send_final(chunks, round).await
            };
            let event = match sent {
                Ok(RoundTotals { sent, .. }) if precopy => SourceEvent::RoundSent(sent),
                Ok(RoundTotals { sent, digests }) => SourceEvent::FinalSent { sent, lane_digests: digests },
                // The lane has said itself that it is lost.
                Err(RoundError::Lane) => return,
                Err(RoundError::Vmm(error)) => SourceEvent::OperationFailed {
                    operation: SourceOperation::Send,
                    detail: error.to_string(),
                },
            };
            let _session_ended = local.send(SourceInput::Event(event));
        }));
    }

    fn give_back(&self, received: &Resume) {
        self.in_flight.give_back(received, self.memory.space.pages(), &self.memory.dirty);
    }

    fn stop_dirty_log(&self) {
        self.in_flight.halt();
        self.in_flight.clear();
        let vmm = self.vmm.clone();
        glommio::spawn_local(async move {
            if let Err(error) = vmm.dirty_log(false).await {
                tracing::warn!(%error, "cannot switch dirty logging off");
            }
        })
        .detach();
    }

    fn console(&self, from: u64) -> ConsoleBytes {
        let text = self.memory.console.read(from, CONSOLE_RING_BYTES);
        ConsoleBytes { offset: text.offset, bytes: text.bytes }
    }

    fn save(&self, console_from: u64) {
        let (vmm, memory) = (self.vmm.clone(), self.memory.clone());
        self.ask(SourceOperation::Save, async move {
            let started = now();
            let state = vmm.save().await?;
            let us = now().us_since(started);
            let text = memory.console.read(console_from, CONSOLE_RING_BYTES);
            Ok(SourceEvent::Saved {
                state,
                console: ConsoleBytes { offset: text.offset, bytes: text.bytes },
                us,
            })
        });
    }

    fn disown(&self, epoch: Epoch) {
        let (vmm, context) = (self.vmm.clone(), self.context.clone());
        let (migration, target) = (self.config.migration, self.config.target.clone());
        self.ask(SourceOperation::Disown, async move {
            vmm.disown(Disowned { epoch, migration, target }).await?;
            context.report(ShardReport::Source { migration, report: SourceReport::GivenAway });
            Ok(SourceEvent::Disowned)
        });
    }

    /// Takes the machine back: recorded by the VMM, routed here, running.
    fn reclaim(&self, epoch: Epoch) {
        self.work(Work::Unforward, None);
        let (vmm, context, migration) = (self.vmm.clone(), self.context.clone(), self.config.migration);
        self.ask(SourceOperation::Reclaim, async move {
            vmm.reclaim(epoch).await?;
            vmm.run(epoch).await?;
            context.report(ShardReport::Source { migration, report: SourceReport::Reclaimed(epoch) });
            Ok(SourceEvent::Reclaimed)
        });
    }

    fn set_timer(&mut self, at: Instant) {
        if let Some(old) = self.timer.take() {
            old.destroy();
        }
        let local = self.local.clone();
        let wait = Duration::from_micros(at.us_since(now()));
        self.timer = Some(TimerActionOnce::do_in(wait, async move {
            let _session_ended = local.send(SourceInput::Event(SourceEvent::Timer));
        }));
    }
}

/// Dials, opens the control stream, and carries messages in both directions until either side ends it.
async fn converse(
    context: &ShardContext,
    address: Option<SocketAddr>,
    target: &HostName,
    attempt: u32,
    mut outgoing: mpsc::UnboundedReceiver<SourceMessage>,
    local: &mpsc::UnboundedSender<SourceInput>,
) -> Result<(), StreamError> {
    let peer = pki::PeerIdentity::new(pki::Kind::Host, target.as_str());
    let (Some(address), Ok(peer)) = (address, peer) else { return Ok(()) };
    let connection: Connection = context.endpoint.connect(address, &peer).await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let _session_ended = local.send(SourceInput::Event(SourceEvent::Connected { attempt }));
    let reading = async {
        while let Some(message) = stream::receive::<TargetMessage>(&mut receive).await? {
            let _session_ended = local.send(SourceInput::Event(SourceEvent::Message { attempt, message }));
        }
        Ok::<(), StreamError>(())
    };
    let writing = async {
        while let Some(message) = outgoing.recv().await {
            stream::send(&mut send, VERSION, &message).await?;
        }
        send.finish()?;
        match send.acknowledged().await {
            Ok(()) | Err(QuicError::Lost(_)) => Ok::<(), StreamError>(()),
            Err(error) => Err(error.into()),
        }
    };
    futures_util::pin_mut!(reading, writing);
    let outcome = match futures_util::future::select(reading, writing).await {
        futures_util::future::Either::Left((result, _))
        | futures_util::future::Either::Right((result, _)) => result,
    };
    connection.close(0, "control stream ended");
    outcome
}
