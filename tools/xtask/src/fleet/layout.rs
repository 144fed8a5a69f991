//! Names and addresses of a fleet on one machine: pure, so that `down` finds by name what a crashed `up` left.
//!
//! ```text
//!   namespace mash-NAME-fabric ("the client")          namespace mash-NAME-host-a      mash-NAME-host-b
//!     fabric0  bridge  198.18.0.1/24                      uplink 198.18.0.10/24           uplink 198.18.0.11/24
//!       |              2001:db8:0:f::1/64                        2001:db8:0:f::10/64             ...::11/64
//!       +-- to-host-a ==================================== (veth)                            |
//!       +-- to-host-b =======================================================================+
//! ```
//!
//! Addresses of machines (198.19.0.0/16 and 2001:db8:6d61::/64) are on-link everywhere: whichever host has the machine answers for it.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Addresses of machines, IPv4.
pub const MACHINES_IP4: &str = "198.19.0.0/16";
/// Addresses of machines, IPv6.
pub const MACHINES_IP6: &str = "2001:db8:6d61::/64";
/// The bridge that all hosts hang on, with the client's addresses.
pub const FABRIC_LINK: &str = "fabric0";
/// A host's interface on the fabric.
pub const UPLINK: &str = "uplink";
/// The client's and control plane's address.
pub const FABRIC_IP4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The same, IPv6.
pub const FABRIC_IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0xf, 0, 0, 0, 1);
/// Packet size on the fabric, in bytes: jumbo frames, as a data centre has them.
pub const FABRIC_MTU: u32 = 9000;
/// Most hosts in a fleet on one machine: one letter each.
pub const HOSTS_MAX: u8 = 26;

/// Start of the name of every namespace we make.
const PREFIX: &str = "mash-";
/// Where fleets keep their state: gone after a reboot, as the namespaces are.
const STATE_ROOT: &str = "/run/mashines";

/// Held by whoever brings a fleet up or takes one down.
pub fn lock_file() -> PathBuf {
    Path::new(STATE_ROOT).join("lock")
}

/// Name of a fleet: 1 to 16 of a-z and 0-9.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetName(String);

impl FromStr for FleetName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let ok = (1..=16).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        // No dash: the names of one fleet's namespaces must not begin like another's.
        if !ok {
            bail!("`{text}` is not a fleet name: use 1 to 16 of a-z and 0-9");
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for FleetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FleetName {
    /// Start of the names of this fleet's namespaces.
    pub fn namespace_prefix(&self) -> String {
        format!("{PREFIX}{self}-")
    }

    /// The namespace of the fabric, the control plane and clients.
    pub fn fabric_namespace(&self) -> String {
        format!("{PREFIX}{self}-fabric")
    }

    /// The namespace of a host.
    pub fn host_namespace(&self, host: &Host) -> String {
        format!("{PREFIX}{self}-{}", host.name())
    }

    /// Where the fleet's files are.
    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.0)
    }

    /// The REST API's Unix socket. A path, so that it is reached from any network namespace.
    pub fn api_socket(&self) -> PathBuf {
        self.state_dir().join("api.sock")
    }
}

/// One host of the fleet, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host(u8);

impl Host {
    /// The hosts of a fleet of `count`.
    ///
    /// # Errors
    /// When `count` is 0 or above [`HOSTS_MAX`].
    pub fn first(count: u8) -> Result<Vec<Self>> {
        if !(1..=HOSTS_MAX).contains(&count) {
            bail!("a fleet on one machine has 1 to {HOSTS_MAX} hosts, not {count}");
        }
        Ok((0..count).map(Self).collect())
    }

    /// `host-a` for the first.
    pub fn name(&self) -> String {
        format!("host-{}", char::from(b'a' + self.0))
    }

    /// Its link on the fabric's side.
    pub fn fabric_port(&self) -> String {
        format!("to-{}", self.name())
    }

    /// Its address on the fabric.
    pub fn ip4(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, 0, 10 + self.0)
    }

    /// The same, IPv6; reads like the last number of the IPv4 address.
    pub fn ip6(&self) -> Ipv6Addr {
        let number = u16::from(10 + self.0);
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0xf, 0, 0, 0, 16 * (number / 10) + number % 10)
    }
}

impl FromStr for Host {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = (0..HOSTS_MAX).map(Self).find(|host| host.name() == text);
        found.ok_or_else(|| anyhow::anyhow!("`{text}` is no host: they are called host-a, host-b and so on"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_distinct_names_and_addresses() {
        let hosts = Host::first(HOSTS_MAX).unwrap();
        assert_eq!(hosts[0].name(), "host-a");
        assert_eq!(hosts[25].name(), "host-z");
        assert_eq!(hosts[1].ip4().to_string(), "198.18.0.11");
        assert_eq!(hosts[1].ip6().to_string(), "2001:db8:0:f::11");
        assert_eq!(hosts[10].ip6().to_string(), "2001:db8:0:f::20");
        let distinct = |f: fn(&Host) -> String| {
            hosts.iter().map(f).collect::<std::collections::HashSet<_>>().len() == hosts.len()
        };
        assert!(
            distinct(Host::name) && distinct(|h| h.ip4().to_string()) && distinct(|h| h.ip6().to_string())
        );
        // The kernel allows 15 bytes.
        assert!(hosts.iter().all(|host| host.fabric_port().len() <= 15));
        assert!(hosts.iter().all(|host| host.name().parse::<Host>().unwrap() == *host));
        assert!(["", "host-", "host-A", "a", "host-aa"].iter().all(|text| text.parse::<Host>().is_err()));
        assert!(Host::first(0).is_err() && Host::first(HOSTS_MAX + 1).is_err());
    }

    #[test]
    fn fleet_names_cannot_collide_or_escape() {
        for bad in ["", "a-b", "../x", "A", "a/b", "aaaaaaaaaaaaaaaaa", "ä"] {
            assert!(bad.parse::<FleetName>().is_err(), "{bad}");
        }
        let (one, other): (FleetName, FleetName) = ("a".parse().unwrap(), "ab".parse().unwrap());
        assert!(!other.fabric_namespace().starts_with(&one.namespace_prefix()));
    }
}
