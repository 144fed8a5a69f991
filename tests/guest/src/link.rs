//! Ethernet, ARP and neighbour discovery, as far as a host behind one router needs them.
//!
//! The guest sends everything that is not for itself to its gateway, so there is no neighbour table: only the MAC
//! of the IPv4 and of the IPv6 next hop. They are asked for until they are known, and changed whenever the gateway
//! announces another one. Nothing expires, so an established connection never waits for a neighbour; but while there is traffic the
//! gateway is asked again now and then, so that a wrong answer does not stay for ever.
//! Frames that make no sense are dropped.

use core::net::{Ipv4Addr, Ipv6Addr};

/// A hardware address.
pub type Mac = [u8; 6];
/// Bytes before the IP packet.
pub const HEADER_BYTES: usize = 14;
/// Longest frame this module makes by itself.
pub const MAX_OWN_FRAME: usize = 86;
/// Time between two questions for the gateway, microseconds.
const ASK_EVERY_US: u64 = 100_000;
/// The same once it is known.
const ASK_AGAIN_US: u64 = 10_000_000;

const BROADCAST: Mac = [0xff; 6];
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const SOLICIT: u8 = 135;
const ADVERTISE: u8 = 136;

/// What a received frame was.
#[derive(Debug, PartialEq, Eq)]
pub enum Inbound {
    /// An IP packet, from byte 14 of the frame.
    Ip,
    /// A question; its answer is in the buffer, this long.
    Answer(usize),
    /// Nothing to pass on.
    Done,
}

/// The link layer of one interface.
pub struct Link {
    mac: Mac,
    ip4: Option<Ipv4Addr>,
    gw4: Option<Ipv4Addr>,
    ip6: Option<Ipv6Addr>,
    gw6: Option<Ipv6Addr>,
    link_local: Ipv6Addr,
    hop4: Option<Mac>,
    hop6: Option<Mac>,
    ask4_at: u64,
    ask6_at: u64,
    /// Whether IP packets came since the gateway was last asked.
    traffic4: bool,
    traffic6: bool,
}

impl Link {
    /// An interface with no next hop known yet.
    #[must_use]
    pub fn new(
        mac: Mac,
        ip4: Option<Ipv4Addr>,
        gw4: Option<Ipv4Addr>,
        ip6: Option<Ipv6Addr>,
        gw6: Option<Ipv6Addr>,
    ) -> Self {
        let link_local = link_local(mac);
        Self {
            mac,
            ip4,
            gw4,
            ip6,
            gw6,
            link_local,
            hop4: None,
            hop6: None,
            ask4_at: 0,
            ask6_at: 0,
            traffic4: false,
            traffic6: false,
        }
    }

    /// The link-local address made of the MAC.
    #[must_use]
    pub fn link_local(&self) -> Ipv6Addr {
        self.link_local
    }

    /// The Ethernet header for an IP packet with this first byte, if its next hop is known.
    #[must_use]
    pub fn header(&self, first_byte: u8) -> Option<[u8; HEADER_BYTES]> {
        match first_byte >> 4 {
            4 => Some(header(self.hop4?, self.mac, TYPE_IPV4)),
            6 => Some(header(self.hop6?, self.mac, TYPE_IPV6)),
            _ => None,
        }
    }

    /// Looks at a received frame; an answer to it goes to `answer`.
    pub fn inbound(&mut self, frame: &[u8], answer: &mut [u8; MAX_OWN_FRAME]) -> Inbound {
        let Some((head, payload)) = frame.split_first_chunk::<HEADER_BYTES>() else { return Inbound::Done };
        let source = copy(&head[6..12]);
        match [head[12], head[13]] {
            TYPE_ARP => self.arp(payload, answer),
            TYPE_IPV4 => {
                self.traffic4 = true;
                if self.gw4.is_none() {
                    self.hop4 = Some(source);
                }
                Inbound::Ip
            }
            TYPE_IPV6 => {
                if let Some(ndp) = Ndp::parse(payload) {
                    return self.ndp(&ndp, source, answer);
                }
                self.traffic6 = true;
                if self.gw6.is_none() {
                    self.hop6 = Some(source);
                }
                Inbound::Ip
            }
            _ => Inbound::Done,
        }
    }

