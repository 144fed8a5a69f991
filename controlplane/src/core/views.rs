//! Records as the API shows them.

use wire::fleet::{MigrationPhase, Progress, Timings};
use wire::ids::{HostName, MachineId, MigrationId};

use super::{Core, MachineRef, migrations};
use crate::api::migration::MigrationError;
use crate::api::{
    self, Host, HostList, HostState, Machine, MachineList, MachineState, Migration, MigrationList,
    MigrationRef, Phase, Problem, Stage,
};
use crate::saga::{End, State};
use crate::store::records::{Ending, Lifecycle, MachineRecord, MigrationRecord};

/// Which machines a list shows.
#[derive(Debug, Clone, Default)]
pub struct MachineFilter {
    /// In this state.
    pub state: Option<MachineState>,
    /// On this host.
    pub host: Option<HostName>,
    /// With this name.
    pub name: Option<wire::ids::MachineName>,
    /// With ids above this.
    pub after: Option<MachineId>,
    /// At most this many.
    pub limit: usize,
}

/// Which migrations a list shows.
#[derive(Debug, Clone, Default)]
pub struct MigrationFilter {
    /// Of this machine.
    pub machine: Option<MachineRef>,
    /// In this phase.
    pub phase: Option<Phase>,
    /// Older than the one with this number.
    pub before: Option<u64>,
    /// At most this many.
    pub limit: usize,
}

impl Core {
    /// The machine a request names.
    ///
    /// # Errors
    /// [`crate::api::ProblemCode::NoSuchMachine`].
    pub fn machine(&self, machine: &MachineRef) -> Result<Machine, Problem> {
        self.find(machine).map(|record| self.show_machine(record))
    }

    pub(super) fn view_machine(&self, id: MachineId) -> Result<Machine, Problem> {
        self.machine(&MachineRef::Id(id))
    }

    /// A page of machines, by id.
    pub fn machines(&self, filter: &MachineFilter) -> MachineList {
        let mut machines: Vec<Machine> = self
            .model
            .machines_from(filter.after)
            .filter(|record| record.lifecycle != Lifecycle::Gone)
            .filter(|record| filter.state.is_none_or(|state| self.machine_state(record) == state))
            .filter(|record| filter.host.is_none() || record.host == filter.host)
            .filter(|record| filter.name.as_ref().is_none_or(|name| record.name == *name))
            .take(filter.limit.saturating_add(1))
            .map(|record| self.show_machine(record))
            .collect();
        let more = machines.len() > filter.limit;
        machines.truncate(filter.limit);
        let next_cursor = machines.last().filter(|_| more).map(|machine| machine.id.to_string());
        MachineList { machines, next_cursor }
    }

    pub(super) fn machine_state(&self, record: &MachineRecord) -> MachineState {
        let lost = || record.host.as_ref().is_some_and(|host| self.hosts.get(host).is_none_or(|h| h.lost));
        match &record.lifecycle {
            Lifecycle::Creating => MachineState::Creating,
            Lifecycle::Starting => MachineState::Starting,
            Lifecycle::Started if lost() => MachineState::Unknown,
            Lifecycle::Started if record.button.is_some() => MachineState::Stopping,
            Lifecycle::Started => MachineState::Started,
            Lifecycle::Stopping { then: Ending::Gone, .. } => MachineState::Destroying,
            Lifecycle::Stopping { .. } => MachineState::Stopping,
            Lifecycle::Stopped => MachineState::Stopped,
            Lifecycle::Failed => MachineState::Failed,
            Lifecycle::Gone => MachineState::Destroyed,
        }
    }

    fn show_machine(&self, record: &MachineRecord) -> Machine {
        let mac: Vec<_> = record.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let runs = record.lifecycle == Lifecycle::Started;
        let started = record.started_unix_ms.filter(|_| runs);
        let migration =
            record.migration.and_then(|id| self.model.migration(id)).map(|migration| MigrationRef {
                id: migration.id,
                target: migration.target.clone(),
                phase: phase(&migration.state),
                progress: self.progress.get(&migration.id).map(api::Progress::from),
            });
        Machine {
            id: record.id,
            name: record.name.clone(),
            state: self.machine_state(record),
            reason: record.reason.clone(),
            host: record.host.clone(),
            epoch: record.epoch.0,
            vcpus: record.vcpus,
            ram_bytes: record.ram_bytes,
            ip4: record.ip4,
            ip6: record.ip6,
            mac: mac.join(":"),
            kernel: record.boot.kernel.clone(),
            initrd: record.boot.initrd.clone(),
            cmdline: record.boot.cmdline.clone(),
            image: record.image.clone(),
            disk_bytes: record.disks.first().map(|disk| disk.bytes),
            cpu: record.cpu.profile.clone(),
            created_unix_ms: record.created_unix_ms,
            started_unix_ms: started,
            uptime_ms: started.map(|at| self.now.unix_ms.saturating_sub(at)),
            migration,
        }
    }

