//! From the offer to `Ready`, and back again when the link breaks.

use super::{
    Actions, Finishing, LanePoint, LaneStanding, Offer, Result, State, Target, TargetAction, TargetMessage,
    Terms,
};
use crate::fleet::RefusalCode;
use crate::migration::lane::{ready_digest, state_digest};
use crate::migration::messages::{Accept, Final, LANES_MAX, Resume, negotiate};
use crate::units::Instant;

impl Target {
    /// Makes `session` the source's connection and ends another one.
    pub(super) fn attach(&mut self, session: u64, out: &mut Actions) {
        if let Some(old) = self.session.replace(session)
            && old != session
        {
            out.push(TargetAction::Close { session: old });
        }
    }

    pub(super) fn send(&self, message: TargetMessage, out: &mut Actions) {
        if let Some(session) = self.session {
            out.push(TargetAction::Send { session, message });
        }
    }

    /// An offer: the first one, or the source has reconnected (and owns the machine, or it would not offer it).
    pub(super) fn offer(&mut self, _now: Instant, session: u64, offer: &Offer, out: &mut Actions) -> Result {
        match self.terms_of(offer) {
            Err((code, detail)) => {
                out.push(TargetAction::Send { session, message: TargetMessage::Refuse { code, detail } });
                out.push(TargetAction::Close { session });
                Ok(())
            }
            Ok(terms) => match &self.state {
                State::Expecting { .. } => {
                    self.attach(session, out);
                    self.terms = Some(terms);
                    self.state = State::Reserving;
                    out.push(TargetAction::Reserve { spec: Box::new(offer.spec.clone()) });
                    Ok(())
                }
                State::Reserving => {
                    self.attach(session, out);
                    self.terms = Some(terms);
                    Ok(())
                }
                State::Halting | State::Receiving | State::Finishing(_) | State::Ready { .. } => {
                    self.attach(session, out);
                    self.terms = Some(terms);
                    self.take_route_back(out);
                    if self.state != State::Halting {
                        self.state = State::Halting;
                        out.push(TargetAction::HaltLanes);
                    }
                    Ok(())
                }
                _ => {
                    let illegal = self.illegal("Offer");
                    let code = RefusalCode::NotExpected;
                    let detail = illegal.to_string();
                    out.push(TargetAction::Send { session, message: TargetMessage::Refuse { code, detail } });
                    out.push(TargetAction::Close { session });
                    Err(illegal)
                }
            },
        }
    }

    /// What we would agree to, or why not.
    fn terms_of(&self, offer: &Offer) -> std::result::Result<Terms, (RefusalCode, String)> {
        let config = &self.config;
        let no = |code, detail: &str| Err((code, detail.to_owned()));
        if offer.migration != config.migration || offer.source != config.source {
            return no(RefusalCode::NotExpected, "another migration or another source was announced");
        }
        if let Some(before) = self.terms
            && offer.attempt <= before.attempt
        {
            return no(RefusalCode::Stale, "a later connection of this migration is known");
        }
        if self.terms.is_some_and(|before| before.incarnation != offer.incarnation) {
            return no(
                RefusalCode::Stale,
                "the source was restarted since its first offer: begin a new migration",
            );
        }
        if offer.to_epoch != config.epoch || offer.epoch >= offer.to_epoch {
            return no(RefusalCode::Stale, "the epochs are not those that were announced");
        }
        let (spec, ours) = (&offer.spec, &config.spec);
        if spec.id != ours.id || spec.space() != ours.space() || spec.vcpus != ours.vcpus {
            return no(RefusalCode::NotExpected, "the machine is not the one that was announced");
        }
        let Some(version) = negotiate(config.versions, offer.versions) else {
            return Err((RefusalCode::Version, no_common("protocol", config.versions, offer.versions)));
        };
        let Some(state_version) = negotiate(config.state_versions, offer.state_versions) else {
            let detail = no_common("state archive", config.state_versions, offer.state_versions);
            return Err((RefusalCode::Version, detail));
        };
        // Agreed once, the number stays; a source that never heard our answer may offer more again.
        let lanes = match u16::try_from(self.lanes.len()).unwrap_or(LANES_MAX) {
            0 => offer.lanes.clamp(1, config.lanes_max.clamp(1, LANES_MAX)),
            agreed if offer.lanes < agreed => {
                return no(RefusalCode::Protocol, "the number of lanes changed with the connection");
            }
            agreed => agreed,
        };
        Ok(Terms { attempt: offer.attempt, incarnation: offer.incarnation, version, state_version, lanes })
    }