    /// A question for a gateway: every 100 ms while it is not known, every 10 s with traffic when it is. Its length.
    pub fn ask(&mut self, now_us: u64, frame: &mut [u8; MAX_OWN_FRAME]) -> Option<usize> {
        if (self.hop4.is_none() || self.traffic4)
            && now_us >= self.ask4_at
            && let (Some(ip4), Some(gw4)) = (self.ip4, self.gw4)
        {
            self.ask4_at = now_us + if self.hop4.is_none() { ASK_EVERY_US } else { ASK_AGAIN_US };
            self.traffic4 = false;
            return Some(arp_frame(frame, 1, self.mac, ip4, BROADCAST, [0; 6], gw4));
        }
        if (self.hop6.is_none() || self.traffic6)
            && now_us >= self.ask6_at
            && let Some(gw6) = self.gw6
        {
            self.ask6_at = now_us + if self.hop6.is_none() { ASK_EVERY_US } else { ASK_AGAIN_US };
            self.traffic6 = false;
            let gw = gw6.octets();
            let source = if gw6.is_unicast_link_local() { self.link_local } else { self.ip6? };
            let group = Ipv6Addr::new(
                0xff02,
                0,
                0,
                0,
                0,
                1,
                0xff00 | u16::from(gw[13]),
                u16::from_be_bytes([gw[14], gw[15]]),
            );
            let to = [0x33, 0x33, 0xff, gw[13], gw[14], gw[15]];
            return Some(ndp_frame(frame, self.mac, to, source, group, SOLICIT, 0, gw6));
        }
        None
    }

    fn arp(&mut self, packet: &[u8], answer: &mut [u8; MAX_OWN_FRAME]) -> Inbound {
        let Some((packet, _)) = packet.split_first_chunk::<28>() else { return Inbound::Done };
        if packet[..6] != [0, 1, 8, 0, 6, 4] {
            return Inbound::Done;
        }
        let sender_mac: Mac = copy(&packet[8..14]);
        let sender = Ipv4Addr::from(copy::<4>(&packet[14..18]));
        let target = Ipv4Addr::from(copy::<4>(&packet[24..28]));
        if Some(sender) == self.gw4 && unicast(sender_mac) {
            self.hop4 = Some(sender_mac);
        }
        match self.ip4 {
            Some(ip4) if ip4 == target && packet[6..8] == [0, 1] => {
                Inbound::Answer(arp_frame(answer, 2, self.mac, ip4, sender_mac, sender_mac, sender))
            }
            _ => Inbound::Done,
        }
    }

    fn ndp(&mut self, ndp: &Ndp, from: Mac, answer: &mut [u8; MAX_OWN_FRAME]) -> Inbound {
        let about_gateway = match ndp.kind {
            ADVERTISE => Some(ndp.target) == self.gw6,
            _ => Some(ndp.source) == self.gw6,
        };
        if about_gateway && let Some(mac) = ndp.mac.filter(|m| unicast(*m)) {
            self.hop6 = Some(mac);
        }
        let ours = ndp.target == self.link_local || Some(ndp.target) == self.ip6;
        if ndp.kind != SOLICIT || !ours {
            return Inbound::Done;
        }
        // A question without a source address is duplicate detection: answer to all.
        let (to_mac, to, flags) = if ndp.source.is_unspecified() {
            ([0x33, 0x33, 0, 0, 0, 1], Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0x20)
        } else {
            (ndp.mac.unwrap_or(from), ndp.source, 0x60)
        };
        Inbound::Answer(ndp_frame(answer, self.mac, to_mac, ndp.target, to, ADVERTISE, flags, ndp.target))
    }
}

