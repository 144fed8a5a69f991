//! The life of a machine after its creation: start, stop, remove, and what hosts answer.

use std::str::FromStr;

use wire::cpu::Profile;
use wire::fleet::{Answer, RefusalCode};
use wire::ids::{Epoch, HostName, Label, MachineId};
use wire::vmm::GuestEnd;

use super::Core;
use super::dispatch::Purpose;
use super::model::About;
use crate::api::machine::Reason;
use crate::api::{EventKind, Machine, Problem, ProblemCode, StopRequest};
use crate::placement::{Demand, place};
use crate::store::records::{Button, Cleanup, EndedGuest, Ending, Lifecycle, MachineRecord};

/// How long a guest has to shut down when the request does not say, in milliseconds.
const GRACE_MS: u64 = 30_000;

/// How a request names a machine: by id or by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineRef {
    /// By id.
    Id(MachineId),
    /// By name.
    Name(Label),
}

impl FromStr for MachineRef {
    type Err = wire::ids::ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self::Id).or_else(|_| text.parse().map(Self::Name))
    }
}

impl std::fmt::Display for MachineRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Core {
    /// The machine a request names.
    ///
    /// # Errors
    /// [`ProblemCode::NoSuchMachine`].
    pub(super) fn find(&self, machine: &MachineRef) -> Result<&MachineRecord, Problem> {
        let id = match machine {
            MachineRef::Id(id) => Some(*id),
            MachineRef::Name(name) => self.model.machine_named(name),
        };
        id.and_then(|id| self.model.machine(id))
            .filter(|record| record.lifecycle != Lifecycle::Gone)
            .ok_or_else(|| {
                Problem::new(
                    ProblemCode::NoSuchMachine,
                    format!("there is no machine `{machine}`"),
                    "list the machines with `mashines ls`",
                )
            })
    }

    /// Boots a stopped or failed machine again, from its kernel, under a new epoch, on whichever host has room.
    ///
    /// # Errors
    /// [`ProblemCode::WrongState`], [`ProblemCode::NoPlace`].
    pub fn start(&mut self, machine: &MachineRef) -> Result<Machine, Problem> {
        let record = self.find(machine)?;
        if !matches!(record.lifecycle, Lifecycle::Stopped | Lifecycle::Failed) {
            return Err(self.wrong_state(
                record,
                "started",
                "only a stopped or failed machine can be started",
            ));
        }
        let demand = Demand {
            ram_bytes: record.ram_bytes,
            vcpus: record.vcpus,
            // Disks are files of the host that ran it last.
            only: record.disks_on.clone(),
            features: record.cpu.profile.parse().map_or_else(|_| Vec::new(), Profile::owned_features),
            ..Demand::default()
        };
        let (id, profile) = (record.id, record.cpu.profile.parse().unwrap_or(Profile::Host));
        let host = self.place(&demand)?;
        let cpu = self.cpu_of(&host, profile);
        if let Some(record) = self.model.machine_mut(id) {
            record.epoch = record.burn_epoch();
            record.host = Some(host.clone());
            record.cpu = cpu;
            record.lifecycle = Lifecycle::Starting;
            record.reason = None;
        }
        // A copy that the new host still has to clear away is in the way of the launch.
        self.dispatch.expedite(&Purpose::Cleanup(id, host.clone()));
        self.machine_event(id, EventKind::MachineStarting, format!("it is started on {host}"));
        self.view_machine(id)
    }

