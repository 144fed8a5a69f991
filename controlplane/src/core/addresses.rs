//! Addresses of machines: one place in the pools gives a machine its IPv4, its IPv6 and keeps them for life.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use wire::ids::MachineId;

use super::Core;
use crate::api::{Problem, ProblemCode};

/// First place given out: the network address and the one after it stay free.
const FIRST_INDEX: u32 = 2;
/// At the end of the IPv4 pool: the gateway and the broadcast address.
const RESERVED_AT_END: u32 = 2;

/// A range of addresses that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a pool: use ADDRESS/PREFIX with a prefix of 8 to 28 bits (IPv4) or 32 to 96 bits (IPv6)"
)]
pub struct BadPool(String);

/// Where addresses come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pools {
    ip4: Ipv4Pool,
    ip6: Ipv6Pool,
}

impl Pools {
    /// Pairs the pools.
    pub const fn new(ip4: Ipv4Pool, ip6: Ipv6Pool) -> Self {
        Self { ip4, ip6 }
    }

    /// Places that machines can have: the smaller pool decides, which is the IPv4 one.
    fn places(&self) -> std::ops::Range<u32> {
        FIRST_INDEX..(1_u32 << (32 - self.ip4.prefix)) - RESERVED_AT_END
    }

    fn at(&self, index: u32) -> (Ipv4Addr, Ipv6Addr) {
        let ip4 = Ipv4Addr::from_bits(self.ip4.first.to_bits() | index);
        let ip6 = Ipv6Addr::from_bits(self.ip6.first.to_bits() | u128::from(index));
        (ip4, ip6)
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            ip4: Ipv4Pool { first: Ipv4Addr::new(198, 19, 0, 0), prefix: 16 },
            ip6: Ipv6Pool { first: Ipv6Addr::new(0x2001, 0xdb8, 0x6d61, 0, 0, 0, 0, 0), prefix: 64 },
        }
    }
}

/// Range of IPv4 addresses, as `ADDRESS/PREFIX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Pool {
    first: Ipv4Addr,
    prefix: u32,
}

impl FromStr for Ipv4Pool {
    type Err = BadPool;

    fn from_str(text: &str) -> Result<Self, BadPool> {
        let bad = || BadPool(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u32 = prefix.parse().map_err(|_| bad())?;
        if !(8..=28).contains(&prefix) {
            return Err(bad());
        }
        let first = Ipv4Addr::from_bits(address.to_bits() & (u32::MAX << (32 - prefix)));
        Ok(Self { first, prefix })
    }
}

/// Range of IPv6 addresses, as `ADDRESS/PREFIX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Pool {
    first: Ipv6Addr,
    prefix: u32,
}

impl FromStr for Ipv6Pool {
    type Err = BadPool;

    fn from_str(text: &str) -> Result<Self, BadPool> {
        let bad = || BadPool(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv6Addr = address.parse().map_err(|_| bad())?;
        let prefix: u32 = prefix.parse().map_err(|_| bad())?;
        if !(32..=96).contains(&prefix) {
            return Err(bad());
        }
        let first = Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - prefix)));
        Ok(Self { first, prefix })
    }
}

/// What a machine gets.
pub(super) struct Allocation {
    pub index: u32,
    pub ip4: Ipv4Addr,
    pub ip6: Ipv6Addr,
}

impl Core {
    /// The next free place after the one given out last.
    pub(super) fn allocate_address(&mut self) -> Result<Allocation, Problem> {
        let places = self.config.pools.places();
        let cursor = self.model.meta().address_cursor.clamp(places.start, places.end);
        let free = (cursor..places.end)
            .chain(places.start..cursor)
            .find(|&index| !self.model.address_taken(index))
            .ok_or_else(|| {
                Problem::new(
                    ProblemCode::NoAddress,
                    format!("all {} addresses of the IPv4 pool are in use", places.len()),
                    "remove machines (also stopped ones keep their addresses) or start mashines-control with a larger --ip4-pool",
                )
            })?;
        self.model.meta_mut().address_cursor = free + 1;
        let (ip4, ip6) = self.config.pools.at(free);
        Ok(Allocation { index: free, ip4, ip6 })
    }
}

/// MAC address of a machine: locally administered, from the low 40 bits of its id.
pub(super) fn mac(id: MachineId) -> [u8; 6] {
    let [_, _, _, a, b, c, d, e] = id.as_u64().to_be_bytes();
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_parse_and_give_matching_addresses() {
        let pools = Pools::new("198.19.7.9/16".parse().unwrap(), "2001:db8:6d61::/64".parse().unwrap());
        assert_eq!(pools, Pools::default());
        let (ip4, ip6) = pools.at(258);
        assert_eq!((ip4.to_string(), ip6.to_string()), ("198.19.1.2".into(), "2001:db8:6d61::102".into()));
        assert_eq!(pools.at(pools.places().end - 1).0.to_string(), "198.19.255.253");
        for bad in ["", "198.19.0.0", "198.19.0.0/31", "198.19.0.0/x", "::/64", "1.2.3/16"] {
            assert!(bad.parse::<Ipv4Pool>().is_err(), "{bad}");
        }
        for bad in ["2001:db8::", "2001:db8::/128", "1.2.3.4/64"] {
            assert!(bad.parse::<Ipv6Pool>().is_err(), "{bad}");
        }
    }
}
