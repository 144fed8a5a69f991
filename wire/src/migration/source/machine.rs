//! The transition function; the diagram is in the parent module.

mod ending;
mod linking;
mod switchover;

use super::api::{Sent, SourceAction, SourceConfig, SourceEvent};
use crate::fleet::{MigrationPhase, Outcome, Progress, RefusalCode, Timings};
use crate::ids::Epoch;
use crate::migration::convergence::{Convergence, Decision, Forecast};
use crate::migration::messages::{Running, SourceMessage, TargetMessage, clip};
use crate::units::{Instant, PAGE_BYTES};

/// Switch-overs that may fail for want of a link before the migration does: each costs the guest a pause.
const SWITCHOVERS_MAX: u32 = 3;

/// An event that the state does not allow: the peer broke the protocol, or our host did. The machine has already dealt with it (an
/// abort, as far as the state allows one); this is for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event} is not allowed in state {state}")]
pub struct Illegal {
    /// The state.
    pub state: &'static str,
    /// The event or message.
    pub event: &'static str,
}

type Result = std::result::Result<(), Illegal>;
type Actions = Vec<SourceAction>;

/// The connection of the newest attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    Dialling,
    Up,
}

/// What is known of dirty logging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DirtyLog {
    Off,
    Starting,
    On,
}

/// A switch-over under way.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finishing {
    since: Instant,
    round: u32,
    /// What is known so far; the machine is given away when all three are there and agree.
    state_digest: Option<u32>,
    lane_digests: Option<Vec<u32>>,
    ready: Option<u32>,
}

/// What follows once the guest runs again.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Then {
    Relink,
    End(Outcome),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Idle,
    Linking { deadline: Instant, retry_at: Option<Instant> },
    StartingLog,
    Sending,
    Counting,
    Draining,
    Pausing { since: Instant },
    Finishing(Finishing),
    Disowning { since: Instant },
    InDoubt { since: Instant, retry_at: Option<Instant>, dropped: bool },
    Resuming(Then),
    Reclaiming { since: Instant, epoch: Epoch },
    Releasing,
    Ended,
}

impl State {
    const fn name(&self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Linking { .. } => "Linking",
            Self::StartingLog => "StartingLog",
            Self::Sending => "Sending",
            Self::Counting => "Counting",
            Self::Draining => "Draining",
            Self::Pausing { .. } => "Pausing",
            Self::Finishing(_) => "Finishing",
            Self::Disowning { .. } => "Disowning",
            Self::InDoubt { .. } => "InDoubt",
            Self::Resuming(_) => "Resuming",
            Self::Reclaiming { .. } => "Reclaiming",
            Self::Releasing => "Releasing",
            Self::Ended => "Ended",
        }
    }
}

/// What the target agreed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Terms {
    state_version: u16,
    lanes: u16,
}

/// The source of one migration. See the parent module.
#[derive(Debug, Clone)]
pub struct Source {
    config: SourceConfig,
    state: State,
    link: Link,
    attempt: u32,
    retry_us: u64,
    dirty_log: DirtyLog,
    terms: Option<Terms>,
    /// The last round begun, and the last that the target confirmed.
    round: u32,
    received: u32,
    console_end: u64,
    convergence: Convergence,
    stalled: bool,
    switchovers: u32,
    vmm_gone: bool,
    started: Instant,
    timings: Timings,
    remaining_pages: u64,
}

impl Source {
    /// A migration that has not begun: the guest runs here.
    pub fn new(config: SourceConfig) -> Self {
        let convergence = Convergence::new(config.policy);
        Self {
            remaining_pages: config.spec.ram.pages(),
            retry_us: config.limits.retry_first_us,
            config,
            convergence,
            state: State::Idle,
            link: Link::Down,
            attempt: 0,
            dirty_log: DirtyLog::Off,
            terms: None,
            round: 0,
            received: 0,
            console_end: 0,
            stalled: false,
            switchovers: 0,
            vmm_gone: false,
            started: Instant::default(),
            timings: Timings::default(),
        }
    }

