//! What a fleet left behind: looked for on the machine itself, not in our own records.

use std::collections::BTreeSet;
use std::path::Path;

use super::layout::FleetName;
use super::{netns, processes};

/// Things of the kind a fleet makes that were there before it.
#[derive(Debug, Clone)]
pub struct Baseline {
    taps: BTreeSet<String>,
    routes: BTreeSet<String>,
    memfds: BTreeSet<String>,
}

impl Baseline {
    /// Looks at the machine now.
    pub fn take() -> Self {
        Self { taps: taps(), routes: routes(), memfds: memfds() }
    }

    /// One line for each thing of `fleet` that is there now, after it was taken down.
    pub fn leaks(&self, fleet: &FleetName) -> Vec<String> {
        let now = Self::take();
        let mut found = Vec::new();
        let left = processes::of_fleet(fleet);
        found.extend(left.iter().map(|process| format!("process {} (pid {})", process.program, process.pid)));
        found.extend(netns::existing(fleet).iter().map(|name| format!("namespace {name}")));
        found.extend(now.taps.difference(&self.taps).map(|name| format!("tap {name}")));
        found.extend(now.routes.difference(&self.routes).map(|route| format!("route {route}")));
        found.extend(now.memfds.difference(&self.memfds).map(|memfd| format!("memfd {memfd}")));
        if fleet.state_dir().exists() {
            found.push(format!("directory {}", fleet.state_dir().display()));
        }
        found
    }
}

/// Taps in the user's namespace: a fleet's belong into its own namespaces.
fn taps() -> BTreeSet<String> {
    let Ok(links) = std::fs::read_dir("/sys/class/net") else { return BTreeSet::new() };
    links
        .flatten()
        .filter(|link| link.path().join("tun_flags").exists())
        .map(|link| link.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Routes of the user's namespace.
fn routes() -> BTreeSet<String> {
    ["/proc/net/route", "/proc/net/ipv6_route"].iter().flat_map(|file| route_lines(Path::new(file))).collect()
}

/// Destination, gateway and link of each route; the other columns are counters that change by themselves.
fn route_lines(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            match columns.as_slice() {
                // IPv6: destination, prefix length, source, its length, next hop, then counters, then the link.
                [to, length, _, _, via, .., link] if columns.len() == 10 => {
                    format!("{to}/{length} via {via} {link}")
                }
                [link, to, via, ..] => format!("{to} via {via} {link}"),
                _ => line.to_owned(),
            }
        })
        .collect()
}

/// Memory files of machines that any process still holds, except processes of a fleet that is up.
fn memfds() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for pid in processes::numbers() {
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
            let target = target.to_string_lossy();
            if target.starts_with("/memfd:mashine") && !processes::belongs_to_a_fleet(pid) {
                found.insert(format!("{target} held by pid {pid}"));
            }
        }
    }
    found
}
