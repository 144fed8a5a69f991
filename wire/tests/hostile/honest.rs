//! What an honest peer and an honest host would do next, given what a machine asked for.

use std::collections::VecDeque;

use super::input::{MIGRATION, TO_EPOCH, offer};
use wire::migration::lane::{ready_digest, state_digest};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, Final, LanePoint, Resume, Running, SourceMessage, TargetMessage, VERSION,
};
use wire::migration::source::{Sent, SourceAction, SourceEvent};
use wire::migration::target::{TargetAction, TargetEvent};

/// Events that are waiting; more than this are forgotten, so that no input makes it grow.
const WAITING_MAX: usize = 32;

/// For the target: its source and its host.
pub struct HonestSource {
    waiting: VecDeque<TargetEvent>,
    attempt: u32,
    round: u32,
}

impl HonestSource {
    pub fn new() -> Self {
        Self { waiting: VecDeque::from([TargetEvent::Start]), attempt: 0, round: 0 }
    }

    /// What comes next; a new connection when nothing is left to do.
    pub fn next(&mut self) -> Option<TargetEvent> {
        self.waiting.pop_front().or_else(|| {
            self.attempt += 1;
            let message = SourceMessage::Offer(Box::new(offer(self.attempt)));
            Some(TargetEvent::Message { session: u64::from(self.attempt), message })
        })
    }

    fn message(&self, message: SourceMessage) -> TargetEvent {
        TargetEvent::Message { session: u64::from(self.attempt), message }
    }

    fn round_done(&mut self, lane: u16) -> TargetEvent {
        TargetEvent::LaneRoundDone { lane, round: self.round, digest: 0 }
    }

    pub fn saw(&mut self, actions: &[TargetAction]) {
        for action in actions {
            let more = match action {
                TargetAction::Reserve { .. } => vec![TargetEvent::Reserved],
                TargetAction::HaltLanes => {
                    vec![TargetEvent::LanesHalted { lanes: vec![LanePoint::default(); 2] }]
                }
                TargetAction::LoadState { round, .. } => {
                    vec![TargetEvent::StateLoaded { round: *round, us: 1 }]
                }
                TargetAction::InstallRoute { round } => vec![TargetEvent::RouteInstalled { round: *round }],
                TargetAction::Run { .. } => vec![TargetEvent::Running { us: 1 }],
                TargetAction::Discard => vec![TargetEvent::Discarded],
                TargetAction::Send { message: TargetMessage::Accept(_), .. } => {
                    self.round += 1;
                    let mut events = vec![self.round_done(0), self.round_done(1)];
                    self.round += 1;
                    let (round, console) = (self.round, ConsoleBytes::default());
                    events.push(self.message(SourceMessage::Final(Final { round, state: vec![], console })));
                    events.extend([self.round_done(0), self.round_done(1)]);
                    events
                }
                TargetAction::Send { message: TargetMessage::Ready { .. }, .. } => {
                    let commit = Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt: self.attempt };
                    vec![self.message(SourceMessage::Commit(commit))]
                }
                _ => vec![],
            };
            self.waiting.extend(more);
            self.waiting.truncate(WAITING_MAX);
        }
    }
}

/// For the source: its target and its host.
pub struct HonestTarget {
    waiting: VecDeque<SourceEvent>,
    round: u32,
}

impl HonestTarget {
    pub fn new() -> Self {
        Self { waiting: VecDeque::from([SourceEvent::Start]), round: 0 }
    }

    pub fn next(&mut self) -> Option<SourceEvent> {
        self.waiting.pop_front()
    }

    pub fn saw(&mut self, attempt: u32, actions: &[SourceAction]) {
        for action in actions {
            let says = |message| SourceEvent::Message { attempt, message };
            let more = match action {
                SourceAction::Connect { attempt } => vec![SourceEvent::Connected { attempt: *attempt }],
                SourceAction::Send(SourceMessage::Offer(_)) => {
                    let lanes = vec![LanePoint::default(); 2];
                    let resume = (attempt > 1).then_some(Resume { round: 0, lanes, console_end: 0 });
                    let accept = Accept { version: VERSION, state_version: 1, attempt, lanes: 2, resume };
                    vec![says(TargetMessage::Accept(accept))]
                }
                SourceAction::StartDirtyLog => vec![SourceEvent::DirtyLogStarted],
                &SourceAction::SendRound { round } => {
                    let sent = Sent { round, pages: 9, zero_pages: 1, bytes: 40_000, us: 50 };
                    vec![SourceEvent::RoundSent(sent), says(TargetMessage::RoundReceived { round })]
                }
                &SourceAction::CountDirty { round } => vec![SourceEvent::Dirty { round, pages: 3 }],
                SourceAction::Pause => {
                    vec![SourceEvent::Paused { stop_us: 1, harvest_us: 1, dirty_pages: 3 }]
                }
                &SourceAction::SendFinal { round } => {
                    self.round = round;
                    let sent = Sent { round, ..Sent::default() };
                    vec![SourceEvent::FinalSent { sent, lane_digests: vec![5, 6] }]
                }
                SourceAction::Save { .. } => {
                    vec![SourceEvent::Saved { state: vec![1], console: ConsoleBytes::default(), us: 1 }]
                }
                SourceAction::Send(SourceMessage::Final(last)) => {
                    let digest = ready_digest(self.round, [5, 6], state_digest(&last.state));
                    vec![says(TargetMessage::Ready { round: self.round, digest })]
                }
                SourceAction::Disown { .. } => vec![SourceEvent::Disowned],
                SourceAction::Send(SourceMessage::Commit(_)) => {
                    let running = Running { epoch: TO_EPOCH, restore_us: 1, resume_us: 1 };
                    vec![says(TargetMessage::Running(running))]
                }
                SourceAction::ResumeGuest { .. } => vec![SourceEvent::Resumed],
                SourceAction::Reclaim { .. } => vec![SourceEvent::Reclaimed],
                SourceAction::Release => vec![SourceEvent::Released],
                _ => vec![],
            };
            self.waiting.extend(more);
            self.waiting.truncate(WAITING_MAX);
        }
    }
}