    /// Ends a running machine; its RAM is gone, its disks, name and addresses stay. A guest made from an image is asked to shut down first, and has a while for it.
    /// Of a stopped one: nothing to do.
    ///
    /// # Errors
    /// [`ProblemCode::WrongState`], [`ProblemCode::MigrationRunning`].
    pub fn stop(&mut self, machine: &MachineRef, request: &StopRequest) -> Result<Machine, Problem> {
        let record = self.find(machine)?;
        let id = record.id;
        self.check_not_migrating(record)?;
        match record.lifecycle {
            Lifecycle::Started if record.guest.configured && !request.force => {
                let grace_ms = request.grace_ms.unwrap_or(GRACE_MS);
                let until_unix_ms = self.now.unix_ms.saturating_add(grace_ms);
                if record.button.is_none()
                    && let Some(record) = self.model.machine_mut(id)
                {
                    record.button = Some(Button { pressed: false, until_unix_ms });
                    self.machine_event(id, EventKind::MachineStopping, "it is asked to shut down".to_owned());
                }
            }
            Lifecycle::Started | Lifecycle::Creating | Lifecycle::Starting => {
                self.begin_stop(id, Ending::Stopped, None);
            }
            Lifecycle::Stopped | Lifecycle::Stopping { then: Ending::Stopped, .. } => {}
            Lifecycle::Failed | Lifecycle::Stopping { .. } | Lifecycle::Gone => {
                return Err(self.wrong_state(record, "stopped", "it does not run"));
            }
        }
        self.view_machine(id)
    }

    /// Removes a machine. With `force` also a running one, and one whose host is not in sight: it disappears at once, and what the
    /// host still has is cleared away when it returns.
    ///
    /// # Errors
    /// [`ProblemCode::WrongState`] for a running machine without `force`, [`ProblemCode::MigrationRunning`].
    pub fn remove(&mut self, machine: &MachineRef, force: bool) -> Result<Option<Machine>, Problem> {
        let record = self.find(machine)?;
        let id = record.id;
        self.check_not_migrating(record)?;
        let idle = matches!(record.lifecycle, Lifecycle::Stopped | Lifecycle::Failed);
        if !idle && !force {
            return Err(self.wrong_state(
                record,
                "removed",
                "stop it first, or remove it with --force, which ends it at once",
            ));
        }
        let reachable =
            record.host.as_ref().is_some_and(|host| self.hosts.get(host).is_some_and(|h| !h.lost));
        if !idle && reachable {
            self.begin_stop(id, Ending::Gone, None);
            return self.view_machine(id).map(Some);
        }
        self.machine_event(id, EventKind::MachineDestroyed, "it is removed".to_owned());
        self.bury(id);
        Ok(None)
    }

    /// Hides a machine from its owner. What hosts still have of it is cleared away before the record goes.
    fn bury(&mut self, id: MachineId) {
        self.model.forget_name(id);
        if let Some(record) = self.model.machine_mut(id) {
            record.lifecycle = Lifecycle::Gone;
            for host in [record.host.take(), record.disks_on.take()].into_iter().flatten() {
                let epoch = record.epoch_burnt;
                record.cleanups.retain(|cleanup| cleanup.host != host);
                record.cleanups.push(Cleanup { host, epoch, forwarding: false });
            }
        }
        self.drop_if_done(id);
    }

    fn drop_if_done(&mut self, id: MachineId) {
        let done =
            |machine: &MachineRecord| machine.lifecycle == Lifecycle::Gone && machine.cleanups.is_empty();
        if self.model.machine(id).is_some_and(done) {
            self.model.remove_machine(id);
        }
    }

    /// Begins to end a machine.
    pub(super) fn begin_stop(&mut self, id: MachineId, then: Ending, reason: Option<Reason>) {
        let message = match (&reason, then) {
            (Some(reason), _) => reason.detail.clone(),
            (None, Ending::Gone) => "it is being removed".to_owned(),
            (None, _) => "it is being stopped".to_owned(),
        };
        if let Some(record) = self.model.machine_mut(id) {
            // What was never launched has no console.
            let console_saved = matches!(record.lifecycle, Lifecycle::Creating | Lifecycle::Starting);
            record.lifecycle =
                Lifecycle::Stopping { then, console_saved: console_saved || then == Ending::Gone };
            record.reason = reason;
            record.button = None;
        }
        self.machine_event(id, EventKind::MachineStopping, message);
    }

