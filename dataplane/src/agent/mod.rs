//! The agent: the one thread of `mashined` that talks to the control plane, starts and ends VMMs, and changes the host's network.
//!
//! It runs tokio on a single thread. [`Host`] is what it knows; it is only ever touched from this thread, and no borrow of it
//! lives across an await. A command is one async function in [`commands`], [`lifecycle`] or [`moves`] that reads from top to bottom.

mod adopt;
mod blobs;
pub mod capacity;
mod commands;
mod disks;
mod guest;
mod identity;
mod lifecycle;
pub mod link;
mod machine;
mod moves;
mod reports;
mod work;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::LocalSet;
use wire::fleet::{FromHost, HostPhase, VERSION};
use wire::ids::{Epoch, HostName, MachineId, MigrationId, StateId};

use self::capacity::Ledger;
use self::link::LinkEvent;
use self::machine::Machine;
use self::moves::{Incoming, Outgoing};
use crate::doorbell::doorbell;
use crate::net::HostNetwork;
use crate::quic::TransportOptions;
use crate::shard::{self, ORDERS_MAX, ShardHandles, ShardReport, ShardStart};
use crate::shards::Shards;
use crate::vm::claim::Lost;

/// How a host is set up.
#[derive(Debug, Clone, clap::Parser)]
#[command(
    name = "mashined",
    version,
    about = "The daemon of a mashines host: runs its machines and moves them"
)]
pub struct HostConfig {
    /// Name of this host; must be the one in its certificate
    #[arg(long)]
    pub name: HostName,
    /// Directory for what belongs to this host's machines; on a tmpfs, as it does not outlive them
    #[arg(long)]
    pub state: PathBuf,
    /// Directory with ca.pem, and this host's cert.pem and key.pem (see `mashines fleet host-cert`)
    #[arg(long)]
    pub fleet: PathBuf,
    /// Where the control plane listens for hosts
    #[arg(long)]
    pub control: SocketAddr,
    /// Directory for images and kernels, by their digests; may be shared with other hosts and the control plane. By default, `images` in the state directory
    #[arg(long)]
    pub images: Option<PathBuf>,
    /// Directory for the disks of machines; by default, `disks` in the state directory, and then they do not outlive a reboot
    #[arg(long)]
    pub disks: Option<PathBuf>,
    /// Interface that leads to the other hosts and to the clients
    #[arg(long, default_value = "uplink")]
    pub uplink: String,
    /// Shards (executors, one a core); by default one for each core
    #[arg(long)]
    pub shards: Option<usize>,
    /// RAM for machines, for example 4G; by default all of the host's but 1 GiB
    #[arg(long, value_parser = parse_size)]
    pub ram_limit: Option<u64>,
    /// After so many seconds of silence another host counts as dead, and is dialled anew; slow hosts need more
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub peer_timeout: u16,
    /// The mashine-vmm program
    #[arg(long, default_value = "mashine-vmm")]
    pub vmm: PathBuf,
    /// Act as if this CPU lacked a feature (may be repeated): for tests of what happens then
    #[arg(long, value_name = "FEATURE")]
    pub without_cpu_feature: Vec<String>,
    /// Act as if this release spoke no newer migration protocol than this: for tests of what happens then
    #[arg(long, value_name = "VERSION", hide = true)]
    pub migration_version_max: Option<u16>,
}

/// Parses `512M`, `4G`, `1T` or plain bytes.
///
/// # Errors
/// What is wrong with the text, for people.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("`{text}` is no size: write 512M, 4G or a number of bytes"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

/// What the agent knows of its host. Touched only from the agent's thread.
pub(crate) struct Host {
    config: HostConfig,
    boot_nonce: u64,
    /// With what this host remembers its machines.
    state: StateId,
    net: HostNetwork,
    shards: ShardHandles,
    /// Where each shard can be dialled, on the fabric.
    data_addresses: Vec<SocketAddr>,
    ledger: RefCell<Ledger>,
    machines: RefCell<BTreeMap<MachineId, Rc<Machine>>>,
    outgoing: RefCell<BTreeMap<MigrationId, Rc<Outgoing>>>,
    incoming: RefCell<BTreeMap<MigrationId, Rc<Incoming>>>,
    /// Epochs that must never run here, by machine.
    fences: RefCell<BTreeMap<MachineId, Epoch>>,
    /// Machines that were moved here, may have run, and are gone.
    lost: RefCell<Lost>,
    to_control: RefCell<Option<mpsc::Sender<FromHost>>>,
    /// For streams beside the commands, while the link is up.
    connection: RefCell<Option<quinn::Connection>>,
    blobs: blobs::Blobs,
    heartbeat: Cell<Duration>,
    changed: Notify,
}