    /// A migration whose host crashed after the VMM had recorded the disowning ([`crate::vmm::Disowned`]). `Commit` may or may not have left; it is repeated.
    /// `attempt` must be above every one used before: a restarted host that does not know takes its boot time in seconds.
    pub fn recover(config: SourceConfig, attempt: u32) -> Self {
        let mut source = Self::new(config);
        source.attempt = attempt;
        source.state = State::InDoubt { since: Instant::default(), retry_at: None, dropped: false };
        source
    }

    /// Takes one event at time `now` and appends what is to be done to `out`: at most [`super::ACTIONS_MAX`] actions.
    ///
    /// # Errors
    /// [`Illegal`] when the event does not belong here; the actions then end the migration as far as the state allows.
    pub fn handle(&mut self, now: Instant, event: SourceEvent, out: &mut Actions) -> Result {
        match event {
            SourceEvent::Start => self.start(now, out),
            SourceEvent::Connected { attempt } if attempt == self.attempt => self.connected(now, out),
            SourceEvent::LinkLost { attempt } if attempt == self.attempt => {
                self.link_lost(now, out);
                Ok(())
            }
            SourceEvent::Message { attempt, message } if attempt == self.attempt && self.link == Link::Up => {
                self.message(now, message, out)
            }
            // Of a connection given up before: all that it could say is moot.
            SourceEvent::Connected { .. } | SourceEvent::LinkLost { .. } | SourceEvent::Message { .. } => {
                Ok(())
            }
            SourceEvent::Cancel => {
                self.cancel(now, out);
                Ok(())
            }
            SourceEvent::Reclaim { epoch } => {
                self.reclaim(epoch, out);
                Ok(())
            }
            SourceEvent::TargetOwns { epoch } => {
                let owned = Running { epoch, restore_us: 0, resume_us: 0 };
                match self.state {
                    State::InDoubt { since, .. } if epoch == self.config.to_epoch => {
                        self.moved(now, since, owned, out)
                    }
                    _ => return Err(self.illegal("TargetOwns")),
                }
                Ok(())
            }
            SourceEvent::GuestEnded => {
                self.guest_ended(now, out);
                Ok(())
            }
            SourceEvent::OperationFailed { operation, detail } => {
                self.operation_failed(now, operation, detail, out);
                Ok(())
            }
            SourceEvent::Timer => {
                self.timer(now, out);
                Ok(())
            }
            answer => self.answer(now, answer, out),
        }
    }

    /// How far it is. Within a round, `remaining_bytes` and `sent_bytes` are as of its beginning; a host that counts overlays its own.
    pub fn progress(&self, now: Instant) -> Progress {
        let Forecast { downtime_us, eta_us, dirty_pages_per_s, bytes_per_s } = self.convergence.forecast();
        Progress {
            migration: self.config.migration,
            phase: self.phase(),
            round: self.round,
            ram_bytes: self.config.spec.ram.bytes(),
            sent_bytes: self.timings.sent_bytes,
            remaining_bytes: self.remaining_pages.saturating_mul(PAGE_BYTES),
            dirty_pages_per_s,
            bytes_per_s,
            predicted_downtime_us: downtime_us,
            eta_ms: eta_us / 1000,
            elapsed_ms: now.us_since(self.started) / 1000,
        }
    }

    /// Whether rounds go on although they no longer shrink, because the hard cap forbids the pause.
    pub const fn stalled(&self) -> bool {
        self.stalled
    }

    /// Whether the machine was given away and nothing is known of what became of it.
    pub const fn in_doubt(&self) -> bool {
        matches!(self.state, State::InDoubt { .. } | State::Reclaiming { .. })
    }

    /// Whether [`SourceAction::Done`] was given.
    pub const fn ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// The last attempt to connect.
    pub const fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The state's name, for logs.
    pub const fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn phase(&self) -> MigrationPhase {
        match &self.state {
            State::Idle => MigrationPhase::Connecting,
            State::Linking { .. } | State::Resuming(Then::Relink) => match self.terms {
                None => MigrationPhase::Connecting,
                Some(_) => MigrationPhase::Reconnecting,
            },
            State::StartingLog | State::Sending | State::Counting | State::Draining => {
                MigrationPhase::Precopy
            }
            State::Pausing { .. } | State::Finishing(_) | State::Disowning { .. } | State::Resuming(_) => {
                MigrationPhase::Switchover
            }
            State::InDoubt { .. } | State::Reclaiming { .. } => MigrationPhase::InDoubt,
            State::Releasing | State::Ended => MigrationPhase::Completing,
        }
    }

