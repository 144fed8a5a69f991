//! Running it, or dropping it; and what the control plane is told.

use super::{Actions, Result, State, Target, TargetAction, TargetOperation, TargetOutcome};
use crate::fleet::RefusalCode;
use crate::ids::Epoch;
use crate::migration::messages::{Running, TargetMessage};
use crate::units::Instant;

impl Target {
    /// The vCPUs run: the source may let go, and whoever asked meanwhile is told.
    pub(super) fn runs(&mut self, us: u64, out: &mut Actions) {
        let epoch = self.config.epoch;
        let State::Committing { fences, forget } =
            std::mem::replace(&mut self.state, State::Owned { resume_us: us })
        else {
            return;
        };
        self.say_running(out);
        out.extend(fences.iter().map(|_| TargetAction::Owns { epoch }));
        if forget {
            out.push(TargetAction::ForgetRefused);
        }
        self.settle(TargetOutcome::Owned { epoch }, out);
    }

    pub(super) fn say_running(&self, out: &mut Actions) {
        if let State::Owned { resume_us } = self.state {
            let running = Running { epoch: self.config.epoch, restore_us: self.restore_us, resume_us };
            self.send(TargetMessage::Running(running), out);
        }
    }

    fn settle(&mut self, outcome: TargetOutcome, out: &mut Actions) {
        if !std::mem::replace(&mut self.settled, true) {
            out.push(TargetAction::Done(outcome));
        }
    }

    /// The source says that it failed or was cancelled. It does not after a Commit.
    pub(super) fn told_to_drop(&mut self, code: RefusalCode, detail: &str, out: &mut Actions) -> Result {
        match self.state {
            State::Committing { .. } | State::Owned { .. } => Err(self.illegal("Cancel or Abort")),
            State::Discarding { .. } | State::Gone { .. } => Ok(()),
            _ => {
                self.discard(code, detail.to_owned(), out);
                Ok(())
            }
        }
    }

    /// Drops the copy. From here on there is no way to `Run`, so the source may be told at once.
    pub(super) fn discard(&mut self, code: RefusalCode, detail: String, out: &mut Actions) {
        if matches!(self.state, State::Discarding { .. } | State::Gone { .. }) {
            return;
        }
        self.send(TargetMessage::Abort { code, detail: detail.clone() }, out);
        if let Some(session) = self.session.take() {
            out.push(TargetAction::Close { session });
        }
        self.take_route_back(out);
        if matches!(self.state, State::Idle | State::Expecting { .. }) {
            self.state = State::Gone { code, detail: detail.clone() };
            self.settle(TargetOutcome::Dropped { code, detail }, out);
        } else {
            self.state = State::Discarding { code, detail, fences: Vec::new(), forget: false };
            out.push(TargetAction::Discard);
        }
    }

    pub(super) fn discarded(&mut self, out: &mut Actions) {
        let State::Discarding { code, detail, fences, forget } =
            std::mem::replace(&mut self.state, State::Idle)
        else {
            return;
        };
        out.extend(fences.into_iter().map(|epoch| TargetAction::Fenced { epoch }));
        if forget {
            out.push(TargetAction::Forgotten);
        }
        self.state = State::Gone { code, detail: detail.clone() };
        self.settle(TargetOutcome::Dropped { code, detail }, out);
    }

    pub(super) fn forget(&mut self, out: &mut Actions) {
        match &mut self.state {
            State::Owned { .. } => out.push(TargetAction::ForgetRefused),
            State::Committing { forget, .. } | State::Discarding { forget, .. } => *forget = true,
            State::Gone { .. } => out.push(TargetAction::Forgotten),
            _ => {
                self.discard(RefusalCode::Cancelled, "the control plane gave it up".to_owned(), out);
                self.forget(out);
            }
        }
    }

    pub(super) fn fence(&mut self, epoch: Epoch, out: &mut Actions) {
        let concerned = epoch >= self.config.epoch;
        match &mut self.state {
            State::Owned { .. } if concerned => out.push(TargetAction::Owns { epoch: self.config.epoch }),
            State::Committing { fences, .. } | State::Discarding { fences, .. } if concerned => {
                // The control plane repeats itself when it was restarted; one answer is as good as ten.
                if !fences.contains(&epoch) && fences.len() < super::FENCES_MAX {
                    fences.push(epoch);
                }
            }
            State::Gone { .. } => out.push(TargetAction::Fenced { epoch }),
            _ if !concerned => out.push(TargetAction::Fenced { epoch }),
            _ => {
                self.discard(RefusalCode::Stale, format!("fenced up to {epoch}"), out);
                self.fence(epoch, out);
            }
        }
    }

    pub(super) fn guest_ended(&mut self, out: &mut Actions) {
        match self.state {
            // It was asked to run and may have: the machine was ours, and has ended here.
            State::Committing { .. } => self.runs(0, out),
            State::Owned { .. } | State::Discarding { .. } | State::Gone { .. } => {}
            _ => self.discard(RefusalCode::HostError, "the VMM ended".to_owned(), out),
        }
    }

    pub(super) fn operation_failed(
        &mut self,
        operation: TargetOperation,
        code: RefusalCode,
        detail: String,
        out: &mut Actions,
    ) {
        match (&mut self.state, operation) {
            (State::Reserving, TargetOperation::Reserve) => {
                if let Some(session) = self.session.take() {
                    let message = TargetMessage::Refuse { code, detail: detail.clone() };
                    out.push(TargetAction::Send { session, message });
                    out.push(TargetAction::Close { session });
                }
                self.discard(code, detail, out);
            }
            (State::Receiving | State::Finishing(_), TargetOperation::Lanes)
            | (State::Finishing(_), TargetOperation::LoadState | TargetOperation::InstallRoute) => {
                self.discard(code, detail, out);
            }
            // It surely did not run: the source keeps the machine, and the control plane decides.
            (State::Committing { fences, forget }, TargetOperation::Run) => {
                let (asked, was_asked) = (std::mem::take(fences), *forget);
                self.discard(code, detail, out);
                if let State::Discarding { fences, forget, .. } = &mut self.state {
                    *fences = asked;
                    *forget = was_asked;
                }
            }
            _ => {}
        }
    }

    /// Sets the timer for the time until which things are kept for an absent source.
    pub(super) fn watch(&mut self, out: &mut Actions) {
        if self.waits_for_source() {
            out.push(TargetAction::SetTimer { at: self.keep_until });
        }
    }

    fn waits_for_source(&self) -> bool {
        self.session.is_none()
            && matches!(
                self.state,
                State::Reserving
                    | State::Halting
                    | State::Receiving
                    | State::Finishing(_)
                    | State::Ready { .. }
            )
    }

    pub(super) fn timer(&mut self, now: Instant, out: &mut Actions) {
        let until = match self.state {
            State::Expecting { until } => until,
            _ if self.waits_for_source() => self.keep_until,
            _ => return,
        };
        if now < until {
            out.push(TargetAction::SetTimer { at: until });
        } else {
            let detail = format!("{} did not come, or not come back, in time", self.config.source);
            self.discard(RefusalCode::PeerLost, detail, out);
        }
    }
}