    /// Ends what [`Core::begin_stop`] began, once the host has nothing of the machine any more.
    pub(super) fn finish_stop(&mut self, id: MachineId) {
        let Some(record) = self.model.machine_mut(id) else { return };
        let Lifecycle::Stopping { then, .. } = record.lifecycle else { return };
        let host = record.host.take();
        if !record.disks.is_empty() {
            record.disks_on = host;
        }
        record.started_unix_ms = None;
        let (lifecycle, kind, message) = match then {
            Ending::Stopped => (Lifecycle::Stopped, EventKind::MachineStopped, "it is stopped"),
            Ending::Failed => (Lifecycle::Failed, EventKind::MachineFailed, "it failed"),
            Ending::Gone => (Lifecycle::Gone, EventKind::MachineDestroyed, "it is removed"),
        };
        record.lifecycle = lifecycle;
        // Nothing is left to forward packets to.
        for cleanup in &record.cleanups {
            self.dispatch.expedite(&Purpose::Cleanup(id, cleanup.host.clone()));
        }
        let message = record.reason.as_ref().map_or_else(|| message.to_owned(), |r| r.detail.clone());
        self.machine_event(id, kind, message);
        if then == Ending::Gone {
            self.bury(id);
        }
    }

    /// The machine does not run, and no host has it or is to have it.
    pub(super) fn fail_machine(&mut self, id: MachineId, code: &str, detail: String) {
        let Some(record) = self.model.machine_mut(id) else { return };
        let ran = !matches!(record.lifecycle, Lifecycle::Creating | Lifecycle::Starting);
        let host = record.host.take();
        if ran && !record.disks.is_empty() {
            record.disks_on = host;
        }
        record.lifecycle = Lifecycle::Failed;
        record.button = None;
        record.started_unix_ms = None;
        record.reason = Some(Reason { code: code.to_owned(), detail: detail.clone() });
        self.machine_event(id, EventKind::MachineFailed, detail);
    }

    /// Takes up the answer to a command about a machine.
    pub(super) fn machine_answered(&mut self, host: &HostName, purpose: Purpose, answer: Answer) {
        match purpose {
            Purpose::Launch(id) => self.launch_answered(host, id, answer),
            Purpose::SaveConsole(id) => self.console_answered(id, answer),
            Purpose::PowerButton(id) => self.button_answered(host, id, &answer),
            Purpose::Stop(id) => match answer {
                Answer::Done | Answer::Unknown => self.finish_stop(id),
                other => self.unhelpful(host, Purpose::Stop(id), &other),
            },
            Purpose::Cleanup(id, _) => match answer {
                Answer::Done | Answer::Unknown | Answer::Refused { code: RefusalCode::Stale, .. } => {
                    if let Some(record) = self.model.machine_mut(id) {
                        record.cleanups.retain(|cleanup| cleanup.host != *host);
                    }
                    self.drop_if_done(id);
                }
                other => self.unhelpful(host, Purpose::Cleanup(id, host.clone()), &other),
            },
            _ => {}
        }
    }

    fn button_answered(&mut self, host: &HostName, id: MachineId, answer: &Answer) {
        let Some(record) = self.model.machine_mut(id) else { return };
        let Some(button) = record.button.as_mut() else { return };
        if *answer == Answer::Done {
            button.pressed = true;
            return;
        }
        tracing::info!(%host, machine = %id, ?answer, "the power button cannot be pressed; ending the machine");
        self.begin_stop(id, Ending::Stopped, None);
    }

    /// Ends guests that have not shut down in the time they had.
    pub(super) fn notice_overdue_guests(&mut self) {
        let now = self.now.unix_ms;
        let overdue = |machine: &&MachineRecord| {
            machine.button.is_some_and(|button| button.until_unix_ms <= now) && machine.migration.is_none()
        };
        let ids: Vec<MachineId> = self.model.machines().filter(overdue).map(|machine| machine.id).collect();
        for id in ids {
            self.begin_stop(id, Ending::Stopped, None);
        }
    }