/// A neighbour solicitation or advertisement that passed its checks.
struct Ndp {
    kind: u8,
    source: Ipv6Addr,
    target: Ipv6Addr,
    /// From the source or target link-layer address option.
    mac: Option<Mac>,
}

impl Ndp {
    /// `None` for anything else, and for a bad hop limit, length or checksum.
    fn parse(packet: &[u8]) -> Option<Self> {
        let (head, rest) = packet.split_first_chunk::<40>()?;
        let body = rest.get(..usize::from(u16::from_be_bytes([head[4], head[5]])))?;
        let kind = *body.first()?;
        if head[6] != 58 || head[7] != 255 || body.len() < 24 || !matches!(kind, SOLICIT | ADVERTISE) {
            return None;
        }
        let source = Ipv6Addr::from(copy::<16>(&head[8..24]));
        let target = Ipv6Addr::from(copy::<16>(&head[24..40]));
        if icmp6_checksum(source, target, body) != 0 {
            return None;
        }
        let wanted = if kind == SOLICIT { 1 } else { 2 };
        let mut options = &body[24..];
        let mut mac = None;
        while let [option, length, ..] = *options {
            let length = usize::from(length) * 8;
            if length == 0 || length > options.len() {
                break;
            }
            if option == wanted && length == 8 {
                mac = Some(copy(&options[2..8]));
            }
            options = &options[length..];
        }
        Some(Self { kind, source, target: Ipv6Addr::from(copy::<16>(&body[8..24])), mac })
    }
}

/// The link-local address of a MAC (EUI-64).
#[must_use]
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn header(to: Mac, from: Mac, kind: [u8; 2]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..6].copy_from_slice(&to);
    header[6..12].copy_from_slice(&from);
    header[12..].copy_from_slice(&kind);
    header
}

fn arp_frame(
    frame: &mut [u8; MAX_OWN_FRAME],
    operation: u8,
    mac: Mac,
    ip: Ipv4Addr,
    to: Mac,
    target_mac: Mac,
    target: Ipv4Addr,
) -> usize {
    frame[..14].copy_from_slice(&header(to, mac, TYPE_ARP));
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ip.octets());
    frame[32..38].copy_from_slice(&target_mac);
    frame[38..42].copy_from_slice(&target.octets());
    42
}

