//! The transition function; the diagram is in the parent module.

mod ending;
mod receiving;

use super::api::{TargetAction, TargetConfig, TargetEvent, TargetOperation, TargetOutcome};
use crate::fleet::{MigrationStanding, RefusalCode};
use crate::ids::Epoch;
use crate::migration::messages::{
    Commit, ConsoleBytes, LanePoint, Offer, SourceMessage, TargetMessage, clip,
};
use crate::units::Instant;
use crate::vmm::CONSOLE_RING_BYTES;

/// Fences remembered while their answer is not known; the control plane sends one at a time.
const FENCES_MAX: usize = 4;

/// An event that the state does not allow: the peer broke the protocol, or our host did. The machine has already dealt with it; this is
/// for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event} is not allowed in state {state}")]
pub struct Illegal {
    /// The state.
    pub state: &'static str,
    /// The event or message.
    pub event: &'static str,
}

type Result = std::result::Result<(), Illegal>;
type Actions = Vec<TargetAction>;

/// Where a lane stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LaneStanding {
    round: u32,
    digest: u32,
}

/// The offer that is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Terms {
    attempt: u32,
    incarnation: u64,
    version: u16,
    state_version: u16,
    lanes: u16,
}

/// A machine whose state has come.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finishing {
    round: u32,
    state_digest: u32,
    loaded: bool,
    routed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Idle,
    Expecting { until: Instant },
    Reserving,
    Halting,
    Receiving,
    Finishing(Finishing),
    Ready { round: u32, digest: u32 },
    Committing { fences: Vec<Epoch>, forget: bool },
    Owned { resume_us: u64 },
    Discarding { code: RefusalCode, detail: String, fences: Vec<Epoch>, forget: bool },
    Gone { code: RefusalCode, detail: String },
}

impl State {
    const fn name(&self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Expecting { .. } => "Expecting",
            Self::Reserving => "Reserving",
            Self::Halting => "Halting",
            Self::Receiving => "Receiving",
            Self::Finishing(_) => "Finishing",
            Self::Ready { .. } => "Ready",
            Self::Committing { .. } => "Committing",
            Self::Owned { .. } => "Owned",
            Self::Discarding { .. } => "Discarding",
            Self::Gone { .. } => "Gone",
        }
    }
}

/// The target of one migration. See the parent module.
#[derive(Debug, Clone)]
pub struct Target {
    config: TargetConfig,
    state: State,
    /// The source's connection, if it is there.
    session: Option<u64>,
    /// When what is kept for an absent source is dropped; meaningful while `session` is `None`.
    keep_until: Instant,
    terms: Option<Terms>,
    lanes: Vec<LaneStanding>,
    received: u32,
    console_end: u64,
    restore_us: u64,
    /// Whether a route was asked for that was not taken back since.
    route: bool,
    settled: bool,
}

impl Target {
    /// A migration that the control plane has announced.
    pub fn new(config: TargetConfig) -> Self {
        Self {
            config,
            state: State::Idle,
            session: None,
            keep_until: Instant::default(),
            terms: None,
            lanes: Vec::new(),
            received: 0,
            console_end: 0,
            restore_us: 0,
            route: false,
            settled: false,
        }
    }

    /// A migration whose host was restarted after its VMM had begun to run under `config.epoch`. (An incoming VMM that does not run is
    /// discarded by a restarted host; for it there is no machine.)
    pub fn recover(config: TargetConfig) -> Self {
        let mut target = Self::new(config);
        target.state = State::Owned { resume_us: 0 };
        target.settled = true;
        target
    }

    /// Takes one event at time `now` and appends what is to be done to `out`: at most [`super::ACTIONS_MAX`] actions.
    ///
    /// # Errors
    /// [`Illegal`] when the event does not belong here; the actions then drop the copy, unless the machine is owned here.
    pub fn handle(&mut self, now: Instant, event: TargetEvent, out: &mut Actions) -> Result {
        match event {
            TargetEvent::Start => self.start(now, out),
            TargetEvent::Message { session, message } => self.message(now, session, message, out),
            TargetEvent::LinkLost { session } => {
                if self.session == Some(session) {
                    self.session = None;
                    self.keep_until = now.plus_us(self.config.limits.keep_us);
                    self.watch(out);
                }
                Ok(())
            }
            TargetEvent::Forget => {
                self.forget(out);
                Ok(())
            }
            TargetEvent::Fence { epoch } => {
                self.fence(epoch, out);
                Ok(())
            }
            TargetEvent::GuestEnded => {
                self.guest_ended(out);
                Ok(())
            }
            TargetEvent::OperationFailed { operation, code, detail } => {
                self.operation_failed(operation, code, detail, out);
                Ok(())
            }
            TargetEvent::Timer => {
                self.timer(now, out);
                Ok(())
            }
            answer => self.answer(answer, out),
        }
    }

    /// Where it stands, for the control plane; `None` once nothing of it is here.
    pub fn standing(&self) -> Option<MigrationStanding> {
        Some(match self.state {
            State::Idle
            | State::Expecting { .. }
            | State::Reserving
            | State::Halting
            | State::Receiving
            | State::Finishing(_) => MigrationStanding::Receiving,
            State::Ready { .. } | State::Committing { .. } => MigrationStanding::Ready,
            State::Owned { .. } => MigrationStanding::Owns { epoch: self.config.epoch },
            State::Discarding { .. } | State::Gone { .. } => return None,
        })
    }

    /// Whether the machine is this host's.
    pub const fn owns(&self) -> bool {
        matches!(self.state, State::Owned { .. })
    }

