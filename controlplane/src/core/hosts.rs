//! Hosts: joining, heartbeats, falling silent.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use wire::fleet::{Answer, Capacity, FromHost, MachineReport, ToHost};
use wire::ids::{HostName, MachineId};

use super::Core;
use super::dispatch::InFlight;
use super::model::About;
use crate::api::{EventKind, HostState};
use crate::placement::HostModel;
use crate::store::records::{HostRecord, Lifecycle};

/// Heartbeats that may be missed before a host counts as lost.
const HEARTBEATS_MISSED_MAX: u64 = 3;

/// What comes from the host links.
#[derive(Debug)]
pub enum HostInput {
    /// A host has joined; its certificate carries this name. Commands go into `sender`, whose other end the link owns; a
    /// newer connection of the same host takes the place of an older one, whose sender is dropped.
    Joined {
        /// The host.
        host: HostName,
        /// Tells this connection from earlier ones of the host.
        connection: u64,
        /// Release of its daemon.
        release: String,
        /// Changes with each start of its daemon.
        boot_nonce: u64,
        /// Where commands go.
        sender: mpsc::Sender<ToHost>,
        /// For streams to its guests; a test's host has none.
        streams: Option<quinn::Connection>,
    },
    /// A message.
    Said {
        /// The host.
        host: HostName,
        /// The connection it came by.
        connection: u64,
        /// The message.
        message: FromHost,
    },
    /// The connection has ended.
    Left {
        /// The host.
        host: HostName,
        /// The connection.
        connection: u64,
    },
}

/// A live connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: u64,
    pub(super) sender: mpsc::Sender<ToHost>,
    pub(super) streams: Option<quinn::Connection>,
    pub(super) in_flight: BTreeMap<u64, InFlight>,
}

/// What is known of a host now; nothing of it is kept.
#[derive(Debug)]
pub(super) struct HostRuntime {
    pub(super) link: Option<Link>,
    /// When it was last heard of, in monotonic milliseconds; before that, until when it has to join after a start.
    pub(super) last_heard_mono_ms: u64,
    /// Whether it was heard of at all since then.
    pub(super) heard: bool,
    pub(super) lost: bool,
    pub(super) capacity: Option<Capacity>,
    /// As of its last heartbeat.
    pub(super) machines: BTreeMap<MachineId, MachineReport>,
    /// Heartbeats in a row of this connection that lacked a machine placed here.
    pub(super) missing: BTreeMap<MachineId, u32>,
}

impl HostRuntime {
    /// A host on record that has not been heard of yet. It counts as heard of at `mono_ms`, which may lie ahead.
    pub(super) fn known(mono_ms: u64) -> Self {
        Self {
            link: None,
            last_heard_mono_ms: mono_ms,
            heard: false,
            lost: false,
            capacity: None,
            machines: BTreeMap::new(),
            missing: BTreeMap::new(),
        }
    }

    pub(super) fn state(&self) -> HostState {
        match (&self.link, self.lost) {
            (Some(_), false) => HostState::Online,
            (None, false) => HostState::Connecting,
            (_, true) => HostState::Lost,
        }
    }

    /// Whether it is connected and has said what it has.
    pub(super) fn usable(&self) -> bool {
        self.link.is_some() && !self.lost && self.capacity.is_some()
    }
}

impl Core {
    /// Takes up what a host link brings.
    pub fn host_input(&mut self, input: HostInput) {
        match input {
            HostInput::Joined { host, connection, release, boot_nonce, sender, streams } => {
                let link = Link { connection, sender, streams, in_flight: BTreeMap::new() };
                self.host_joined(host, link, release, boot_nonce);
            }
            HostInput::Said { host, connection, message } => {
                let Some(runtime) = self.hosts.get_mut(&host) else { return };
                // What an earlier connection still had to say is out of date.
                if runtime.link.as_ref().is_none_or(|link| link.connection != connection) {
                    return;
                }
                runtime.last_heard_mono_ms = self.now.mono_ms;
                runtime.heard = true;
                let was_lost = std::mem::take(&mut runtime.lost);
                if was_lost {
                    self.host_event(&host, EventKind::HostOnline, format!("host {host} is heard of again"));
                    self.ask_sources_on(&host);
                }
                self.host_said(&host, message);
            }
            HostInput::Left { host, connection } => {
                let Some(runtime) = self.hosts.get_mut(&host) else { return };
                if runtime.link.as_ref().is_some_and(|link| link.connection == connection) {
                    // Dropping the waiting queries tells those who asked.
                    runtime.link = None;
                }
            }
        }
    }

    fn host_joined(&mut self, host: HostName, link: Link, release: String, boot_nonce: u64) {
        let mono_ms = self.now.mono_ms;
        let runtime = self.hosts.entry(host.clone()).or_insert_with(|| HostRuntime::known(mono_ms));
        let welcome =
            ToHost::Welcome { version: wire::fleet::VERSION, heartbeat_ms: self.config.heartbeat_ms };
        // A queue that is closed already belongs to a link that reports its end next.
        let _ = link.sender.try_send(welcome);
        runtime.link = Some(link);
        runtime.last_heard_mono_ms = mono_ms;
        runtime.heard = true;
        runtime.lost = false;
        runtime.capacity = None;
        runtime.machines.clear();
        runtime.missing.clear();
        let known = self.model.host(&host).cloned();
        let joined_unix_ms = known.as_ref().map_or(self.now.unix_ms, |known| known.joined_unix_ms);
        let record = HostRecord { name: host.clone(), release, boot_nonce, joined_unix_ms };
        if known.as_ref() != Some(&record) {
            self.model.put_host(record);
        }
        self.host_event(&host, EventKind::HostOnline, format!("host {host} is online"));
        self.ask_sources_on(&host);
    }