    /// All is prepared: says so, and reads the lanes.
    pub(super) fn accept(&mut self, resume: Option<Resume>, out: &mut Actions) {
        let Some(Terms { attempt, version, state_version, lanes, .. }) = self.terms else { return };
        self.state = State::Receiving;
        if self.lanes.is_empty() {
            self.lanes = vec![LaneStanding::default(); usize::from(lanes)];
        }
        if self.session.is_some() {
            out.push(TargetAction::AcceptLanes { attempt, lanes, version });
        }
        let accept = Accept { version, state_version, attempt, lanes, resume };
        self.send(TargetMessage::Accept(accept), out);
    }

    /// Nothing of the old connection reaches memory any more: tells what is there.
    pub(super) fn halted(&mut self, mut lanes: Vec<LanePoint>, out: &mut Actions) {
        // Lanes that were never opened got nowhere.
        lanes.resize(self.lanes.len(), LanePoint::default());
        let resume = Resume { round: self.received, lanes, console_end: self.console_end };
        self.accept(Some(resume), out);
    }

    pub(super) fn lane_round_done(
        &mut self,
        lane: u16,
        round: u32,
        digest: u32,
        out: &mut Actions,
    ) -> Result {
        let last = match &self.state {
            State::Finishing(f) => f.round,
            _ => u32::MAX,
        };
        let Some(standing) = self.lanes.get_mut(usize::from(lane)) else {
            return Err(self.broken("LaneRoundDone of an unknown lane", out));
        };
        if round <= standing.round || round > last {
            return Err(self.broken("LaneRoundDone", out));
        }
        *standing = LaneStanding { round, digest };
        let received = self.lanes.iter().map(|lane| lane.round).min().unwrap_or(0);
        if received > self.received {
            self.received = received;
            self.send(TargetMessage::RoundReceived { round: received }, out);
        }
        self.ready_if_complete(out);
        Ok(())
    }

    /// The machine has stopped on the source: loads its state and takes over its addresses while the last pages come.
    pub(super) fn finishing(&mut self, last: Final, out: &mut Actions) -> Result {
        if self.lanes.iter().any(|lane| lane.round > last.round)
            || last.round <= self.received.saturating_sub(1)
        {
            return Err(self.broken("Final of a round that is over", out));
        }
        let state_version = self.terms.map_or(0, |terms| terms.state_version);
        self.console_end = self.console_end.max(last.console.end());
        if !last.console.bytes.is_empty() {
            out.push(TargetAction::WriteConsole(last.console));
        }
        let state_digest = state_digest(&last.state);
        out.push(TargetAction::LoadState { round: last.round, state: last.state, state_version });
        out.push(TargetAction::InstallRoute { round: last.round });
        self.route = true;
        self.state =
            State::Finishing(Finishing { round: last.round, state_digest, loaded: false, routed: false });
        self.ready_if_complete(out);
        Ok(())
    }

    pub(super) fn ready_if_complete(&mut self, out: &mut Actions) {
        let State::Finishing(Finishing { round, state_digest, loaded: true, routed: true }) = &self.state
        else {
            return;
        };
        let round = *round;
        if self.session.is_none() || self.lanes.iter().any(|lane| lane.round != round) {
            return;
        }
        let digest = ready_digest(round, self.lanes.iter().map(|lane| lane.digest), *state_digest);
        self.state = State::Ready { round, digest };
        self.send(TargetMessage::Ready { round, digest }, out);
    }

    pub(super) fn take_route_back(&mut self, out: &mut Actions) {
        if std::mem::take(&mut self.route) {
            out.push(TargetAction::RemoveRoute);
        }
    }
}

fn no_common(
    what: &str,
    ours: crate::migration::messages::VersionRange,
    theirs: crate::migration::messages::VersionRange,
) -> String {
    format!(
        "no common {what} version: here {} to {}, offered {} to {}",
        ours.oldest, ours.newest, theirs.oldest, theirs.newest
    )
}
