//! Cancel, failure, reclaim: every way out but success.

use super::{Actions, DirtyLog, Link, Source, State, Then};
use crate::fleet::{Outcome, RefusalCode};
use crate::ids::Epoch;
use crate::migration::messages::SourceMessage;
use crate::migration::source::{SourceAction, SourceOperation};
use crate::units::Instant;

impl Source {
    pub(super) fn cancel(&mut self, _now: Instant, out: &mut Actions) {
        match self.state {
            State::Disowning { .. }
            | State::InDoubt { .. }
            | State::Reclaiming { .. }
            | State::Releasing
            | State::Ended => out.push(SourceAction::CancelRefused),
            _ => self.end(Outcome::Cancelled, Some(SourceMessage::Cancel), out),
        }
    }

    /// Ends the migration with the machine owned here: tells the target, hangs up, and has the guest run if it does not.
    pub(super) fn end(&mut self, outcome: Outcome, farewell: Option<SourceMessage>, out: &mut Actions) {
        let paused =
            matches!(self.state, State::Pausing { .. } | State::Finishing(_) | State::Disowning { .. });
        if self.link == Link::Up
            && let Some(farewell) = farewell
        {
            out.push(SourceAction::Send(farewell));
        }
        if paused {
            out.push(SourceAction::ResumeGuest { epoch: self.config.epoch });
        }
        self.hang_up(out);
        if paused || matches!(self.state, State::Resuming(_)) {
            self.state = State::Resuming(Then::End(outcome));
        } else {
            self.finish(outcome, out);
        }
    }

    /// The guest runs here: nothing is left to do but to say so.
    pub(super) fn finish(&mut self, outcome: Outcome, out: &mut Actions) {
        if self.dirty_log != DirtyLog::Off && !self.vmm_gone {
            out.push(SourceAction::StopDirtyLog);
        }
        self.done(outcome, out);
    }

    pub(super) fn done(&mut self, outcome: Outcome, out: &mut Actions) {
        self.state = State::Ended;
        out.push(SourceAction::Done(outcome));
    }

    pub(super) fn guest_ended(&mut self, now: Instant, out: &mut Actions) {
        self.vmm_gone = true;
        let detail = "the guest ended while it was moved".to_owned();
        match self.state {
            // The target has all of it and the VMM that might still have run it is dead: that is as good as its word.
            State::Disowning { since } => self.disowned(now, since, out),
            // Not ours to run any more; a reclaim will be refused.
            State::InDoubt { .. } | State::Releasing | State::Ended => {}
            _ => {
                if self.link == Link::Up {
                    let farewell =
                        SourceMessage::Abort { code: RefusalCode::GuestEnded, detail: detail.clone() };
                    out.push(SourceAction::Send(farewell));
                }
                self.hang_up(out);
                self.done(Outcome::Failed { code: RefusalCode::GuestEnded, detail }, out);
            }
        }
    }

    pub(super) fn reclaim(&mut self, epoch: Epoch, out: &mut Actions) {
        let refuse = |code| SourceAction::ReclaimRefused { code };
        match self.state {
            State::Reclaiming { epoch: under_way, .. } if under_way == epoch => {}
            State::InDoubt { .. } if self.vmm_gone => out.push(refuse(RefusalCode::GuestEnded)),
            State::InDoubt { .. } if epoch <= self.config.to_epoch => out.push(refuse(RefusalCode::Stale)),
            State::InDoubt { since, .. } => {
                self.hang_up(out);
                self.state = State::Reclaiming { since, epoch };
                out.push(SourceAction::Reclaim { epoch });
            }
            _ => out.push(refuse(RefusalCode::WrongState)),
        }
    }

    pub(super) fn reclaimed(&mut self, out: &mut Actions) {
        let detail = format!("{} did not take the machine; it was reclaimed", self.config.target);
        self.finish(Outcome::Failed { code: RefusalCode::PeerLost, detail }, out);
    }

    /// An action failed on this host. One that was given up before is of no interest.
    pub(super) fn operation_failed(
        &mut self,
        _now: Instant,
        operation: SourceOperation,
        detail: String,
        out: &mut Actions,
    ) {
        use SourceOperation as Op;
        let code = RefusalCode::HostError;
        match (&self.state, operation) {
            (State::StartingLog, Op::StartDirtyLog)
            | (State::Sending | State::Counting | State::Draining | State::Finishing(_), Op::Send)
            | (State::Pausing { .. }, Op::Pause)
            | (State::Finishing(_), Op::Save)
            | (State::Disowning { .. }, Op::Disown) => {
                let farewell = SourceMessage::Abort { code, detail: detail.clone() };
                self.end(Outcome::Failed { code, detail }, Some(farewell), out);
            }
            (State::Resuming(_), Op::ResumeGuest) => self.done(Outcome::Failed { code, detail }, out),
            // Fenced off from the target but not running here yet: the control plane asks again.
            (&State::Reclaiming { since, .. }, Op::Reclaim) => {
                self.state = State::InDoubt { since, retry_at: None, dropped: true };
                out.push(SourceAction::ReclaimRefused { code });
            }
            _ => {
                if operation == Op::StartDirtyLog && self.dirty_log == DirtyLog::Starting {
                    self.dirty_log = DirtyLog::Off;
                }
            }
        }
    }
}
