//! The network of a host: taps, routes, and the switch-over.
//!
//! The host routes, it does not bridge. Each machine has a tap with the same gateway address and MAC on every host, a `/32` and a
//! `/128` route to it, and a fixed neighbour entry for its own MAC, so that nothing needs to be resolved when it wakes up
//! elsewhere. Towards the fabric the host answers ARP and NDP for its machines (proxy entries on the uplink) and announces a
//! machine that has just arrived.
//!
//! A switch-over loses no packet: while the guest is paused they wait in the source's tap queue; the target's route and tap stand
//! before the guest runs there; at Commit the source turns its route into a forward route to the target and puts what waited in the
//! tap back into the kernel ([`Reinjector`]), which forwards it; and late packets from peers whose neighbour cache
//! is old take the same way, for as long as the forward route stands.

mod announce;
mod held;
mod packet;
mod routes;
mod sysctl;
mod tun;

pub use announce::Announcer;
pub use held::Reinjector;
pub use routes::{HostNetwork, NetError};
pub use tun::{Tap, TunError};

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use wire::ids::MachineId;
use wire::vmm::MachineSpec;

/// IPv4 gateway of every guest on every host.
pub const GATEWAY_IP4: Ipv4Addr = Ipv4Addr::new(198, 19, 255, 254);
/// IPv6 gateway of every guest on every host.
pub const GATEWAY_IP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// MAC address of the gateway (locally administered).
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x6d, 0x61, 0x73, 0x68, 0x01];

/// Network identity of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub ip4: Ipv4Addr,
    /// IPv6.
    pub ip6: Ipv6Addr,
    /// MAC of its interface.
    pub mac: [u8; 6],
}

impl From<&MachineSpec> for Addresses {
    fn from(spec: &MachineSpec) -> Self {
        Self { ip4: spec.ip4.into(), ip6: spec.ip6.into(), mac: spec.mac }
    }
}

/// `198.19.0.2 2001:db8::2 02:6d:00:00:00:02`: what a host writes down to know what to clear away after a crash.
impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.mac;
        write!(f, "{} {} {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}", self.ip4, self.ip6)
    }
}

/// A text that is not what [`Addresses`] print as; half of one is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the addresses of a machine")]
pub struct ParseAddressesError;

impl FromStr for Addresses {
    type Err = ParseAddressesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let words: Vec<&str> = text.split_ascii_whitespace().collect();
            let &[ip4, ip6, mac] = words.as_slice() else { return None };
            let octet = |word: &str| u8::from_str_radix(word, 16).ok().filter(|_| word.len() == 2);
            let mac: Option<Vec<u8>> = mac.split(':').map(octet).collect();
            Some(Self { ip4: ip4.parse().ok()?, ip6: ip6.parse().ok()?, mac: mac?.try_into().ok()? })
        };
        parsed().ok_or(ParseAddressesError)
    }
}

/// Name of a machine's tap. Interface names have at most 15 bytes: `mt` and the low 52 bits of the id, whose collision on one host is
/// noticed, because a tap that exists is not opened twice.
pub fn tap_name(machine: MachineId) -> String {
    format!("mt{:013x}", machine.as_u64() & ((1 << 52) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written_and_halves_are_not() {
        let text = "198.19.0.2 2001:db8:6d61::2 02:6d:00:0a:ff:02";
        let addresses: Addresses = text.parse().unwrap();
        assert_eq!(addresses.to_string(), text);
        for length in 0..text.len() {
            assert_eq!(text[..length].parse::<Addresses>(), Err(ParseAddressesError), "{}", &text[..length]);
        }
    }

    #[test]
    fn tap_names_fit_an_interface_name() {
        assert_eq!(tap_name(MachineId::from_u64(u64::MAX)), "mtfffffffffffff");
        assert_eq!(tap_name(MachineId::from_u64(1)).len(), 15);
    }
}
