//! Names and places of the lab: pure, so that `down` finds by name what a crashed `up` left.
//!
//! A machine has one lab at most: each host takes gigabytes and a core, and a second lab would starve the first.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::fleet::layout::{FleetName, Host};

/// The lab's name as a fleet: its namespaces, marks and state directory follow from it.
const NAME: &str = "lab";
/// Disks of hosts are files here: `/run` is memory, and a host's disk is not to be.
const DISKS: &str = "/var/tmp/mashines-lab";
/// Held by the `up` or `down` that is at work.
const LOCK: &str = "/run/mashines/lab.lock";

/// The lab's name.
///
/// # Errors
/// Never, with the name that is built in.
pub fn name() -> Result<FleetName> {
    NAME.parse().context("the lab's own name")
}

/// Whether a fleet's name is the lab's, which nothing but a lab may have.
pub fn is_lab(fleet: &FleetName) -> bool {
    fleet.to_string() == NAME
}

/// The lock's file.
pub fn lock_file() -> &'static Path {
    Path::new(LOCK)
}

/// Directory of the hosts' disks.
pub fn disks_dir() -> &'static Path {
    Path::new(DISKS)
}

/// File behind the disk of a host.
pub fn disk(host: &Host) -> PathBuf {
    disks_dir().join(format!("{}.ext4", host.name()))
}

/// What a host prints, its kernel included.
pub fn console(lab: &FleetName, host: &Host) -> PathBuf {
    lab.state_dir().join(format!("{}.console.log", host.name()))
}

/// Keys and sockets of the way in.
pub fn ssh_dir(lab: &FleetName) -> PathBuf {
    lab.state_dir().join("ssh")
}

/// MAC address of a host's uplink: locally administered, its last byte that of the IPv4 address.
pub fn mac(host: &Host) -> String {
    let [.., last] = host.ip4().octets();
    format!("02:6c:61:62:00:{last:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::layout::HOSTS_MAX;

    #[test]
    fn hosts_share_no_disk_console_or_mac() {
        let lab = name().unwrap();
        assert!(is_lab(&lab) && !is_lab(&"play".parse().unwrap()));
        let hosts = Host::first(HOSTS_MAX).unwrap();
        let all = hosts.iter().flat_map(|host| {
            [disk(host).display().to_string(), console(&lab, host).display().to_string(), mac(host)]
        });
        assert_eq!(all.collect::<std::collections::HashSet<_>>().len(), 3 * hosts.len());
        assert_eq!(mac(&hosts[0]), "02:6c:61:62:00:0a");
    }
}