    /// The host that a connection to the machine's guest leads over.
    ///
    /// # Errors
    /// [`ProblemCode::WrongState`] when it does not run, [`ProblemCode::HostUnreachable`].
    pub fn guest_host(&self, machine: &MachineRef) -> Result<(MachineId, quinn::Connection), Problem> {
        let record = self.find(machine)?;
        if record.lifecycle != Lifecycle::Started {
            return Err(self.wrong_state(record, "reached", "start it first"));
        }
        let runtime = record.host.as_ref().and_then(|host| self.hosts.get(host));
        let streams = runtime.filter(|host| !host.lost).and_then(|host| host.link.as_ref()?.streams.clone());
        streams.map(|streams| (record.id, streams)).ok_or_else(|| {
            Problem::new(
                ProblemCode::HostUnreachable,
                format!("the host of machine {} is not in sight", record.name),
                "try again when `mashines host ls` shows it online",
            )
        })
    }

    /// An answer that does not settle the matter: it is tried again later.
    pub(super) fn unhelpful(&mut self, host: &HostName, purpose: Purpose, answer: &Answer) {
        tracing::warn!(%host, ?purpose, ?answer, "trying again later");
        self.dispatch.defer(purpose, self.now.mono_ms.saturating_add(self.config.retry_ms));
    }

    fn launch_answered(&mut self, host: &HostName, id: MachineId, answer: Answer) {
        let unix_ms = self.now.unix_ms;
        let Some(record) = self.model.machine(id) else { return };
        // Stopped or removed meanwhile: what follows from that is under way already.
        if !matches!(record.lifecycle, Lifecycle::Creating | Lifecycle::Starting) {
            return;
        }
        let detail = match answer {
            Answer::Done => {
                if let Some(record) = self.model.machine_mut(id) {
                    record.lifecycle = Lifecycle::Started;
                    record.started_unix_ms = Some(unix_ms);
                }
                self.machine_event(id, EventKind::MachineStarted, format!("it runs on {host}"));
                return;
            }
            Answer::Refused { code, detail } => (refusal_text(code), detail),
            other => (
                "protocol",
                format!(
                    "host {host} gave an answer that does not fit a launch: {}",
                    clip(format!("{other:?}"))
                ),
            ),
        };
        // Whatever the host had set up before it refused goes too.
        if let Some(record) = self.model.machine_mut(id) {
            let epoch = record.epoch_burnt;
            record.cleanups.retain(|cleanup| cleanup.host != *host);
            record.cleanups.push(Cleanup { host: host.clone(), epoch, forwarding: false });
        }
        self.fail_machine(id, detail.0, format!("host {host} could not launch it: {}", detail.1));
    }

    /// A guest ended by itself.
    pub(super) fn guest_ended(&mut self, host: &HostName, id: MachineId, epoch: Epoch, end: &GuestEnd) {
        let (clean, reason) = describe_end(end);
        let Some(record) = self.model.machine(id) else { return };
        if record.migration.is_some() {
            let ended = EndedGuest { host: host.clone(), epoch, clean, reason };
            if let Some(record) = self.model.machine_mut(id) {
                record.ended_guest = Some(ended);
            }
            return;
        }
        let owner = record.host.as_ref() == Some(host) && record.epoch == epoch;
        if owner && record.lifecycle == Lifecycle::Started {
            let then = if clean { Ending::Stopped } else { Ending::Failed };
            self.begin_stop(id, then, Some(reason));
        }
    }

    /// Judges a guest's end that was reported during a migration, now that the owner is known.
    pub(super) fn judge_ended_guest(&mut self, id: MachineId) {
        let Some(record) = self.model.machine_mut(id) else { return };
        let Some(ended) = record.ended_guest.take() else { return };
        let owner = record.host.as_ref() == Some(&ended.host) && record.epoch == ended.epoch;
        if owner && record.lifecycle == Lifecycle::Started {
            let then = if ended.clean { Ending::Stopped } else { Ending::Failed };
            self.begin_stop(id, then, Some(ended.reason));
        }
    }