    fn start(&mut self, now: Instant, out: &mut Actions) -> Result {
        match self.state {
            State::Idle => self.relink(now, out),
            State::InDoubt { dropped, .. } if self.link == Link::Down => {
                self.state = State::InDoubt { since: now, retry_at: None, dropped };
                self.dial(out);
            }
            _ => return Err(self.illegal("Start")),
        }
        self.started = now;
        out.push(SourceAction::Progress(self.progress(now)));
        Ok(())
    }

    /// Takes a message of the connection that is up.
    fn message(&mut self, now: Instant, message: TargetMessage, out: &mut Actions) -> Result {
        match (&self.state, message) {
            // The end is near or past, and the host is told already.
            (
                State::Idle | State::Resuming(_) | State::Reclaiming { .. } | State::Releasing | State::Ended,
                _,
            ) => Ok(()),
            (State::Linking { .. }, TargetMessage::Accept(accept)) => self.accepted(now, &accept, out),
            (State::Linking { .. }, TargetMessage::Refuse { code, detail }) => {
                self.end(Outcome::Failed { code, detail: clip(detail) }, None, out);
                Ok(())
            }
            (State::InDoubt { .. }, TargetMessage::Abort { .. }) => {
                self.target_dropped(out);
                Ok(())
            }
            (State::InDoubt { since, .. }, TargetMessage::Running(running))
                if running.epoch == self.config.to_epoch =>
            {
                self.moved(now, *since, running, out);
                Ok(())
            }
            // The VMM may have recorded the disowning already: once that is known, the target's answer to Commit tells the same again.
            (State::Disowning { .. }, TargetMessage::Abort { .. }) => Ok(()),
            (_, TargetMessage::Abort { code, detail }) => {
                self.end(Outcome::Failed { code, detail: clip(detail) }, None, out);
                Ok(())
            }
            (
                State::Sending
                | State::Counting
                | State::Draining
                | State::Pausing { .. }
                | State::Finishing(_),
                TargetMessage::RoundReceived { round },
            ) if round > self.received && round <= self.round => {
                self.round_received(round, out);
                Ok(())
            }
            (State::Finishing(_), TargetMessage::Ready { round, digest }) => {
                self.ready(now, round, digest, out)
            }
            (_, message) => Err(self.broken(message_name(&message), out)),
        }
    }

    /// Takes the answer to an action. One that no longer fits is of an action given up since.
    fn answer(&mut self, now: Instant, event: SourceEvent, out: &mut Actions) -> Result {
        match (&self.state, event) {
            (state, SourceEvent::DirtyLogStarted) => {
                let waited_for = matches!(state, State::StartingLog);
                if self.dirty_log == DirtyLog::Starting {
                    self.dirty_log = DirtyLog::On;
                    if waited_for {
                        self.next_round(out);
                    }
                }
            }
            (State::Sending, SourceEvent::RoundSent(sent)) if sent.round == self.round => {
                self.count_sent(&sent);
                self.convergence.round_sent(sent.bytes, sent.us);
                self.state = State::Counting;
                out.push(SourceAction::CountDirty { round: self.round });
            }
            (State::Counting, SourceEvent::Dirty { round, pages }) if round == self.round => {
                self.decide(now, pages, out);
            }
            (
                State::StartingLog | State::Sending | State::Counting | State::Draining,
                SourceEvent::ConsoleRead(console),
            ) => {
                self.console_end = self.console_end.max(console.end());
                if !console.bytes.is_empty() {
                    out.push(SourceAction::Send(SourceMessage::Console(console)));
                }
            }
            (State::Pausing { since }, SourceEvent::Paused { stop_us, harvest_us, dirty_pages }) => {
                self.timings.stop_us = stop_us;
                self.timings.harvest_us = harvest_us;
                self.timings.final_pages = dirty_pages;
                self.paused(*since, out);
            }
            (State::Finishing(_), SourceEvent::FinalSent { sent, lane_digests })
                if sent.round == self.round =>
            {
                self.count_sent(&sent);
                return self.final_sent(now, lane_digests, out);
            }
            (State::Finishing(_), SourceEvent::Saved { state, console, us }) => {
                self.timings.save_us = us;
                self.saved(state, console, out);
            }
            (State::Disowning { since }, SourceEvent::Disowned) => self.disowned(now, *since, out),
            // The VMM's end was known before its answer was.
            (State::InDoubt { .. }, SourceEvent::Disowned) => {}
            (_, SourceEvent::Disowned) => return Err(self.illegal("Disowned")),
            (State::Resuming(_), SourceEvent::Resumed) => self.resumed(now, out),
            (State::Reclaiming { .. }, SourceEvent::Reclaimed) => self.reclaimed(out),
            (_, SourceEvent::Reclaimed) => return Err(self.illegal("Reclaimed")),
            (State::Releasing, SourceEvent::Released) => {
                out.push(SourceAction::Disconnect { attempt: self.attempt });
                self.done(Outcome::Succeeded(self.timings.clone()), out);
            }
            _ => {}
        }
        Ok(())
    }

