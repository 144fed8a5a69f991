//! Migrations: requests, turns, and what goes with the steps of the [saga](crate::saga).
//!
//! When a saga ends, the machine's owner and epoch change (or do not) in the same batch as the saga's state.

use wire::ids::{HostName, MigrationId};

use super::dispatch::Purpose;
use super::machines::bad_value;
use super::model::About;
use super::{Core, MachineRef};
use crate::api::{EventKind, MigrateRequest, Migration, Problem, ProblemCode};
use crate::placement::Demand;
use crate::saga::{self, End, Event, State};
use crate::store::records::{Cleanup, Lifecycle, MigrationRecord};

/// Pause aimed for when the request names none, in microseconds.
const DOWNTIME_BUDGET_US: u64 = 10_000;
/// Budgets that make sense: below the floor nothing converges, a minute is no live migration.
const DOWNTIME_BUDGETS_US: std::ops::RangeInclusive<u64> = 100..=60_000_000;

impl Core {
    /// Asks for a migration. It begins when both hosts have a free turn.
    ///
    /// # Errors
    /// [`ProblemCode::NoSuchMachine`], [`ProblemCode::NoSuchHost`], [`ProblemCode::SameHost`], [`ProblemCode::WrongState`],
    /// [`ProblemCode::MigrationRunning`] with the id of that one, [`ProblemCode::NoPlace`], [`ProblemCode::BadValue`].
    pub fn migrate(&mut self, machine: &MachineRef, request: &MigrateRequest) -> Result<Migration, Problem> {
        let budget = request.downtime_budget_us.unwrap_or(DOWNTIME_BUDGET_US);
        if !DOWNTIME_BUDGETS_US.contains(&budget) {
            return Err(bad_value(
                format!("a downtime budget of {budget} us"),
                "give 100us to 60s, for example --downtime-budget 10ms",
            ));
        }
        let record = self.find(machine)?;
        self.check_not_migrating(record)?;
        let (machine, source) = (record.id, record.host.clone());
        let (Lifecycle::Started, Some(source)) = (&record.lifecycle, source) else {
            let state = self.machine_state(record);
            return Err(Problem::new(
                ProblemCode::WrongState,
                format!("machine {} is {state}; only a started machine can be migrated", record.name),
                "start it first with `mashines start`; a stopped machine may start on any host",
            ));
        };
        if let Some(target) = &request.target {
            self.check_host_known(target)?;
            if *target == source {
                return Err(Problem::new(
                    ProblemCode::SameHost,
                    format!("machine {} is on host {source} already", record.name),
                    "name another host; `mashines host ls` shows them",
                ));
            }
        }
        let demand = Demand {
            ram_bytes: record.ram_bytes,
            vcpus: record.vcpus,
            features: record.cpu.features.clone(),
            only: request.target.clone(),
            not: Some(source.clone()),
        };
        let machine_name = record.name.clone();
        let target = self.place(&demand)?;
        let id = MigrationId::from_u64(super::idempotency::random_u64()?);
        let Some(record) = self.model.machine_mut(machine) else { return Err(gone(id)) };
        let to_epoch = record.burn_epoch();
        record.migration = Some(id);
        let meta = self.model.meta_mut();
        meta.migration_sequence += 1;
        let sequence = meta.migration_sequence;
        self.model.insert_migration(MigrationRecord {
            id,
            sequence,
            machine,
            machine_name,
            source: source.clone(),
            target: target.clone(),
            to_epoch,
            downtime_budget_us: budget,
            bandwidth_limit_bytes_per_s: request.bandwidth_limit_bytes_per_s.unwrap_or(0),
            state: State::Pending,
            target_state: None,
            cancel_requested: false,
            forget_target: false,
            requested_unix_ms: self.now.unix_ms,
            started_unix_ms: None,
            ended_unix_ms: None,
        });
        // The copy that an earlier move left on the target must go before the machine can come back.
        self.dispatch.expedite(&Purpose::Cleanup(machine, target.clone()));
        let message = format!("migration from {source} to {target} is asked for");
        self.migration_event(id, EventKind::MigrationRequested, message);
        self.view_migration(id)
    }