impl Host {
    fn machine(&self, id: MachineId) -> Option<Rc<Machine>> {
        self.machines.borrow().get(&id).cloned()
    }

    /// Has a heartbeat sent soon.
    fn note_change(&self) {
        self.changed.notify_one();
    }

    /// Says something to the control plane, if the link is up. What is lost is asked for again.
    fn say(&self, message: FromHost) {
        let link = self.to_control.borrow().clone();
        if let Some(link) = link
            && link.try_send(message).is_err()
        {
            tracing::warn!("the control plane does not read; a report was dropped, it will ask");
        }
    }

    fn beat(&self) -> FromHost {
        let machines = self.machines.borrow().values().map(|m| m.report()).collect();
        FromHost::Heartbeat { capacity: self.ledger.borrow().capacity(), machines }
    }
}

/// Runs the daemon until a signal ends it. Machines go on running without it.
///
/// # Errors
/// What keeps it from starting, with what to do about it.
pub fn run(config: HostConfig) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, serve(config))
}

async fn serve(config: HostConfig) -> anyhow::Result<()> {
    let trust = pki::Trust::load(&config.fleet)
        .with_context(|| format!("cannot read this host's keys in {}", config.fleet.display()))?;
    let trust = Arc::new(trust);
    std::fs::create_dir_all(config.state.join("vms"))
        .with_context(|| format!("cannot use {} for state", config.state.display()))?;
    let state = identity::of(&config.state)?;
    let net = HostNetwork::open(&config.uplink).await?;
    let mut found = adopt::find(&config.state);
    found.clear_remains(&net).await;
    let (survivors, lost) = (found.survivors, found.lost);
    let adopted_epochs: Vec<Epoch> = survivors.iter().map(|s| s.adopted.epoch).collect();
    let (reports_in, reports) = mpsc::unbounded_channel();
    let (shards, handles, ports) = start_shards(&config, &trust, reports_in, adopted_epochs).await?;
    let fabric = net.fabric_addresses();
    let data_addresses = ports.iter().map(|port| SocketAddr::from((fabric.ip4, *port))).collect();
    let host = Rc::new(Host {
        ledger: RefCell::new(Ledger::of_this_host(config.ram_limit, &config.without_cpu_feature)),
        net,
        shards: handles,
        data_addresses,
        machines: RefCell::default(),
        outgoing: RefCell::default(),
        incoming: RefCell::default(),
        fences: RefCell::default(),
        lost: RefCell::new(lost),
        to_control: RefCell::default(),
        connection: RefCell::default(),
        blobs: blobs::Blobs::new(config.images.clone().unwrap_or_else(|| config.state.join("images"))),
        heartbeat: Cell::new(Duration::from_secs(1)),
        changed: Notify::new(),
        boot_nonce: boot_nonce(),
        state,
        config,
    });
    host.adopt(survivors).await;
    let (events_in, events) = mpsc::channel(256);
    let hello = hello(&host.config.name, host.boot_nonce);
    let link = tokio::task::spawn_local(link::keep(host.config.control, trust, hello, events_in));
    tracing::info!(host = %host.config.name, shards = shards.count(), "ready");
    let ended = attend(&host, events, reports).await;
    link.abort();
    for index in 0..host.shards.count() {
        let _ended_already = host.shards.at(index).send(shard::ShardOrder::End).await;
    }
    for shard in shards.join() {
        shard?;
    }
    ended
}

type Started = (Shards<()>, ShardHandles, Vec<u16>);

