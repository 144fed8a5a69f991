//! Dialling, offering, and dialling again.

use super::{Actions, DirtyLog, Link, Result, Source, State, Terms, Then};
use crate::fleet::{Outcome, RefusalCode};
use crate::migration::messages::{Accept, Commit, LANES_MAX, LanePoint, Offer, Resume, SourceMessage};
use crate::migration::source::SourceAction;
use crate::units::Instant;

impl Source {
    /// Begins to look for the target, with the guest running.
    pub(super) fn relink(&mut self, now: Instant, out: &mut Actions) {
        let deadline = now.plus_us(self.config.limits.unreachable_us);
        self.retry_us = self.config.limits.retry_first_us;
        self.state = State::Linking { deadline, retry_at: None };
        self.dial(out);
        out.push(SourceAction::SetTimer { at: deadline });
    }

    pub(super) fn dial(&mut self, out: &mut Actions) {
        self.attempt = self.attempt.saturating_add(1);
        self.link = Link::Dialling;
        out.push(SourceAction::Connect { attempt: self.attempt });
    }

    pub(super) fn connected(&mut self, now: Instant, out: &mut Actions) -> Result {
        match self.link {
            Link::Dialling => {}
            // It was given up while it was being made.
            Link::Down => {
                out.push(SourceAction::Disconnect { attempt: self.attempt });
                return Ok(());
            }
            Link::Up => return Err(self.illegal("Connected")),
        }
        self.link = Link::Up;
        match self.state {
            State::Linking { .. } => {
                let offer = self.offer();
                out.push(SourceAction::Send(SourceMessage::Offer(Box::new(offer))));
            }
            State::InDoubt { .. } => {
                self.retry_us = self.config.limits.retry_first_us;
                self.send_commit(out);
            }
            _ => {
                self.link = Link::Down;
                out.push(SourceAction::Disconnect { attempt: self.attempt });
            }
        }
        out.push(SourceAction::Progress(self.progress(now)));
        Ok(())
    }

    fn offer(&self) -> Offer {
        Offer {
            versions: self.config.versions,
            state_versions: self.config.state_versions,
            migration: self.config.migration,
            attempt: self.attempt,
            incarnation: self.config.incarnation,
            spec: self.config.spec.clone(),
            epoch: self.config.epoch,
            to_epoch: self.config.to_epoch,
            lanes: self.terms.map_or(self.config.lanes, |terms| terms.lanes).clamp(1, LANES_MAX),
            source: self.config.source.clone(),
            downtime_budget_us: self.config.policy.downtime_budget_us,
        }
    }

    pub(super) fn send_commit(&self, out: &mut Actions) {
        out.push(SourceAction::Send(SourceMessage::Commit(Commit {
            migration: self.config.migration,
            epoch: self.config.to_epoch,
            attempt: self.attempt,
        })));
    }

    /// The target's terms: sanity first, then either on from what it has or from scratch.
    pub(super) fn accepted(&mut self, now: Instant, accept: &Accept, out: &mut Actions) -> Result {
        if !self.acceptable(accept) {
            return Err(self.broken("Accept", out));
        }
        self.terms = Some(Terms { state_version: accept.state_version, lanes: accept.lanes });
        out.push(SourceAction::OpenLanes {
            attempt: self.attempt,
            lanes: accept.lanes,
            version: accept.version,
        });
        self.console_end = accept.resume.as_ref().map_or(0, |resume| resume.console_end);
        out.push(SourceAction::ReadConsole { from: self.console_end });
        match (self.dirty_log, &accept.resume) {
            (DirtyLog::On, Some(resume)) => {
                self.received = self.received.max(resume.round);
                out.push(SourceAction::GiveBackDirty { received: resume.clone() });
                self.next_round(out);
            }
            // Asked for on a connection that broke before a page was sent: all pages will be dirty.
            (DirtyLog::Starting, _) => self.state = State::StartingLog,
            (DirtyLog::Off, _) | (DirtyLog::On, None) => {
                self.dirty_log = DirtyLog::Starting;
                self.state = State::StartingLog;
                out.push(SourceAction::StartDirtyLog);
            }
        }
        out.push(SourceAction::Progress(self.progress(now)));
        Ok(())
    }