#[expect(clippy::too_many_arguments, reason = "one per field of the frame")]
fn ndp_frame(
    frame: &mut [u8; MAX_OWN_FRAME],
    mac: Mac,
    to_mac: Mac,
    source: Ipv6Addr,
    to: Ipv6Addr,
    kind: u8,
    flags: u8,
    target: Ipv6Addr,
) -> usize {
    frame.fill(0);
    frame[..14].copy_from_slice(&header(to_mac, mac, TYPE_IPV6));
    frame[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame[22..38].copy_from_slice(&source.octets());
    frame[38..54].copy_from_slice(&to.octets());
    frame[54] = kind;
    frame[58] = flags;
    frame[62..78].copy_from_slice(&target.octets());
    frame[78] = if kind == SOLICIT { 1 } else { 2 };
    frame[79] = 1;
    frame[80..86].copy_from_slice(&mac);
    let checksum = icmp6_checksum(source, to, &frame[54..86]);
    frame[56..58].copy_from_slice(&checksum.to_be_bytes());
    MAX_OWN_FRAME
}

/// The ICMPv6 checksum with its pseudo header; 0 over a packet whose checksum is right.
fn icmp6_checksum(source: Ipv6Addr, target: Ipv6Addr, body: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes.chunks(2).map(|c| u64::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum()
    };
    let mut sum = words(&source.octets()) + words(&target.octets()) + words(body) + body.len() as u64 + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn unicast(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// The first `N` bytes of a slice that is at least that long.
fn copy<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk::<N>().copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Mac = [2, 0, 0, 0, 0, 2];
    const GATEWAY: Mac = [2, 0x6d, 0x61, 0x73, 0x68, 1];

    fn gateway() -> Link {
        Link::new(GATEWAY, Some(Ipv4Addr::new(198, 19, 255, 254)), None, "fe80::1".parse().ok(), None)
    }

    fn guest() -> Link {
        Link::new(
            GUEST,
            Some(Ipv4Addr::new(198, 19, 0, 2)),
            Some(Ipv4Addr::new(198, 19, 255, 254)),
            "2001:db8:6d61::2".parse().ok(),
            "fe80::1".parse().ok(),
        )
    }

    #[test]
    fn finds_its_gateways() {
        let (mut guest, mut gateway) = (guest(), gateway());
        let mut question = [0; MAX_OWN_FRAME];
        let mut answer = [0; MAX_OWN_FRAME];
        for _ in 0..2 {
            let length = guest.ask(0, &mut question).unwrap();
            let Inbound::Answer(length) = gateway.inbound(&question[..length], &mut answer) else {
                panic!("no answer")
            };
            assert_eq!(guest.inbound(&answer[..length], &mut [0; MAX_OWN_FRAME]), Inbound::Done);
        }
        assert_eq!(guest.ask(1_000_000, &mut question), None);
        assert_eq!(guest.header(0x45).unwrap()[..6], GATEWAY);
        assert_eq!(guest.header(0x60).unwrap()[..6], GATEWAY);
    }

    #[test]
    fn asks_again_but_not_at_once() {
        let mut guest = guest();
        let mut frame = [0; MAX_OWN_FRAME];
        assert!(guest.ask(0, &mut frame).is_some() && guest.ask(0, &mut frame).is_some());
        assert_eq!(guest.ask(99_999, &mut frame), None);
        assert!(guest.ask(100_000, &mut frame).is_some());
        assert_eq!(guest.header(0x45), None);
    }

    #[test]
    fn asks_again_with_traffic_only() {
        let mut guest = guest();
        guest.hop4 = Some(GATEWAY);
        guest.hop6 = Some(GATEWAY);
        let mut frame = [0; MAX_OWN_FRAME];
        assert_eq!(guest.ask(50_000_000, &mut frame), None);
        let mut packet = [0; 60];
        packet[..14].copy_from_slice(&header(GUEST, GATEWAY, TYPE_IPV4));
        guest.inbound(&packet, &mut [0; MAX_OWN_FRAME]);
        assert_eq!(guest.ask(50_000_000, &mut frame), Some(42));
        guest.inbound(&packet, &mut [0; MAX_OWN_FRAME]);
        assert_eq!(guest.ask(59_999_999, &mut frame), None);
        assert_eq!(guest.ask(60_000_000, &mut frame), Some(42));
        assert_eq!(guest.header(0x45).unwrap()[..6], GATEWAY);
    }

    #[test]
    fn learns_the_sender_without_a_gateway() {
        let mut link = Link::new(GUEST, Some(Ipv4Addr::new(198, 19, 0, 2)), None, None, None);
        let mut frame = [0; 60];
        frame[..14].copy_from_slice(&header(GUEST, GATEWAY, TYPE_IPV4));
        assert_eq!(link.inbound(&frame, &mut [0; MAX_OWN_FRAME]), Inbound::Ip);
        assert_eq!(link.header(0x45).unwrap()[..6], GATEWAY);
    }

    #[test]
    fn survives_any_cut_and_any_flip() {
        let mut question = [0; MAX_OWN_FRAME];
        let mut answer = [0; MAX_OWN_FRAME];
        for _ in 0..2 {
            let mut asker = guest();
            let _ = asker.ask(0, &mut question);
            for length in 0..question.len() {
                gateway().inbound(&question[..length], &mut answer);
            }
            for bit in 0..question.len() * 8 {
                question[bit / 8] ^= 1 << (bit % 8);
                gateway().inbound(&question, &mut answer);
                question[bit / 8] ^= 1 << (bit % 8);
            }
            let _ = asker.ask(0, &mut question);
        }
    }
}