async fn start_shards(
    config: &HostConfig,
    trust: &Arc<pki::Trust>,
    agent: mpsc::UnboundedSender<ShardReport>,
    adopted_epochs: Vec<Epoch>,
) -> anyhow::Result<Started> {
    let limit = config.shards.unwrap_or(usize::MAX).min(crate::shards::available_cores().len()).max(1);
    let mut ringers = Vec::new();
    let mut starts = Vec::new();
    let mut bounds = Vec::new();
    for _ in 0..limit {
        let (ringer, orders) = doorbell(ORDERS_MAX)?;
        ringers.push(ringer);
        let (bound, wait) = oneshot::channel();
        starts.push((orders, bound));
        bounds.push(wait);
    }
    let handles = ShardHandles::new(ringers);
    let starts: Vec<_> = starts
        .into_iter()
        .map(|(orders, bound)| {
            std::sync::Mutex::new(Some(ShardStart {
                bind: SocketAddr::from(([0; 16], 0)),
                trust: trust.clone(),
                options: transport(config),
                orders,
                shards: handles.clone(),
                agent: agent.clone(),
                adopted_epochs: adopted_epochs.clone(),
                bound,
            }))
        })
        .collect();
    let starts: Arc<[_]> = starts.into();
    let shards = Shards::start(Some(limit), move |seat| {
        let start = starts.get(seat.index).and_then(|slot| slot.lock().ok()?.take());
        async move {
            if let Some(start) = start {
                shard::run(seat, start).await;
            }
        }
    })?;
    let mut ports = Vec::new();
    for wait in bounds {
        ports.push(wait.await.context("a shard ended before it was ready")??.port());
    }
    Ok((shards, handles, ports))
}

fn transport(config: &HostConfig) -> TransportOptions {
    let idle_timeout = Duration::from_secs(config.peer_timeout.into());
    // Two or three probes may be lost.
    TransportOptions { idle_timeout, keep_alive: idle_timeout / 6, ..TransportOptions::default() }
}

/// Differs between two starts of the daemon on one host: all that is asked of it.
fn boot_nonce() -> u64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX) ^ u64::from(std::process::id())
}

fn hello(name: &HostName, boot_nonce: u64) -> FromHost {
    FromHost::Hello {
        version: VERSION,
        host: name.clone(),
        boot_nonce,
        release: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Attends to everything until a signal comes.
async fn attend(
    host: &Rc<Host>,
    mut events: mpsc::Receiver<LinkEvent>,
    mut reports: mpsc::UnboundedReceiver<ShardReport>,
) -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            biased;
            Some(report) = reports.recv() => host.take_report(report),
            Some(event) = events.recv() => {
                if let LinkEvent::Up { heartbeat, .. } = &event {
                    beat = tokio::time::interval(*heartbeat);
                }
                host.take_link_event(event);
            }
            () = host.changed.notified() => host.say(host.beat()),
            _ = beat.tick() => host.say(host.beat()),
            _ = terminate.recv() => return Ok(()),
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
        }
    }
}

impl Host {
    fn take_link_event(self: &Rc<Self>, event: LinkEvent) {
        match event {
            LinkEvent::Up { to_control, heartbeat, connection } => {
                self.heartbeat.set(heartbeat);
                self.to_control.replace(Some(to_control));
                self.connection.replace(Some(connection));
                self.say(self.beat());
                for machine in self.machines.borrow().values() {
                    if machine.phase() == HostPhase::Ended
                        && let Some(end) = machine.end()
                    {
                        self.say(FromHost::GuestEnded { machine: machine.id(), epoch: machine.epoch(), end });
                    }
                }
            }
            LinkEvent::Command { op, command } => {
                let host = self.clone();
                tokio::task::spawn_local(async move {
                    let answer = host.carry_out(*command).await;
                    // An answer is waited for at the other end, so it waits for room; a link that broke is asked again.
                    let link = host.to_control.borrow().clone();
                    if let Some(link) = link {
                        let _link_broke = link.send(FromHost::Answer { op, answer }).await;
                    }
                    host.note_change();
                });
            }
            LinkEvent::Stream { send, receive } => {
                tokio::task::spawn_local(guest::serve(self.clone(), send, receive));
            }
            LinkEvent::Down => {
                self.to_control.replace(None);
                self.connection.replace(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        assert_eq!(parse_size("17"), Ok(17));
        for bad in ["", "G", "-1", "1.5G", "99999999T", "1GB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