    fn acceptable(&self, accept: &Accept) -> bool {
        let config = &self.config;
        let lanes = self.terms.map_or(config.lanes, |terms| terms.lanes);
        let point_ok = |point: &LanePoint| point.round <= self.round.saturating_add(1);
        let resume_ok = |resume: &Resume| {
            self.terms.is_none_or(|terms| accept.lanes == terms.lanes)
                && resume.round <= self.round
                && resume.lanes.len() == usize::from(accept.lanes)
                && resume.lanes.iter().all(point_ok)
        };
        accept.attempt == self.attempt
            && (config.versions.oldest..=config.versions.newest).contains(&accept.version)
            && (config.state_versions.oldest..=config.state_versions.newest).contains(&accept.state_version)
            && (1..=lanes.clamp(1, LANES_MAX)).contains(&accept.lanes)
            && accept.resume.as_ref().is_none_or(resume_ok)
    }

    pub(super) fn link_lost(&mut self, now: Instant, out: &mut Actions) {
        self.link = Link::Down;
        match &self.state {
            State::Linking { deadline, .. } => {
                let deadline = *deadline;
                let retry_at = self.back_off(now);
                self.state = State::Linking { deadline, retry_at: Some(retry_at) };
                out.push(SourceAction::SetTimer { at: retry_at.min(deadline) });
            }
            State::StartingLog | State::Sending | State::Counting | State::Draining => {
                self.relink(now, out);
                out.push(SourceAction::Progress(self.progress(now)));
            }
            State::Pausing { .. } | State::Finishing(_) => self.roll_back(out),
            &State::InDoubt { since, dropped, .. } => self.doubt_again(now, since, dropped, out),
            // Disowning: the VMM's answer decides. The others have no use for the link.
            State::Idle
            | State::Disowning { .. }
            | State::Resuming(_)
            | State::Reclaiming { .. }
            | State::Releasing
            | State::Ended => {}
        }
    }

    /// The link is gone and the machine is given away: tries again for ever, unless the target said that it dropped its copy.
    fn doubt_again(&mut self, now: Instant, since: Instant, dropped: bool, out: &mut Actions) {
        if dropped {
            return;
        }
        let retry_at = self.back_off(now);
        self.state = State::InDoubt { since, retry_at: Some(retry_at), dropped };
        out.push(SourceAction::SetTimer { at: retry_at });
    }

    fn back_off(&mut self, now: Instant) -> Instant {
        let wait = self.retry_us;
        self.retry_us = wait.saturating_mul(2).min(self.config.limits.retry_most_us);
        now.plus_us(wait)
    }

    pub(super) fn timer(&mut self, now: Instant, out: &mut Actions) {
        match &self.state {
            &State::Linking { deadline, .. } if now >= deadline => {
                let detail = format!("{} was not reached in time", self.config.target);
                self.end(Outcome::Failed { code: RefusalCode::PeerLost, detail }, None, out);
            }
            &State::Linking { deadline, retry_at } => {
                if retry_at.is_some_and(|at| now >= at) {
                    self.state = State::Linking { deadline, retry_at: None };
                    self.dial(out);
                }
                let next =
                    if let State::Linking { retry_at: Some(at), .. } = self.state { at } else { deadline };
                out.push(SourceAction::SetTimer { at: next.min(deadline) });
            }
            &State::InDoubt { since, retry_at: Some(at), dropped } if now >= at => {
                self.state = State::InDoubt { since, retry_at: None, dropped };
                self.dial(out);
            }
            &State::InDoubt { retry_at: Some(at), .. } => out.push(SourceAction::SetTimer { at }),
            State::Pausing { since } => self.watch_pause(now, *since, out),
            State::Finishing(finishing) => self.watch_pause(now, finishing.since, out),
            _ => {}
        }
    }

    fn watch_pause(&mut self, now: Instant, since: Instant, out: &mut Actions) {
        let limit = since.plus_us(self.config.limits.switchover_us);
        if now >= limit {
            self.roll_back(out);
        } else {
            out.push(SourceAction::SetTimer { at: limit });
        }
    }

    /// The guest runs again after a switch-over that did not come about.
    pub(super) fn resumed(&mut self, now: Instant, out: &mut Actions) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Resuming(Then::Relink) => self.relink(now, out),
            State::Resuming(Then::End(outcome)) => self.finish(outcome, out),
            other => self.state = other,
        }
    }

    pub(super) fn hang_up(&mut self, out: &mut Actions) {
        if self.link != Link::Down {
            self.link = Link::Down;
            out.push(SourceAction::Disconnect { attempt: self.attempt });
        }
    }
}