    fn host_said(&mut self, host: &HostName, message: FromHost) {
        match message {
            // The link has taken the first one; another one is a mistake that harms nobody.
            FromHost::Hello { .. } => tracing::warn!(%host, "a second Hello is ignored"),
            FromHost::Heartbeat { capacity, machines } => self.heartbeat(host, capacity, machines),
            FromHost::Answer { op, answer } => self.host_answered(host, op, answer),
            FromHost::Progress(progress) => self.migration_progress(host, progress),
            FromHost::Ended { migration, outcome } => self.migration_ended(host, migration, outcome),
            FromHost::GuestEnded { machine, epoch, end } => self.guest_ended(host, machine, epoch, &end),
        }
    }

    fn host_answered(&mut self, host: &HostName, op: u64, answer: Answer) {
        let link = self.hosts.get_mut(host).and_then(|runtime| runtime.link.as_mut());
        match link.and_then(|link| link.in_flight.remove(&op)) {
            Some(InFlight::Purpose(purpose)) => {
                tracing::debug!(%host, op, ?purpose, ?answer, "answer");
                self.answered(host, purpose, answer);
            }
            // Whoever asked may have stopped waiting.
            Some(InFlight::Query(waiting)) => drop(waiting.send(answer)),
            None => tracing::debug!(%host, op, "an answer nobody waits for"),
        }
    }

    /// Marks hosts as lost that have been silent for too long.
    pub(super) fn notice_lost_hosts(&mut self) {
        let silence = u64::from(self.config.heartbeat_ms) * HEARTBEATS_MISSED_MAX;
        let now = self.now.mono_ms;
        let lost: Vec<_> = self
            .hosts
            .iter_mut()
            .filter(|(_, host)| !host.lost && now.saturating_sub(host.last_heard_mono_ms) > silence)
            .map(|(name, host)| {
                host.lost = true;
                name.clone()
            })
            .collect();
        for host in lost {
            let message =
                format!("host {host} has been silent for {silence} ms; its machines may well be running");
            self.host_event(&host, EventKind::HostLost, message);
            self.migrations_lost_host(&host);
        }
    }

    fn host_event(&mut self, host: &HostName, kind: EventKind, message: String) {
        let about = About { host: Some(host.clone()), ..About::default() };
        self.model.event(self.now.unix_ms, kind, about, message);
    }

    /// RAM in bytes and vCPUs of everything on record for each host, and of the part of it that its last heartbeat does not
    /// show yet.
    fn placed(&self) -> BTreeMap<HostName, Placed> {
        let mut placed: BTreeMap<HostName, Placed> = BTreeMap::new();
        let mut add = |host: &HostName, machine: MachineId, ram: u64, vcpus: u32, counts: bool| {
            let reported = self.hosts.get(host).is_some_and(|h| h.machines.contains_key(&machine));
            let entry = placed.entry(host.clone()).or_default();
            entry.ram_bytes = entry.ram_bytes.saturating_add(ram);
            entry.vcpus = entry.vcpus.saturating_add(vcpus);
            entry.machines += u32::from(counts);
            if !reported {
                entry.unreported_ram_bytes = entry.unreported_ram_bytes.saturating_add(ram);
            }
        };
        for machine in self.model.machines() {
            let has_ram =
                !matches!(machine.lifecycle, Lifecycle::Stopped | Lifecycle::Failed | Lifecycle::Gone);
            if let (Some(host), true) = (&machine.host, has_ram) {
                add(host, machine.id, machine.ram_bytes, machine.vcpus, true);
            }
            // A copy that is still to be cleared away is in its host's own report for as long as it holds RAM.
            let migration = machine.migration.and_then(|id| self.model.migration(id));
            if let Some(migration) = migration {
                add(&migration.target, machine.id, machine.ram_bytes, machine.vcpus, false);
            }
        }
        placed
    }

    /// The fleet as placement sees it, with the machines on each host.
    pub(super) fn fleet(&self) -> Vec<(HostModel, Placed)> {
        let mut placed = self.placed();
        let model = |(name, runtime): (&HostName, &HostRuntime)| {
            let placed = placed.remove(name).unwrap_or_default();
            let capacity = runtime.capacity.as_ref();
            let ram_bytes = capacity.map_or(0, |capacity| capacity.ram_bytes);
            let by_record = ram_bytes.saturating_sub(placed.ram_bytes);
            let by_report = capacity
                .map_or(0, |capacity| capacity.ram_free_bytes)
                .saturating_sub(placed.unreported_ram_bytes);
            let vcpus =
                capacity.map_or(0, |capacity| capacity.cpus.saturating_mul(self.config.vcpus_per_cpu));
            let host = HostModel {
                name: name.clone(),
                usable: runtime.usable(),
                ram_free_bytes: by_record.min(by_report),
                ram_bytes,
                vcpus_free: vcpus.saturating_sub(placed.vcpus),
                vcpus,
                features: capacity.map(|c| c.cpu_features.iter().cloned().collect()).unwrap_or_default(),
            };
            (host, placed)
        };
        self.hosts.iter().map(model).collect()
    }
}

/// What is on record for a host.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Placed {
    pub(super) ram_bytes: u64,
    pub(super) unreported_ram_bytes: u64,
    pub(super) vcpus: u32,
    pub(super) machines: u32,
}
