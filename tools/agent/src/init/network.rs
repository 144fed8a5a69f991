//! Addresses and routes by rtnetlink, one request at a time.
//!
//! The gateway is on the link, whatever the address's prefix says: hosts route, they do not bridge, and a `/32` has no neighbours. IPv6 addresses skip the search for
//! duplicates: the control plane gives each out once, and a guest is to be reachable from its first second.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{AddressFamily as SocketFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::config::{Network, Prefix};

/// Longest answer; the kernel's dumps come in parts of at most this.
const ANSWER_BYTES_MAX: usize = 64 << 10;

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

struct Kernel(OwnedFd);

impl Kernel {
    fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            SocketFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Zero: NETLINK_ROUTE.
            None,
        )?;
        Ok(Self(socket))
    }

    fn send(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        rustix::net::send(&self.0, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Messages of the next answer.
    fn receive(&self) -> io::Result<Vec<NetlinkPayload<RouteNetlinkMessage>>> {
        let mut bytes = vec![0; ANSWER_BYTES_MAX];
        let (_, length) = rustix::net::recv(&self.0, &mut bytes[..], RecvFlags::empty())?;
        let mut rest = &bytes[..length.min(ANSWER_BYTES_MAX)];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(invalid)?;
            let length =
                usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4).max(16);
            rest = rest.get(length..).unwrap_or_default();
            messages.push(message.payload);
        }
        Ok(messages)
    }

    /// Asks for a change and waits for the kernel's word that it is done.
    fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        loop {
            for payload in self.receive()? {
                if let NetlinkPayload::Error(error) = payload {
                    return if error.code.is_none() { Ok(()) } else { Err(error.to_io()) };
                }
            }
        }
    }
}

fn index(name: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim().parse().map_err(invalid)
}

fn up(kernel: &Kernel, index: u32, mtu: Option<u32>) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.extend(mtu.map(LinkAttribute::Mtu));
    kernel.change(RouteNetlinkMessage::SetLink(link), 0)
}

fn add_address(kernel: &Kernel, index: u32, prefix: Prefix) -> io::Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = if prefix.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = prefix.bits;
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    if prefix.address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Address(prefix.address));
    message.attributes.push(AddressAttribute::Local(prefix.address));
    kernel.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// To `gateway` itself, or everything through it.
fn add_route(kernel: &Kernel, index: u32, gateway: IpAddr, is_default: bool) -> io::Result<()> {
    let (family, bits, address) = match gateway {
        IpAddr::V4(address) => (AddressFamily::Inet, 32, RouteAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(address)),
    };
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    if is_default {
        message.header.scope = RouteScope::Universe;
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(address));
    } else {
        message.header.scope = RouteScope::Link;
        message.header.destination_prefix_length = bits;
        message.attributes.push(RouteAttribute::Destination(address));
    }
    kernel.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Brings the loopback interface up.
///
/// # Errors
/// The kernel's.
pub fn loopback() -> io::Result<()> {
    up(&Kernel::open()?, index("lo")?, None)
}

/// Gives an interface what the host says. What can be done is done; every step that failed is named.
pub fn configure(name: &str, network: &Network) -> Vec<String> {
    let mut failed = Vec::new();
    let mut tried = |what: String, result: io::Result<()>| {
        failed.extend(result.err().map(|error| format!("{what}: {error}")));
    };
    let opened = Kernel::open().and_then(|kernel| Ok((kernel, index(name)?)));
    let (kernel, index) = match opened {
        Ok(opened) => opened,
        Err(error) => return vec![format!("{name}: {error}")],
    };
    tried(format!("bringing {name} up"), up(&kernel, index, network.mtu));
    for prefix in [network.ip4, network.ip6].into_iter().flatten() {
        tried(format!("address {}", prefix.address), add_address(&kernel, index, prefix));
    }
    for gateway in [network.gw4.map(IpAddr::from), network.gw6.map(IpAddr::from)].into_iter().flatten() {
        let is_link_local = matches!(gateway, IpAddr::V6(address) if address.is_unicast_link_local());
        if !is_link_local {
            tried(format!("route to {gateway}"), add_route(&kernel, index, gateway, false));
        }
        tried(format!("route through {gateway}"), add_route(&kernel, index, gateway, true));
    }
    failed
}

/// At most `most` addresses of all interfaces, without those of loopback and link-local ones.
pub fn addresses(most: usize) -> Vec<String> {
    list().unwrap_or_default().into_iter().take(most).map(|address| address.to_string()).collect()
}

fn list() -> io::Result<Vec<IpAddr>> {
    let kernel = Kernel::open()?;
    kernel.send(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
    let mut found = Vec::new();
    loop {
        for payload in kernel.receive()? {
            match payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                    found.extend(message.attributes.iter().find_map(address));
                }
                NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(found),
                _ => {}
            }
        }
    }
}

fn address(attribute: &AddressAttribute) -> Option<IpAddr> {
    let AddressAttribute::Address(address) = attribute else { return None };
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    (!address.is_loopback() && !link_local).then_some(*address)
}
