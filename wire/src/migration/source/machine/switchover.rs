//! From the pause to the target's word that it runs.

use super::{Actions, Finishing, Link, Result, SWITCHOVERS_MAX, Source, State, Then};
use crate::fleet::{Outcome, RefusalCode};
use crate::migration::lane::{ready_digest, state_digest};
use crate::migration::messages::{ConsoleBytes, Final, Running, SourceMessage};
use crate::migration::source::SourceAction;
use crate::units::Instant;

impl Source {
    pub(super) fn pause(&mut self, now: Instant, out: &mut Actions) {
        self.switchovers = self.switchovers.saturating_add(1);
        self.state = State::Pausing { since: now };
        out.push(SourceAction::Pause);
        out.push(SourceAction::SetTimer { at: now.plus_us(self.config.limits.switchover_us) });
    }

    /// The guest stands still: the last pages go out on the lanes while the state is saved.
    pub(super) fn paused(&mut self, since: Instant, out: &mut Actions) {
        self.round = self.round.saturating_add(1);
        let round = self.round;
        self.state =
            State::Finishing(Finishing { since, round, state_digest: None, lane_digests: None, ready: None });
        out.push(SourceAction::SendFinal { round });
        let state_version = self.terms.map_or(self.config.state_versions.newest, |terms| terms.state_version);
        out.push(SourceAction::Save { console_from: self.console_end, state_version });
    }

    pub(super) fn saved(&mut self, state: Vec<u8>, console: ConsoleBytes, out: &mut Actions) {
        let State::Finishing(finishing) = &mut self.state else { return };
        if finishing.state_digest.is_some() {
            return;
        }
        self.console_end = self.console_end.max(console.end());
        finishing.state_digest = Some(state_digest(&state));
        let round = finishing.round;
        out.push(SourceAction::Send(SourceMessage::Final(Final { round, state, console })));
    }

    pub(super) fn final_sent(&mut self, now: Instant, lane_digests: Vec<u32>, out: &mut Actions) -> Result {
        if let State::Finishing(finishing) = &mut self.state {
            finishing.lane_digests = Some(lane_digests);
        }
        self.settle(now, out)
    }

    pub(super) fn ready(&mut self, now: Instant, round: u32, digest: u32, out: &mut Actions) -> Result {
        match &mut self.state {
            State::Finishing(f) if f.round == round && f.state_digest.is_some() && f.ready.is_none() => {
                f.ready = Some(digest);
                self.settle(now, out)
            }
            _ => Err(self.broken("Ready", out)),
        }
    }

    /// Once the target is ready and we know what we sent: if it has just that, the machine is given away.
    fn settle(&mut self, now: Instant, out: &mut Actions) -> Result {
        let State::Finishing(Finishing {
            since,
            round,
            state_digest: Some(state),
            lane_digests: Some(lanes),
            ready: Some(theirs),
        }) = &self.state
        else {
            return Ok(());
        };
        if ready_digest(*round, lanes.iter().copied(), *state) != *theirs {
            return Err(self.broken("Ready with another digest", out));
        }
        let since = *since;
        self.timings.final_copy_us = now.us_since(since);
        self.timings.rounds = self.round;
        self.state = State::Disowning { since };
        out.push(SourceAction::Disown { epoch: self.config.to_epoch });
        Ok(())
    }

    /// The VMM will not run the machine again: say so to the target, and send it the packets.
    pub(super) fn disowned(&mut self, now: Instant, since: Instant, out: &mut Actions) {
        self.state = State::InDoubt { since, retry_at: None, dropped: false };
        self.retry_us = self.config.limits.retry_first_us;
        if self.link == Link::Up {
            self.send_commit(out);
        } else {
            self.dial(out);
        }
        out.push(SourceAction::SwitchForward);
        out.push(SourceAction::Progress(self.progress(now)));
    }

    /// The target dropped its copy. It is the control plane that decides what follows.
    pub(super) fn target_dropped(&mut self, out: &mut Actions) {
        if let State::InDoubt { since, dropped, .. } = self.state {
            self.state = State::InDoubt { since, retry_at: None, dropped: true };
            if !dropped {
                out.push(SourceAction::TargetDropped);
            }
            self.hang_up(out);
        }
    }

    /// The target runs the machine.
    pub(super) fn moved(&mut self, now: Instant, since: Instant, running: Running, out: &mut Actions) {
        self.timings.pause_us = now.us_since(since);
        self.timings.restore_us = running.restore_us;
        self.timings.resume_us = running.resume_us;
        self.timings.total_ms = now.us_since(self.started) / 1000;
        self.remaining_pages = 0;
        self.state = State::Releasing;
        if self.link == Link::Up {
            out.push(SourceAction::Send(SourceMessage::Finished));
        }
        out.push(SourceAction::Release);
        out.push(SourceAction::Progress(self.progress(now)));
    }

    /// The link failed within the pause, or the target is too slow: the guest goes on at once, and the migration after it.
    pub(super) fn roll_back(&mut self, out: &mut Actions) {
        let then = if self.switchovers < SWITCHOVERS_MAX {
            Then::Relink
        } else {
            let detail = format!("the switch-over to {} failed {SWITCHOVERS_MAX} times", self.config.target);
            Then::End(Outcome::Failed { code: RefusalCode::PeerLost, detail })
        };
        out.push(SourceAction::ResumeGuest { epoch: self.config.epoch });
        self.hang_up(out);
        self.state = State::Resuming(then);
    }
}