    pub(super) fn machine_event(&mut self, id: MachineId, kind: EventKind, message: String) {
        let host = self.model.machine(id).and_then(|machine| machine.host.clone());
        let about = About { machine: Some(id), host, migration: None };
        self.model.event(self.now.unix_ms, kind, about, message);
    }

    /// Chooses a host for `demand`.
    pub(super) fn place(&self, demand: &Demand) -> Result<HostName, Problem> {
        let fleet: Vec<_> = self.fleet().into_iter().map(|(host, _)| host).collect();
        place(&fleet, demand).map_err(|error| {
            Problem::new(
                ProblemCode::NoPlace,
                error.to_string(),
                "ask for less, free something, or add a host; `mashines host ls` shows what is free",
            )
        })
    }

    /// Checks that a host a request names has ever joined.
    pub(super) fn check_host_known(&self, host: &HostName) -> Result<(), Problem> {
        if self.hosts.contains_key(host) {
            return Ok(());
        }
        let names: Vec<_> = self.hosts.keys().map(HostName::as_str).collect();
        let known = if names.is_empty() { "no host has joined yet".to_owned() } else { names.join(", ") };
        Err(Problem::new(
            ProblemCode::NoSuchHost,
            format!("there is no host `{host}`"),
            format!("use one of the hosts that have joined: {known}"),
        ))
    }

    pub(super) fn check_not_migrating(&self, record: &MachineRecord) -> Result<(), Problem> {
        let Some(migration) = record.migration else { return Ok(()) };
        Err(Problem::new(
            ProblemCode::MigrationRunning,
            format!("machine {} is being migrated by {migration}", record.name),
            format!("wait for it, or cancel it with `mashines migrations cancel {migration}`"),
        )
        .conflicting(migration))
    }

    fn wrong_state(&self, record: &MachineRecord, what: &str, remedy: &str) -> Problem {
        let state = self.machine_state(record);
        Problem::new(
            ProblemCode::WrongState,
            format!("machine {} is {state} and cannot be {what} now", record.name),
            remedy,
        )
    }
}

pub(super) fn bad_value(detail: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem::new(ProblemCode::BadValue, detail, remedy)
}

fn describe_end(end: &GuestEnd) -> (bool, Reason) {
    let (clean, code, detail) = match end {
        GuestEnd::PowerOff => (true, "power_off", "the guest powered off".to_owned()),
        GuestEnd::Reset => (false, "reset", "the guest reset itself".to_owned()),
        GuestEnd::Panic => {
            (false, "panic", "the guest's kernel panicked; `mashines logs` shows its console".to_owned())
        }
        GuestEnd::Crash(line) => (false, "crash", format!("the machine crashed: {}", clip(line.clone()))),
    };
    (clean, Reason { code: code.to_owned(), detail })
}

/// Holds what a host says to a length that is fit to be kept and shown.
pub(super) fn clip(mut text: String) -> String {
    /// Longest text of a host, in bytes: a line or a few.
    const TEXT_BYTES_MAX: usize = 1024;
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        text.push_str(" ...");
    }
    text
}

/// The stable text of a host's refusal.
pub(super) const fn refusal_text(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::NoRam => "no_ram",
        RefusalCode::CpuFeature => "cpu_feature",
        RefusalCode::Tsc => "tsc",
        RefusalCode::Version => "version",
        RefusalCode::Stale => "stale",
        RefusalCode::Busy => "busy",
        RefusalCode::Committed => "committed",
        RefusalCode::NotExpected => "not_expected",
        RefusalCode::SameHost => "same_host",
        RefusalCode::WrongState => "wrong_state",
        RefusalCode::BadBoot => "bad_boot",
        RefusalCode::Protocol => "protocol",
        RefusalCode::PeerLost => "peer_lost",
        RefusalCode::Cancelled => "cancelled",
        RefusalCode::HostError => "host_error",
        RefusalCode::GuestEnded => "guest_ended",
        RefusalCode::NoBlob => "no_blob",
        RefusalCode::NoDisk => "no_disk",
    }
}