    /// The state's name, for logs.
    pub const fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn start(&mut self, now: Instant, out: &mut Actions) -> Result {
        match self.state {
            State::Idle => {
                let until = now.plus_us(self.config.limits.expect_us);
                self.state = State::Expecting { until };
                out.push(TargetAction::SetTimer { at: until });
            }
            State::Owned { .. } => {}
            _ => return Err(self.illegal("Start")),
        }
        Ok(())
    }

    /// A message of the source. One that opens a connection makes it the connection of this migration and ends the one before.
    fn message(&mut self, now: Instant, session: u64, message: SourceMessage, out: &mut Actions) -> Result {
        match message {
            SourceMessage::Offer(offer) => self.offer(now, session, &offer, out),
            SourceMessage::Commit(commit) => self.commit(session, commit, out),
            // Of a connection that is not this migration's any more.
            _ if self.session != Some(session) => Ok(()),
            SourceMessage::Cancel => {
                self.told_to_drop(RefusalCode::Cancelled, "cancelled by the source", out)
            }
            SourceMessage::Abort { code, detail } => self.told_to_drop(code, &clip(detail), out),
            SourceMessage::Console(console) => match self.state {
                State::Receiving if fits_ring(&console) => {
                    self.console_end = self.console_end.max(console.end());
                    out.push(TargetAction::WriteConsole(console));
                    Ok(())
                }
                State::Discarding { .. } | State::Gone { .. } => Ok(()),
                _ => Err(self.broken("Console", out)),
            },
            SourceMessage::Final(last) => match self.state {
                State::Receiving if fits_ring(&last.console) => self.finishing(last, out),
                State::Discarding { .. } | State::Gone { .. } => Ok(()),
                _ => Err(self.broken("Final", out)),
            },
            SourceMessage::Finished => match self.state {
                State::Owned { .. } => {
                    self.session = None;
                    out.push(TargetAction::Close { session });
                    Ok(())
                }
                State::Discarding { .. } | State::Gone { .. } => Ok(()),
                _ => Err(self.broken("Finished", out)),
            },
        }
    }

    /// The machine is ours, if all of it is here and this is the connection it came on or a later one.
    fn commit(&mut self, session: u64, commit: Commit, out: &mut Actions) -> Result {
        let ours = commit.migration == self.config.migration && commit.epoch == self.config.epoch;
        let newest = self.terms.is_none_or(|terms| commit.attempt >= terms.attempt);
        if ours && newest {
            if let Some(terms) = &mut self.terms {
                terms.attempt = commit.attempt;
            }
            if !matches!(self.state, State::Discarding { .. } | State::Gone { .. }) {
                self.attach(session, out);
            }
        }
        match &self.state {
            State::Ready { .. } if ours && newest => {
                self.state = State::Committing { fences: Vec::new(), forget: false };
                out.push(TargetAction::Run { epoch: self.config.epoch });
            }
            // Repeated, perhaps on a connection that is not the newest: the answer to the newest is the one that counts.
            State::Committing { .. } if ours => {}
            State::Owned { .. } if ours => self.say_running(out),
            State::Discarding { code, detail, .. } | State::Gone { code, detail } => {
                let message = TargetMessage::Abort { code: *code, detail: detail.clone() };
                out.push(TargetAction::Send { session, message });
                out.push(TargetAction::Close { session });
            }
            // This host was restarted, or announced the migration anew, and has lost what the source committed.
            State::Idle | State::Expecting { .. } if ours => {
                self.discard(RefusalCode::NotExpected, "no copy of this migration is here".to_owned(), out);
            }
            _ => return Err(self.broken("Commit", out)),
        }
        Ok(())
    }

    /// Takes the answer to an action. One that no longer fits is of an action given up since.
    fn answer(&mut self, event: TargetEvent, out: &mut Actions) -> Result {
        match (&mut self.state, event) {
            (State::Reserving, TargetEvent::Reserved) => self.accept(None, out),
            (State::Halting, TargetEvent::LanesHalted { lanes }) => self.halted(lanes, out),
            (
                State::Receiving | State::Finishing(_) | State::Halting,
                TargetEvent::LaneRoundDone { lane, round, digest },
            ) => return self.lane_round_done(lane, round, digest, out),
            (State::Finishing(f), TargetEvent::StateLoaded { round, us }) if f.round == round => {
                f.loaded = true;
                self.restore_us = us;
                self.ready_if_complete(out);
            }
            (State::Finishing(f), TargetEvent::RouteInstalled { round }) if f.round == round => {
                f.routed = true;
                self.ready_if_complete(out);
            }
            (State::Committing { .. }, TargetEvent::Running { us }) => self.runs(us, out),
            // The VMM's end was known before its answer was.
            (State::Owned { .. }, TargetEvent::Running { .. }) => {}
            (_, TargetEvent::Running { .. }) => return Err(self.illegal("Running")),
            (State::Discarding { .. }, TargetEvent::Discarded) => self.discarded(out),
            _ => {}
        }
        Ok(())
    }

    fn illegal(&self, event: &'static str) -> Illegal {
        Illegal { state: self.state.name(), event }
    }

    /// The source broke the protocol: the copy is worth nothing, unless it is the machine.
    fn broken(&mut self, event: &'static str, out: &mut Actions) -> Illegal {
        let illegal = self.illegal(event);
        if !matches!(self.state, State::Committing { .. } | State::Owned { .. }) {
            self.discard(RefusalCode::Protocol, illegal.to_string(), out);
        }
        illegal
    }
}

/// Whether the console can hold what came; no honest source sends more.
fn fits_ring(console: &ConsoleBytes) -> bool {
    console.bytes.len() as u64 <= CONSOLE_RING_BYTES
        && console.offset.checked_add(CONSOLE_RING_BYTES).is_some()
}