    /// All hosts.
    pub fn host_list(&self) -> HostList {
        let shown = self.fleet().into_iter().filter_map(|(model, placed)| {
            let runtime = self.hosts.get(&model.name)?;
            let capacity = runtime.capacity.as_ref();
            Some(Host {
                state: runtime.state(),
                release: self
                    .model
                    .host(&model.name)
                    .map(|record| record.release.clone())
                    .unwrap_or_default(),
                ram_bytes: capacity.map(|capacity| capacity.ram_bytes),
                ram_free_bytes: capacity.map(|_| model.ram_free_bytes),
                cpus: capacity.map(|capacity| capacity.cpus),
                vcpus_used: placed.vcpus,
                machines: placed.machines,
                tsc_khz: capacity.map(|capacity| capacity.tsc_khz),
                cpu_features: capacity.map(|capacity| capacity.cpu_features.clone()).unwrap_or_default(),
                last_heard_ms_ago: runtime
                    .heard
                    .then(|| self.now.mono_ms.saturating_sub(runtime.last_heard_mono_ms)),
                name: model.name,
            })
        });
        HostList { hosts: shown.collect() }
    }

    /// The host of this name.
    ///
    /// # Errors
    /// [`crate::api::ProblemCode::NoSuchHost`].
    pub fn host(&self, name: &HostName) -> Result<Host, Problem> {
        self.check_host_known(name)?;
        let found = self.host_list().hosts.into_iter().find(|host| host.name == *name);
        found.ok_or_else(|| {
            Problem::new(api::ProblemCode::NoSuchHost, format!("there is no host `{name}`"), "try again")
        })
    }

    /// The migration of this id.
    ///
    /// # Errors
    /// [`crate::api::ProblemCode::NoSuchMigration`].
    pub fn migration(&self, id: MigrationId) -> Result<Migration, Problem> {
        self.model.migration(id).map(|record| self.show_migration(record)).ok_or_else(|| migrations::gone(id))
    }

    pub(super) fn view_migration(&self, id: MigrationId) -> Result<Migration, Problem> {
        self.migration(id)
    }

    /// A page of migrations, newest first.
    ///
    /// # Errors
    /// [`crate::api::ProblemCode::NoSuchMachine`] when the filter names a machine that is not there.
    pub fn migrations(&self, filter: &MigrationFilter) -> Result<MigrationList, Problem> {
        let machine = filter.machine.as_ref().map(|machine| self.find(machine)).transpose()?.map(|m| m.id);
        let found: Vec<&MigrationRecord> = self
            .model
            .migrations()
            .rev()
            .filter(|record| filter.before.is_none_or(|before| record.sequence < before))
            .filter(|record| machine.is_none_or(|machine| record.machine == machine))
            .filter(|record| filter.phase.is_none_or(|wanted| phase(&record.state) == wanted))
            .take(filter.limit.saturating_add(1))
            .collect();
        let more = found.len() > filter.limit;
        let page = &found[..found.len().min(filter.limit)];
        Ok(MigrationList {
            migrations: page.iter().map(|record| self.show_migration(record)).collect(),
            next_cursor: page.last().filter(|_| more).map(|record| record.sequence.to_string()),
        })
    }

