//! Telling the fabric where a machine is now: gratuitous ARP (RFC 5227, section 3) and unsolicited neighbour
//! advertisements with the override flag (RFC 4861, section 7.2.6).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::Addresses;
use super::packet::FrameSocket;

const BROADCAST: [u8; 6] = [0xff; 6];
/// Ethernet address of the all-nodes group `ff02::1`.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;

/// Sends announcements out of the uplink.
#[derive(Debug)]
pub struct Announcer {
    socket: FrameSocket,
    uplink_mac: [u8; 6],
}

impl Announcer {
    /// Opens it for the uplink with this interface index and MAC.
    ///
    /// # Errors
    /// The socket's; needs `CAP_NET_RAW`.
    pub fn open(uplink: u32, uplink_mac: [u8; 6]) -> io::Result<Self> {
        Ok(Self { socket: FrameSocket::open(uplink)?, uplink_mac })
    }

    /// Announces once that the machine is behind this host's uplink. Linux ignores an ARP update within a second of the
    /// last one (`locktime`), so the caller repeats it; until a peer believes it, the forward route serves that peer.
    ///
    /// # Errors
    /// The first frame that could not be sent.
    pub fn announce(&self, machine: &Addresses) -> io::Result<()> {
        self.socket.send(&gratuitous_arp(self.uplink_mac, machine.ip4))?;
        self.socket.send(&neighbour_advertisement(self.uplink_mac, machine.ip6))
    }
}

fn gratuitous_arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac);
    // Ethertype ARP; hardware Ethernet, protocol IPv4, lengths 6 and 4, operation request.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend([0; 6]);
    frame.extend(ip.octets());
    frame
}

fn neighbour_advertisement(mac: [u8; 6], ip: Ipv6Addr) -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    // Type 136, code 0, checksum 0 for now, flags: router and override.
    message.extend([136, 0, 0, 0, 0xa0, 0, 0, 0]);
    message.extend(ip.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let sum = icmpv6_checksum(ip, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = Vec::with_capacity(54 + message.len());
    frame.extend(ALL_NODES_MAC);
    frame.extend(mac);
    // Ethertype IPv6; version 6; payload of 32 bytes; ICMPv6; hop limit 255 as RFC 4861 demands.
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    frame.extend(ip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// Internet checksum over pseudo-header and message (RFC 4443, section 2.3).
fn icmpv6_checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| {
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |&b| u32::from(b))).sum::<u32>()
    };
    let length = u32::try_from(message.len()).unwrap_or(0);
    let mut sum = words(&from.octets()) + words(&to.octets()) + length + u32::from(ICMPV6) + words(message);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertisement_checks_out_at_the_receiver() {
        let ip: Ipv6Addr = "2001:db8:6d61::2".parse().unwrap();
        let frame = neighbour_advertisement([2, 0, 0, 0, 0, 1], ip);
        assert_eq!(frame.len(), 14 + 40 + 32);
        // A receiver sums over the message with its checksum in it and gets all ones.
        assert_eq!(icmpv6_checksum(ip, ALL_NODES, &frame[54..]), 0);
    }

    #[test]
    fn arp_has_the_address_as_sender_and_target() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 1], Ipv4Addr::new(198, 19, 0, 7));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], [198, 19, 0, 7]);
        assert_eq!(frame[38..42], [198, 19, 0, 7]);
    }
}
