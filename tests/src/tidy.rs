//! What hosts hold, read from the kernel: one copy of a machine where it belongs, and nothing of it elsewhere.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use controlplane::api::MachineState;
use xtask::command;
use xtask::fleet::layout::Host;

use crate::ground::{Ground, until};

/// Late packets are forwarded for 2 s; then the old copy and its routes go. A host that was away hears of it with its next heartbeats.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// What one host holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Processes that run machines.
    pub vmms: usize,
    /// Taps.
    pub taps: usize,
    /// Memory files of machines that its daemon has open or mapped.
    pub memories: usize,
    /// Routes to machines, forward routes included.
    pub routes: BTreeSet<String>,
    /// Addresses of machines that it answers for.
    pub answers: BTreeSet<String>,
    /// Directories of machines.
    pub directories: usize,
}

impl Holdings {
    /// Looks at a host.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn of(ground: &Ground, host: Host) -> Result<Self> {
        let namespace = ground.fleet.name().host_namespace(&host);
        let memories = ground.fleet.pid(&host.name()).map(memories).unwrap_or_default();
        Ok(Self {
            vmms: ground.fleet.vmms_on(&host).len(),
            taps: ip(&namespace, "tuntap show")?.lines().filter(|line| line.contains("tap")).count(),
            memories: memories.len(),
            routes: machine_addresses(&namespace, "route show table all")?,
            answers: machine_addresses(&namespace, "neigh show proxy")?,
            directories: directories(ground, host),
        })
    }
}

fn ip(namespace: &str, words: &str) -> Result<String> {
    let program = command::locate("ip").context("iproute2 is not installed")?;
    command::read(Command::new(program).args(["-netns", namespace]).args(words.split(' ')))
}

/// Addresses of single machines at the start of the lines that `ip` prints for either family.
fn machine_addresses(namespace: &str, words: &str) -> Result<BTreeSet<String>> {
    let text = ip(namespace, &format!("-4 {words}"))? + &ip(namespace, &format!("-6 {words}"))?;
    let words = text.lines().filter_map(|line| line.split_whitespace().next());
    let machine = |word: &&str| word.starts_with("198.19.") || word.starts_with("2001:db8:6d61:");
    Ok(words.filter(machine).filter(|word| !word.contains('/')).map(str::to_owned).collect())
}

/// Directories of machines in a host's state.
fn directories(ground: &Ground, host: Host) -> usize {
    let machines = ground.fleet.name().state_dir().join(host.name()).join("vms");
    std::fs::read_dir(machines).map_or(0, Iterator::count)
}

/// Memory files of machines that a process has open or mapped, by inode.
fn memories(pid: u32) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    for line in maps.lines().filter(|line| line.contains("/memfd:mashine")) {
        found.extend(line.split_whitespace().nth(4).map(str::to_owned));
    }
    let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return found };
    for descriptor in open.flatten() {
        use std::os::unix::fs::MetadataExt;
        let target = std::fs::read_link(descriptor.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:mashine")
            && let Ok(file) = std::fs::metadata(descriptor.path())
        {
            found.insert(file.ino().to_string());
        }
    }
    found
}

/// The machine, the only one of the fleet, runs on `host`, in the records as in the kernel, and the other host holds nothing of it
/// any more.
///
/// # Errors
/// When that is not so in time, with what each host holds.
pub fn is_on(ground: &Ground, machine: &str, host: Host) -> Result<()> {
    let elsewhere = ground.other(host);
    until(&format!("only {} to hold the machine", host.name()), SETTLE_LIMIT, || {
        let view = ground.machine(machine)?;
        let placed = view.host.as_ref().is_some_and(|name| name.as_str() == host.name());
        let (here, there) = (Holdings::of(ground, host)?, Holdings::of(ground, elsewhere)?);
        let owned = BTreeSet::from([view.ip4.to_string(), view.ip6.to_string()]);
        let routed = here.routes == owned && here.answers == owned;
        let one = here.vmms == 1 && here.taps == 1 && here.memories > 0 && here.directories == 1;
        if placed && view.state == MachineState::Started && one && routed && there == Holdings::default() {
            return Ok(Ok(()));
        }
        Ok(Err(format!(
            "the record says {} on {:?}; {} holds {here:?}, {} holds {there:?}",
            view.state,
            view.host.map(|name| name.to_string()),
            host.name(),
            elsewhere.name()
        )))
    })
}

/// The host that the control plane has the machine on.
///
/// # Errors
/// When it is on none.
pub fn host_of(ground: &Ground, machine: &str) -> Result<Host> {
    let host = ground.machine(machine)?.host.context("it is on no host")?;
    ground.host(host.as_str())
}

/// Nobody holds anything of any machine.
///
/// # Errors
/// When somebody does.
pub fn nothing_is_held(ground: &Ground) -> Result<()> {
    until("all hosts to hold nothing", SETTLE_LIMIT, || {
        let (a, b) = (Holdings::of(ground, ground.a)?, Holdings::of(ground, ground.b)?);
        let empty = Holdings::default();
        Ok(if a == empty && b == empty { Ok(()) } else { Err(format!("{a:?}, {b:?}")) })
    })
}

/// Both hosts hold `count` machines each, and nothing more.
///
/// # Errors
/// When that is not so in time.
pub fn each_holds(ground: &Ground, count: usize) -> Result<()> {
    until(&format!("each host to hold {count} machines"), SETTLE_LIMIT, || {
        let (a, b) = (Holdings::of(ground, ground.a)?, Holdings::of(ground, ground.b)?);
        let right = |held: &Holdings| {
            held.vmms == count
                && held.taps == count
                && held.directories == count
                // One of each family.
                && held.routes.len() == 2 * count
                && held.answers == held.routes
        };
        let apart = a.routes.is_disjoint(&b.routes);
        Ok(if right(&a) && right(&b) && apart { Ok(()) } else { Err(format!("{a:?}, {b:?}")) })
    })
}
