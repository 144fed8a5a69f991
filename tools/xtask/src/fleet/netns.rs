//! The fleet's network: a namespace for the fabric and one for each host, joined by veth pairs.
//!
//! Made with `ip` (iproute2), a batch of commands a namespace. Nothing here touches the namespace of the user, and removing a
//! namespace removes every link, address, route and tap in it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::layout::{
    FABRIC_IP4, FABRIC_IP6, FABRIC_LINK, FABRIC_MTU, FleetName, Host, MACHINES_IP4, MACHINES_IP6, UPLINK,
};
use crate::command;

/// Where iproute2 keeps named namespaces.
const NAMESPACES: &str = "/run/netns";

/// Makes all namespaces and links of a fleet.
///
/// # Errors
/// When one exists already, or `ip` refuses.
pub fn create(fleet: &FleetName, hosts: &[Host]) -> Result<()> {
    let fabric = fleet.fabric_namespace();
    add_namespace(&fabric)?;
    batch(
        &fabric,
        &[
            "link set lo up".to_owned(),
            format!(
                "link add {FABRIC_LINK} mtu {FABRIC_MTU} type bridge stp_state 0 mcast_snooping 0 forward_delay 0"
            ),
            format!("addr add {FABRIC_IP4}/24 dev {FABRIC_LINK}"),
            format!("addr add {FABRIC_IP6}/64 dev {FABRIC_LINK} nodad"),
            format!("link set {FABRIC_LINK} up"),
            format!("route add {MACHINES_IP4} dev {FABRIC_LINK}"),
            format!("route add {MACHINES_IP6} dev {FABRIC_LINK}"),
        ],
    )?;
    hosts.iter().try_for_each(|host| add_host(fleet, host))
}

fn add_host(fleet: &FleetName, host: &Host) -> Result<()> {
    let (namespace, port) = (fleet.host_namespace(host), host.fabric_port());
    add_namespace(&namespace)?;
    batch(
        &fleet.fabric_namespace(),
        &[
            format!(
                "link add {port} mtu {FABRIC_MTU} type veth peer name {UPLINK} mtu {FABRIC_MTU} netns {namespace}"
            ),
            format!("link set {port} master {FABRIC_LINK}"),
            format!("link set {port} up"),
        ],
    )?;
    batch(
        &namespace,
        &[
            "link set lo up".to_owned(),
            format!("addr add {}/24 dev {UPLINK}", host.ip4()),
            format!("addr add {}/64 dev {UPLINK} nodad", host.ip6()),
            format!("link set {UPLINK} up"),
            format!("route add {MACHINES_IP4} dev {UPLINK}"),
            format!("route add {MACHINES_IP6} dev {UPLINK}"),
            format!("route add default via {FABRIC_IP4} dev {UPLINK}"),
            format!("-6 route add default via {FABRIC_IP6} dev {UPLINK}"),
        ],
    )
}

fn add_namespace(name: &str) -> Result<()> {
    command::read(ip().args(["netns", "add", name])).map(drop)
}

/// Runs `ip` commands in a namespace, stopping at the first that fails.
pub(crate) fn batch(namespace: &str, commands: &[String]) -> Result<()> {
    // A `-6` before the object is an option of `ip`, which a batch line may not have.
    let (v6, plain): (Vec<_>, Vec<_>) = commands.iter().partition(|line| line.starts_with("-6 "));
    run_batch(namespace, &["-batch", "-"], &plain)?;
    let v6: Vec<String> = v6.iter().map(|line| line.trim_start_matches("-6 ").to_owned()).collect();
    run_batch(namespace, &["-6", "-batch", "-"], &v6.iter().collect::<Vec<_>>())
}

fn run_batch(namespace: &str, options: &[&str], lines: &[&String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut command = ip();
    command.args(["-netns", namespace]).args(options);
    let shown = command::shown(&command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{shown}`"))?;
    let mut input = child.stdin.take().ok_or_else(|| anyhow!("no pipe to `{shown}`"))?;
    for line in lines {
        writeln!(input, "{line}").with_context(|| format!("writing to `{shown}`"))?;
    }
    drop(input);
    let output = child.wait_with_output().with_context(|| format!("waiting for `{shown}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed: {}", said.trim());
    }
    Ok(())
}

fn ip() -> Command {
    Command::new(command::locate("ip").unwrap_or_else(|| "ip".into()))
}

/// The fleet's namespaces that exist, by name.
pub fn existing(fleet: &FleetName) -> BTreeSet<String> {
    let prefix = fleet.namespace_prefix();
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return BTreeSet::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

/// Removes all namespaces of a fleet; no matter whether there are any.
///
/// # Errors
/// When `ip` refuses.
pub fn remove(fleet: &FleetName) -> Result<()> {
    for name in existing(fleet) {
        command::read(ip().args(["netns", "delete", &name]))?;
    }
    Ok(())
}

/// Path of a namespace's file.
pub fn path(namespace: &str) -> PathBuf {
    Path::new(NAMESPACES).join(namespace)
}

/// Runs `work` on a thread of its own that has moved into `namespace`. Sockets made there and processes started there
/// belong to the namespace; the rest of this process stays where it is.
///
/// # Errors
/// When the namespace does not exist or may not be entered.
pub fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = path(namespace);
    let file = File::open(&path).with_context(|| format!("opening the namespace {}", path.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || -> Result<T> {
            enter(&file).with_context(|| format!("entering the namespace {}", path.display()))?;
            Ok(work())
        });
        // A panic in `work` is this caller's panic.
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether a process is in the namespace of the file `namespace`.
pub(super) fn is_in(pid: i32, namespace: &Path) -> bool {
    let inode = |path: &Path| std::fs::metadata(path).ok().map(|data| (data.dev(), data.ino()));
    let own = inode(&PathBuf::from(format!("/proc/{pid}/ns/net")));
    own.is_some() && own == inode(namespace)
}

fn enter(namespace: &File) -> Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(anyhow::Error::from)
}
