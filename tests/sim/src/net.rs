//! The network between the two hosts: ordered streams within a session, any order between streams and sessions.

use wire::ids::MigrationId;
use wire::migration::messages::{SourceMessage, TargetMessage};

use crate::world::{Event, World};

/// Lanes that a session may have in the model.
pub const LANES: usize = 4;

/// One connection of the source to the target.
#[derive(Debug, Clone)]
pub struct Session {
    /// Whose.
    pub migration: MigrationId,
    /// Which attempt.
    pub attempt: u32,
    /// Each end's view.
    pub source_open: bool,
    /// Each end's view.
    pub target_open: bool,
    /// Nothing more passes.
    pub cut_forth: bool,
    /// Nothing more passes.
    pub cut_back: bool,
    /// Whether it carries nothing but a copy of an older message.
    pub replayed: bool,
    /// When the last thing sent on each stream arrives: control forth, control back, lanes.
    last: [u64; 2 + LANES],
}

impl Session {
    /// A connection just made.
    pub const fn new(migration: MigrationId, attempt: u32) -> Self {
        Self {
            migration,
            attempt,
            source_open: true,
            target_open: true,
            cut_forth: false,
            cut_back: false,
            replayed: false,
            last: [0; 2 + LANES],
        }
    }
}

const FORTH: usize = 0;
const BACK: usize = 1;

impl World {
    /// A one-way trip, in microseconds.
    fn trip_us(&mut self) -> u64 {
        if self.options.slow_messages && self.rng.chance(2) {
            self.rng.between(5_000, 60_000)
        } else {
            self.rng.between(30, 600)
        }
    }

    fn arrival(&mut self, session: usize, stream: usize) -> u64 {
        let at = self.now + self.trip_us();
        let last = &mut self.sessions[session].last[stream];
        *last = at.max(*last + 1);
        *last
    }

    /// Sends on the control stream.
    pub fn send_forth(&mut self, session: usize, message: SourceMessage) {
        if !self.sessions[session].source_open {
            return;
        }
        if self.options.duplicates && message.opens().is_some() && self.rng.chance(10) {
            let at = self.now + self.rng.between(100, 200_000);
            self.at(at, Event::Replay { message: Box::new(message.clone()) });
        }
        let at = self.arrival(session, FORTH);
        self.at(at, Event::ToTarget { session, message: Box::new(message) });
    }

    /// Sends on the control stream.
    pub fn send_back(&mut self, session: usize, message: TargetMessage) {
        if self.sessions.get(session).is_some_and(|s| s.target_open) {
            let at = self.arrival(session, BACK);
            self.at(at, Event::ToSource { session, message: Box::new(message) });
        }
    }

    /// Sends on a lane; returns when the transport has taken it.
    pub fn send_lane(&mut self, session: usize, lane: usize, record: crate::target::LaneFrame) {
        if self.sessions[session].source_open {
            let at = self.arrival(session, 2 + lane);
            self.at(at, Event::ToLane { session, lane, record });
        }
    }

    /// The source closes a session: the target learns of it after what was sent.
    pub fn close_from_source(&mut self, session: usize) {
        if std::mem::replace(&mut self.sessions[session].source_open, false) {
            let after = self.sessions[session].last.iter().copied().max().unwrap_or(0).max(self.now);
            let at = after + self.rng.between(1, 20_000);
            self.at(at, Event::TargetLost { session });
        }
    }

    /// The target closes a session.
    pub fn close_from_target(&mut self, session: usize) {
        let Some(known) = self.sessions.get_mut(session) else { return };
        if std::mem::replace(&mut known.target_open, false) {
            let at = known.last[BACK].max(self.now) + self.rng.between(1, 20_000);
            self.at(at, Event::SourceLost { session });
        }
    }

    /// The link breaks for a while, in one direction or in both; each end notices in its own time.
    pub fn cut_link(&mut self) {
        let which = self.rng.below(3);
        self.down_until = self.now + self.rng.between(100, 100_000);
        for index in 0..self.sessions.len() {
            let session = &mut self.sessions[index];
            if !session.source_open && !session.target_open {
                continue;
            }
            session.cut_forth |= which != 1;
            session.cut_back |= which != 0;
            let (a, b) = (self.rng.between(10, 60_000), self.rng.between(10, 60_000));
            self.at(self.now + a, Event::SourceLost { session: index });
            self.at(self.now + b, Event::TargetLost { session: index });
        }
    }
}