    fn show_migration(&self, record: &MigrationRecord) -> Migration {
        let (error, timings) = match &record.state {
            State::Ended { end: End::Failed { code, detail, .. } } => {
                (Some(MigrationError { code: code.clone(), detail: detail.clone() }), None)
            }
            State::Ended { end: End::Succeeded { timings } } => (None, timings.clone()),
            _ => (None, None),
        };
        Migration {
            id: record.id,
            machine: record.machine,
            machine_name: record.machine_name.clone(),
            source: record.source.clone(),
            target: record.target.clone(),
            epoch: record.to_epoch.0,
            phase: phase(&record.state),
            message: self.migration_message(record),
            cancel_requested: record.cancel_requested,
            downtime_budget_us: record.downtime_budget_us,
            progress: self.progress.get(&record.id).map(api::Progress::from),
            timings,
            error,
            requested_unix_ms: record.requested_unix_ms,
            started_unix_ms: record.started_unix_ms,
            ended_unix_ms: record.ended_unix_ms,
        }
    }

    fn migration_message(&self, record: &MigrationRecord) -> Option<String> {
        let unseen =
            |host: &HostName| self.hosts.get(host).is_none_or(|runtime| runtime.state() != HostState::Online);
        let (source, target) = (&record.source, &record.target);
        match &record.state {
            State::Pending => Some("waits for its turn on both hosts".to_owned()),
            State::Moving { .. } if record.cancel_requested => Some(format!("asking {source} to cancel")),
            State::Moving { .. } if unseen(source) => {
                Some(format!("{source} is not in sight; the hosts go on by themselves"))
            }
            State::InDoubt { .. } if unseen(source) => Some(format!(
                "waits for {source}, which is not in sight; {target} does not say that it runs the machine"
            )),
            State::InDoubt { .. } | State::Fencing if unseen(target) => Some(format!(
                "waits for {target}, which is not in sight and may be running the machine; {source} must not resume before that is known"
            )),
            State::InDoubt { .. } => Some(format!("asking {source} and {target} who runs the machine")),
            State::Fencing => Some(format!("asking {target} to promise that it never runs the machine")),
            State::Reclaiming { .. } if unseen(source) => {
                Some(format!("waits for {source}, which is to take the machine back and is not in sight"))
            }
            State::Reclaiming { .. } => Some(format!("{source} takes the machine back")),
            State::Preparing | State::Moving { .. } | State::Ended { .. } => None,
        }
    }
}

pub(super) const fn phase(state: &State) -> Phase {
    match state {
        State::Pending => Phase::Pending,
        State::Preparing => Phase::PreparingTarget,
        State::Moving { .. } => Phase::Running,
        State::InDoubt { .. } | State::Fencing | State::Reclaiming { .. } => Phase::InDoubt,
        State::Ended { end: End::Succeeded { .. } } => Phase::Succeeded,
        State::Ended { end: End::Failed { .. } } => Phase::Failed,
        State::Ended { end: End::Cancelled } => Phase::Cancelled,
    }
}

impl From<&Progress> for api::Progress {
    fn from(progress: &Progress) -> Self {
        let stage = match progress.phase {
            MigrationPhase::Connecting => Stage::Connecting,
            MigrationPhase::Precopy => Stage::Precopy,
            MigrationPhase::Reconnecting => Stage::Reconnecting,
            MigrationPhase::Switchover => Stage::Switchover,
            MigrationPhase::InDoubt => Stage::Committing,
            MigrationPhase::Completing => Stage::Completing,
        };
        Self {
            stage,
            round: progress.round,
            ram_bytes: progress.ram_bytes,
            sent_bytes: progress.sent_bytes,
            remaining_bytes: progress.remaining_bytes,
            dirty_pages_per_s: progress.dirty_pages_per_s,
            bytes_per_s: progress.bytes_per_s,
            predicted_downtime_us: progress.predicted_downtime_us,
            eta_ms: progress.eta_ms,
            elapsed_ms: progress.elapsed_ms,
        }
    }
}

impl From<&Timings> for api::Timings {
    fn from(timings: &Timings) -> Self {
        Self {
            total_ms: timings.total_ms,
            rounds: timings.rounds,
            sent_bytes: timings.sent_bytes,
            pages_sent: timings.pages_sent,
            pages_zero: timings.pages_zero,
            pause_us: timings.pause_us,
            stop_us: timings.stop_us,
            harvest_us: timings.harvest_us,
            final_copy_us: timings.final_copy_us,
            save_us: timings.save_us,
            restore_us: timings.restore_us,
            resume_us: timings.resume_us,
            final_pages: timings.final_pages,
            packets_held: timings.packets_held,
        }
    }
}