    fn next_round(&mut self, out: &mut Actions) {
        self.round = self.round.saturating_add(1);
        self.state = State::Sending;
        out.push(SourceAction::SendRound { round: self.round });
    }

    fn round_received(&mut self, round: u32, out: &mut Actions) {
        self.received = round;
        out.push(SourceAction::Confirm { round });
        if self.state == State::Draining && round == self.round {
            self.state = State::Counting;
            out.push(SourceAction::CountDirty { round });
        }
    }

    /// After a round: another one, or the switch-over. The lanes run empty first, because what is still in them
    /// would be sent within the pause.
    fn decide(&mut self, now: Instant, dirty_pages: u64, out: &mut Actions) {
        self.remaining_pages = dirty_pages;
        let decision = self.convergence.decide(self.round, dirty_pages);
        self.stalled = decision == Decision::Stalled;
        match decision {
            Decision::NextRound | Decision::Stalled => {
                out.push(SourceAction::ReadConsole { from: self.console_end });
                self.next_round(out);
            }
            Decision::Switchover if self.received < self.round => self.state = State::Draining,
            Decision::Switchover => self.pause(now, out),
        }
        out.push(SourceAction::Progress(self.progress(now)));
    }

    fn count_sent(&mut self, sent: &Sent) {
        self.timings.sent_bytes = self.timings.sent_bytes.saturating_add(sent.bytes);
        self.timings.pages_sent = self.timings.pages_sent.saturating_add(sent.pages);
        self.timings.pages_zero = self.timings.pages_zero.saturating_add(sent.zero_pages);
    }

    fn illegal(&self, event: &'static str) -> Illegal {
        Illegal { state: self.state.name(), event }
    }

    /// The target broke the protocol. While the machine is owned here the migration ends; after that only the connection does, and the doubt
    /// stays as it is.
    fn broken(&mut self, event: &'static str, out: &mut Actions) -> Illegal {
        let illegal = self.illegal(event);
        match &mut self.state {
            State::InDoubt { .. } | State::Disowning { .. } => {}
            _ => {
                let detail = illegal.to_string();
                let farewell = SourceMessage::Abort { code: RefusalCode::Protocol, detail: detail.clone() };
                self.end(Outcome::Failed { code: RefusalCode::Protocol, detail }, Some(farewell), out);
            }
        }
        illegal
    }
}

const fn message_name(message: &TargetMessage) -> &'static str {
    match message {
        TargetMessage::Accept(_) => "Accept",
        TargetMessage::Refuse { .. } => "Refuse",
        TargetMessage::RoundReceived { .. } => "RoundReceived",
        TargetMessage::Ready { .. } => "Ready",
        TargetMessage::Running(_) => "Running",
        TargetMessage::Abort { .. } => "Abort",
    }
}