    /// Asks to cancel a migration. It may succeed all the same, if its Commit has left.
    ///
    /// # Errors
    /// [`ProblemCode::NoSuchMigration`]; [`ProblemCode::TooLate`] when it has ended or is past the point of return.
    pub fn cancel_migration(&mut self, id: MigrationId) -> Result<Migration, Problem> {
        let Some(record) = self.model.migration(id) else { return Err(gone(id)) };
        let too_late = |why: &str| {
            let detail = format!("migration {id} {why}");
            Problem::new(ProblemCode::TooLate, detail, "look at it with `mashines migrations get`")
        };
        match record.state {
            State::Ended { end: End::Cancelled } => {}
            State::Ended { .. } => return Err(too_late("has ended")),
            State::Fencing | State::Reclaiming { .. } => {
                return Err(too_late("is past its Commit and is being settled between the hosts"));
            }
            State::Pending | State::Preparing => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.cancel_requested = true;
                }
                self.saga(id, Event::CancelBeforeMove);
            }
            State::Moving { .. } | State::InDoubt { .. } => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.cancel_requested = true;
                }
            }
        }
        self.view_migration(id)
    }

    /// Gives waiting migrations their turn, oldest first.
    pub(super) fn schedule_migrations(&mut self) {
        let waiting: Vec<_> =
            self.model.migrations().filter(|m| m.state == State::Pending).map(|m| m.id).collect();
        for id in waiting {
            if self.has_turn(id) {
                if let Some(record) = self.model.migration_mut(id) {
                    record.started_unix_ms = Some(self.now.unix_ms);
                }
                self.saga(id, Event::Start);
            }
        }
    }

    fn has_turn(&self, id: MigrationId) -> bool {
        let Some(record) = self.model.migration(id) else { return false };
        let turns = |host: &HostName| {
            let active =
                |m: &&MigrationRecord| m.state.takes_slot() && (m.source == *host || m.target == *host);
            self.model.migrations().filter(active).count()
        };
        let limit = self.config.migrations_per_host;
        let old_copy = self
            .model
            .machine(record.machine)
            .is_some_and(|machine| machine.cleanups.iter().any(|cleanup| cleanup.host == record.target));
        !old_copy && turns(&record.source) < limit && turns(&record.target) < limit
    }

    /// Moves the saga on, and the machine's record with it.
    pub(super) fn saga(&mut self, id: MigrationId, event: Event) {
        let Some(record) = self.model.migration(id) else { return };
        let before = record.state.clone();
        match saga::next(&before, event) {
            Ok(after) if after != before => {
                if let Some(record) = self.model.migration_mut(id) {
                    record.state = after.clone();
                }
                self.saga_entered(id, &before, &after);
            }
            Ok(_) => {}
            Err(illegal) => tracing::debug!(migration = %id, %illegal, "ignored"),
        }
    }

    /// What goes with entering a state: the same batch keeps it.
    fn saga_entered(&mut self, id: MigrationId, before: &State, after: &State) {
        let Some(record) = self.model.migration(id) else { return };
        let (machine, source, target) = (record.machine, record.source.clone(), record.target.clone());
        match after {
            State::Preparing => {
                let message = format!("moving from {source} to {target}");
                self.migration_event(id, EventKind::MigrationStarted, message);
            }
            State::InDoubt { .. } if !matches!(before, State::InDoubt { .. }) => {
                let message = format!("it is not certain whether {source} or {target} runs it; asking both");
                self.migration_event(id, EventKind::MigrationInDoubt, message);
            }
            State::Reclaiming { epoch } => {
                if let Some(record) = self.model.machine_mut(machine) {
                    record.epoch_burnt = record.epoch_burnt.max(*epoch);
                }
            }
            State::Ended { end } => {
                let first = !before.is_ended();
                if first {
                    self.saga_ended(id, before, end);
                }
            }
            State::Pending | State::Moving { .. } | State::InDoubt { .. } | State::Fencing => {}
        }
    }

    fn saga_ended(&mut self, id: MigrationId, before: &State, end: &End) {
        self.progress.remove(&id);
        self.doubt_since.remove(&id);
        self.ask_source.remove(&id);
        let unix_ms = self.now.unix_ms;
        let Some(record) = self.model.migration_mut(id) else { return };
        record.ended_unix_ms = Some(unix_ms);
        record.forget_target = !matches!(end, End::Succeeded { .. }) && *before != State::Pending;
        let record = record.clone();
        let Some(machine) = self.model.machine_mut(record.machine) else { return };
        machine.migration = None;
        match end {
            End::Succeeded { .. } => {
                machine.host = Some(record.target.clone());
                machine.epoch = record.to_epoch;
                machine.cleanups.retain(|cleanup| cleanup.host != record.source);
                machine.cleanups.push(Cleanup {
                    host: record.source.clone(),
                    epoch: record.to_epoch,
                    forwarding: true,
                });
                let due = self.now.mono_ms.saturating_add(self.config.forward_ms);
                let purpose = Purpose::Cleanup(record.machine, record.source.clone());
                self.dispatch.defer(purpose, due);
                let message = format!("it runs on {}", record.target);
                self.migration_event(id, EventKind::MigrationSucceeded, message);
            }
            End::Failed { detail, machine_lost, .. } => {
                if let State::Reclaiming { epoch } = before {
                    machine.epoch = *epoch;
                }
                self.migration_event(id, EventKind::MigrationFailed, detail.clone());
                if *machine_lost {
                    let detail = format!("it was lost with host {}", record.source);
                    self.fail_machine(record.machine, "lost_with_host", detail);
                }
            }
            End::Cancelled => {
                self.migration_event(id, EventKind::MigrationCancelled, "it was cancelled".to_owned());
            }
        }
        self.judge_ended_guest(record.machine);
    }

    fn migration_event(&mut self, id: MigrationId, kind: EventKind, message: String) {
        let Some(record) = self.model.migration(id) else { return };
        let about =
            About { machine: Some(record.machine), host: Some(record.target.clone()), migration: Some(id) };
        let message = format!("machine {}: {message}", record.machine_name);
        self.model.event(self.now.unix_ms, kind, about, message);
    }
}

pub(super) fn gone(id: MigrationId) -> Problem {
    Problem::new(
        ProblemCode::NoSuchMigration,
        format!("there is no migration {id}"),
        "list them with `mashines migrations`; only the last 1000 ended ones are kept",
    )
}
