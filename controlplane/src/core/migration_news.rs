//! What hosts say about migrations, turned into events of the [saga](crate::saga).
//!
//! A host is believed in what it says of itself. What it says late, twice, or about a migration it has no part in changes nothing.

use wire::fleet::{Answer, MigrationPhase, MigrationStanding, Outcome, Progress, RefusalCode};
use wire::ids::{HostName, MachineId, MigrationId};

use super::Core;
use super::dispatch::Purpose;
use super::machines::{clip, refusal_text};
use crate::saga::{End, Event, Route, State};
use crate::store::records::MigrationRecord;

impl Core {
    /// Takes up an answer.
    pub(super) fn answered(&mut self, host: &HostName, purpose: Purpose, answer: Answer) {
        match purpose {
            Purpose::Launch(_) | Purpose::SaveConsole(_) | Purpose::Stop(_) | Purpose::Cleanup(..) => {
                self.machine_answered(host, purpose, answer);
            }
            _ => self.migration_answered(host, purpose, answer),
        }
    }

    /// Takes up the answer to a command about a migration.
    pub(super) fn migration_answered(&mut self, host: &HostName, purpose: Purpose, answer: Answer) {
        match (purpose, answer) {
            (Purpose::Prepare(id), Answer::Prepared { addresses, .. }) if !usable(&addresses) => {
                let detail = format!("host {host} named no usable addresses to send the machine to");
                self.saga(id, Event::PrepareFailed { code: "protocol".to_owned(), detail });
            }
            (Purpose::Prepare(id), Answer::Prepared { addresses, forward_to, state }) => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.target_state = Some(state);
                }
                let route = Route {
                    addresses,
                    forward_ip4: forward_to.ip4.into(),
                    forward_ip6: forward_to.ip6.into(),
                };
                self.saga(id, Event::Prepared(route));
            }
            (Purpose::Prepare(id), Answer::Refused { code, detail }) => {
                let detail = format!("host {host} cannot take it: {}", clip(detail));
                self.saga(id, Event::PrepareFailed { code: refusal_text(code).to_owned(), detail });
            }
            (Purpose::Migrate(id), Answer::Done) => self.saga(id, Event::Begun),
            (Purpose::Migrate(id), Answer::Refused { code, detail }) => {
                let detail = format!("host {host} cannot move it: {}", clip(detail));
                self.saga(id, Event::MoveRefused { code: refusal_text(code).to_owned(), detail });
            }
            (Purpose::Migrate(id), Answer::Unknown) => {
                // The heartbeats will tell whether the machine is there; the saga must not wait for them.
                let detail = format!("host {host} does not have the machine");
                self.saga(id, Event::MoveRefused { code: "machine_lost".to_owned(), detail });
            }
            (Purpose::Cancel(id), answer) => self.cancel_answered(host, id, answer),
            (Purpose::AskSource(id), answer) => self.source_answered(host, id, answer),
            (Purpose::AskTarget(id), answer) => self.target_answered(host, id, answer),
            (Purpose::Fence(id), Answer::Done) => self.fenced(id),
            (Purpose::Fence(id), Answer::Owns { .. }) => self.saga(id, Event::TargetOwns),
            (Purpose::Reclaim(id), Answer::Done) => self.saga(id, Event::Reclaimed),
            (Purpose::Reclaim(id), Answer::Refused { code: RefusalCode::Stale, .. }) => {
                self.fenced(id);
                self.defer_asking(Purpose::Reclaim(id));
            }
            (Purpose::Reclaim(id), Answer::Unknown) => self.saga(id, Event::MachineGone),
            (Purpose::Forget(id), Answer::Done | Answer::Unknown) => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.forget_target = false;
                }
            }
            (Purpose::Forget(id), Answer::Refused { code: RefusalCode::Committed, .. }) => {
                // Heartbeats show the copy, and the rule for strays deals with it.
                tracing::error!(%host, migration = %id, "the target owns a machine whose migration ended otherwise");
                if let Some(record) = self.model.migration_mut(id) {
                    record.forget_target = false;
                }
            }
            (purpose, answer) => self.unhelpful(host, purpose, &answer),
        }
    }

    /// The target will never run the machine under this migration's epoch: the source gets one above all others.
    fn fenced(&mut self, id: MigrationId) {
        let machine = self.model.migration(id).map(|record| record.machine);
        let burnt = machine.and_then(|id| self.model.machine(id)).map(|record| record.epoch_burnt);
        if let Some(burnt) = burnt {
            self.saga(id, Event::Fenced { reclaim: burnt.next() });
        }
    }

    /// Whether the source has ever said that it moves the machine.
    fn begun(&self, id: MigrationId) -> bool {
        self.model
            .migration(id)
            .is_some_and(|record| !matches!(record.state, State::Moving { begun: false, .. }))
    }

    fn cancel_answered(&mut self, host: &HostName, id: MigrationId, answer: Answer) {
        match answer {
            Answer::Done => self.saga(id, Event::CancelDone),
            // It never heard of the migration, so it never gave anything away; or it did begin, and its daemon has
            // forgotten, which needs a fence.
            Answer::Unknown if !self.begun(id) => self.saga(id, Event::CancelDone),
            Answer::Unknown => self.saga(id, Event::SourceUnsure { said_so: true }),
            Answer::Refused { code: RefusalCode::Committed, .. } => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.cancel_requested = false;
                }
                self.ask_source.insert(id);
            }
            other => self.unhelpful(host, Purpose::Cancel(id), &other),
        }
    }

    fn source_answered(&mut self, host: &HostName, id: MigrationId, answer: Answer) {
        match answer {
            Answer::Migration(MigrationStanding::Moving(progress)) => {
                self.ask_source.remove(&id);
                self.saga(id, Event::SourceMoving);
                self.migration_progress(host, progress);
            }
            Answer::Migration(MigrationStanding::Ended(outcome)) => {
                self.migration_ended(host, id, outcome);
            }
            Answer::Migration(MigrationStanding::InDoubt) => {
                self.ask_source.remove(&id);
                self.source_in_doubt(id);
                self.defer_asking(Purpose::AskSource(id));
            }
            // It knows of no such migration: its daemon started anew before anything was given away, or never
            // heard of it. Whether it still has the machine shows when it is reclaimed.
            Answer::Unknown => {
                self.ask_source.remove(&id);
                if self.begun(id) {
                    self.saga(id, Event::SourceUnsure { said_so: true });
                }
                self.defer_asking(Purpose::AskSource(id));
            }
            other => self.unhelpful(host, Purpose::AskSource(id), &other),
        }
    }

    fn target_answered(&mut self, host: &HostName, id: MigrationId, answer: Answer) {
        match answer {
            Answer::Migration(MigrationStanding::Owns { .. }) | Answer::Owns { .. } => {
                self.saga(id, Event::TargetOwns);
            }
            Answer::Migration(
                MigrationStanding::Receiving | MigrationStanding::Ready | MigrationStanding::Ended(_),
            )
            | Answer::Unknown => {
                self.saga(id, Event::TargetNotOwner);
                self.defer_asking(Purpose::AskTarget(id));
            }
            other => self.unhelpful(host, Purpose::AskTarget(id), &other),
        }
    }

    fn defer_asking(&mut self, purpose: Purpose) {
        self.dispatch.defer(purpose, self.now.mono_ms.saturating_add(self.config.retry_ms));
    }

    /// A report on the way.
    pub(super) fn migration_progress(&mut self, host: &HostName, progress: Progress) {
        let id = progress.migration;
        let Some(record) = self.model.migration(id).filter(|record| record.source == *host) else { return };
        match record.state {
            State::Moving { begun: false, .. } => self.saga(id, Event::Begun),
            State::Moving { begun: true, .. } | State::InDoubt { .. } => {}
            _ => return,
        }
        if progress.phase == MigrationPhase::InDoubt {
            self.doubt_since.entry(id).or_insert(self.now.mono_ms);
        } else {
            self.doubt_since.remove(&id);
        }
        self.progress.insert(id, progress);
    }

    /// The source says how a migration ended.
    pub(super) fn migration_ended(&mut self, host: &HostName, id: MigrationId, outcome: Outcome) {
        if self.model.migration(id).is_none_or(|record| record.source != *host) {
            return;
        }
        self.ask_source.remove(&id);
        let end = match outcome {
            Outcome::Succeeded(timings) => End::Succeeded { timings: Some((&timings).into()) },
            Outcome::Cancelled => End::Cancelled,
            Outcome::Failed { code, detail } => End::failed(refusal_text(code), clip(detail)),
        };
        self.saga(id, Event::SourceEnded(end));
    }

    /// The source waits for the answer to its Commit. That is the way of things for a moment; after `doubt_ms` it is looked into.
    fn source_in_doubt(&mut self, id: MigrationId) {
        let now = self.now.mono_ms;
        let since = *self.doubt_since.entry(id).or_insert(now);
        if now.saturating_sub(since) >= self.config.doubt_ms {
            self.saga(id, Event::SourceUnsure { said_so: true });
        }
    }

    /// Looks into migrations whose source has been waiting for too long.
    pub(super) fn notice_doubt(&mut self) {
        let waiting: Vec<_> = self.doubt_since.keys().copied().collect();
        for id in waiting {
            self.source_in_doubt(id);
        }
    }

    /// A host has fallen silent.
    pub(super) fn migrations_lost_host(&mut self, host: &HostName) {
        let concerned: Vec<_> = self
            .model
            .migrations()
            .filter(|m| !m.state.is_ended() && (m.source == *host || m.target == *host))
            .map(|m| (m.id, m.source == *host, m.state.clone()))
            .collect();
        for (id, is_source, state) in concerned {
            match (state, is_source) {
                (State::Moving { .. }, true) => self.saga(id, Event::SourceUnsure { said_so: false }),
                (State::Pending | State::Preparing, _) => {
                    let detail = format!("host {host} fell silent before the move began");
                    self.saga(id, Event::PrepareFailed { code: "host_lost".to_owned(), detail });
                }
                // A source that loses its target reports that by itself.
                _ => {}
            }
        }
    }

    /// A host is back: whatever it had to say about migrations may have been lost with the link.
    pub(super) fn ask_sources_on(&mut self, host: &HostName) {
        let unfinished = |m: &&MigrationRecord| m.source == *host && !m.state.is_ended();
        let ids: Vec<_> = self.model.migrations().filter(unfinished).map(|m| m.id).collect();
        for id in ids {
            self.ask_source.insert(id);
            self.dispatch.expedite(&Purpose::AskSource(id));
        }
    }

    /// The host no longer has a machine that was on its way from it.
    pub(super) fn migrating_machine_gone(&mut self, machine: MachineId) {
        if let Some(id) = self.model.machine(machine).and_then(|machine| machine.migration) {
            self.saga(id, Event::MachineGone);
        }
    }
}

/// Whether the target's shards can be dialled. More than this many shards no host has.
fn usable(addresses: &[String]) -> bool {
    const SHARDS_MAX: usize = 1024;
    let parses = |text: &String| text.parse::<std::net::SocketAddr>().is_ok();
    (1..=SHARDS_MAX).contains(&addresses.len()) && addresses.iter().all(parses)
}
