//! Links, addresses, routes and neighbours of the host, through netlink.
//!
//! Every operation is idempotent: it says how things shall be, and finding them so already is success. That is what lets a
//! migration be retried, and a restarted `mashined` set up again what is there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use tokio::task::AbortHandle;
use wire::fleet::ForwardAddress;

use super::announce::Announcer;
use super::held::Reinjector;
use super::sysctl::{self, SysctlError};
use super::tun::{Tap, TunError};
use super::{Addresses, GATEWAY_IP4, GATEWAY_IP6, GATEWAY_MAC};

/// Packets a tap queues while its guest is paused. 100 Mb/s of full-size packets for 50 ms are 417; a 10 Gb/s burst of 1 ms 833.
const TAP_QUEUE_PACKETS: u32 = 4096;

/// Why the host's network could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Netlink refused.
    #[error("cannot {what}")]
    Netlink {
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: rtnetlink::Error,
    },
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] std::io::Error),
    /// No such interface.
    #[error("there is no interface `{0}` here: name the one that leads to the other hosts with --uplink")]
    NoInterface(String),
    /// The uplink has no address.
    #[error("uplink `{0}` needs an IPv4 and a global IPv6 address")]
    NoAddress(String),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A device.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// The announcer's socket.
    #[error("cannot open a packet socket on the uplink: run as root")]
    Announce(#[source] std::io::Error),
}

/// The network of this host. Lives on the agent's thread, whose runtime drives its netlink connection.
pub struct HostNetwork {
    netlink: Handle,
    connection: AbortHandle,
    uplink: u32,
    addresses: ForwardAddress,
    announcer: Announcer,
    reinjector: Reinjector,
}

impl HostNetwork {
    /// Prepares the namespace of the calling thread for routing machines over `uplink`.
    ///
    /// # Errors
    /// [`NetError`], with what to do about it.
    pub async fn open(uplink_name: &str) -> Result<Self, NetError> {
        let (connection, netlink, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
        let connection = tokio::spawn(connection).abort_handle();
        let (uplink, mac) = link(&netlink, uplink_name).await?;
        sysctl::host()?;
        sysctl::uplink(uplink_name)?;
        let reinjector = Reinjector::open()?;
        sysctl::reinject(Reinjector::INTERFACE)?;
        let (held, _) = link(&netlink, Reinjector::INTERFACE).await?;
        set_up(&netlink, held).await?;
        let addresses = uplink_addresses(&netlink, uplink, uplink_name).await?;
        let announcer = Announcer::open(uplink, mac).map_err(NetError::Announce)?;
        Ok(Self { netlink, connection, uplink, addresses, announcer, reinjector })
    }

    /// This host's addresses on the fabric.
    pub fn fabric_addresses(&self) -> ForwardAddress {
        self.addresses
    }

    /// Configures a machine's tap, which must exist: gateway addresses and MAC, the guest's neighbour entries, up. Returns its interface index.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn attach(&self, tap: &str, machine: &Addresses) -> Result<u32, NetError> {
        let (index, _) = link(&self.netlink, tap).await?;
        sysctl::tap(tap)?;
        let message = LinkUnspec::new_with_index(index)
            .address(GATEWAY_MAC.to_vec())
            .txqueuelen(TAP_QUEUE_PACKETS)
            .up()
            .build();
        let set = self.netlink.link().set(message).execute().await;
        set.map_err(|source| failed(format!("configure tap {tap}"), source))?;
        for (gateway, prefix) in [(IpAddr::V4(GATEWAY_IP4), 32), (IpAddr::V6(GATEWAY_IP6), 64)] {
            let mut add = self.netlink.address().add(index, gateway, prefix).replace();
            if gateway.is_ipv6() {
                // Without duplicate detection the address is usable at once.
                add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
                add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            let added = add.execute().await;
            added.map_err(|source| failed(format!("give {gateway} to {tap}"), source))?;
        }
        for ip in machine.both() {
            let add = self.netlink.neighbours().add(index, ip).link_layer_address(&machine.mac);
            let added = add.state(NeighbourState::Permanent).replace().execute().await;
            added.map_err(|source| failed(format!("enter the neighbour {ip} on {tap}"), source))?;
        }
        Ok(index)
    }

    /// Routes the machine's addresses to its tap.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn route_to_tap(&self, tap: u32, machine: &Addresses) -> Result<(), NetError> {
        let v4 = host_route4(machine.ip4).output_interface(tap).scope(RouteScope::Link).build();
        let v6 = host_route6(machine.ip6).output_interface(tap).build();
        self.replace_routes(v4, v6, machine).await
    }

    /// Answers for the machine on the uplink.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn answer_for(&self, machine: &Addresses) -> Result<(), NetError> {
        for ip in machine.both() {
            let add = self.netlink.neighbours().add(self.uplink, ip).flags(NeighbourFlags::Proxy);
            let added = add.replace().execute().await;
            added.map_err(|source| failed(format!("answer for {ip} on the uplink"), source))?;
        }
        Ok(())
    }

    /// Announces the machine once; see [`Announcer::announce`].
    ///
    /// # Errors
    /// The socket's.
    pub fn announce(&self, machine: &Addresses) -> std::io::Result<()> {
        self.announcer.announce(machine)
    }

    /// Sends the machine's packets on to another host, those that wait in its tap included; no longer answers for it. Returns how many waited.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn forward(
        &self,
        machine: &Addresses,
        to: &ForwardAddress,
        tap: &Tap,
    ) -> Result<u64, NetError> {
        let v4 = host_route4(machine.ip4).gateway(to.ip4.into()).output_interface(self.uplink).build();
        let v6 = host_route6(machine.ip6).gateway(to.ip6.into()).output_interface(self.uplink).build();
        self.replace_routes(v4, v6, machine).await?;
        let held = self.reinjector.drain(tap).map_err(|source| {
            NetError::Tun(TunError::SetUp { name: "tap".to_owned(), what: "read held packets", source })
        })?;
        self.stop_answering(machine).await?;
        Ok(held)
    }

    /// Removes the machine's routes and proxy entries, whether they lead to its tap or to another host.
    ///
    /// # Errors
    /// [`NetError`]; what is not there is no error.
    pub async fn release(&self, machine: &Addresses) -> Result<(), NetError> {
        for message in [host_route4(machine.ip4).build(), host_route6(machine.ip6).build()] {
            let deleted = self.netlink.route().del(message).execute().await;
            ignore_absent(deleted)
                .map_err(|source| failed(format!("delete the route to {}", machine.ip4), source))?;
        }
        self.stop_answering(machine).await
    }

    async fn stop_answering(&self, machine: &Addresses) -> Result<(), NetError> {
        for ip in machine.both() {
            let deleted = self.netlink.neighbours().del(proxy_entry(self.uplink, ip)).execute().await;
            ignore_absent(deleted).map_err(|source| failed(format!("stop answering for {ip}"), source))?;
        }
        Ok(())
    }

    async fn replace_routes(
        &self,
        v4: rtnetlink::packet_route::route::RouteMessage,
        v6: rtnetlink::packet_route::route::RouteMessage,
        machine: &Addresses,
    ) -> Result<(), NetError> {
        for (message, ip) in [(v4, IpAddr::V4(machine.ip4)), (v6, IpAddr::V6(machine.ip6))] {
            let replaced = self.netlink.route().add(message).replace().execute().await;
            replaced.map_err(|source| failed(format!("route {ip}"), source))?;
        }
        Ok(())
    }
}

impl Drop for HostNetwork {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Addresses {
    fn both(&self) -> [IpAddr; 2] {
        [IpAddr::V4(self.ip4), IpAddr::V6(self.ip6)]
    }
}

fn failed(what: String, source: rtnetlink::Error) -> NetError {
    NetError::Netlink { what, source }
}

fn host_route4(ip: Ipv4Addr) -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, 32)
}

fn host_route6(ip: Ipv6Addr) -> RouteMessageBuilder<Ipv6Addr> {
    RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, 128)
}

fn proxy_entry(interface: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.ifindex = interface;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes.push(NeighbourAttribute::Destination(match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }));
    message
}

/// What the kernel says when a route or neighbour to delete is not there: ESRCH or ENOENT.
fn ignore_absent(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(e)) if [-libc::ESRCH, -libc::ENOENT].contains(&e.raw_code()) => {
            Ok(())
        }
        other => other,
    }
}

async fn set_up(netlink: &Handle, index: u32) -> Result<(), NetError> {
    let message = LinkUnspec::new_with_index(index).up().build();
    netlink
        .link()
        .set(message)
        .execute()
        .await
        .map_err(|source| failed(format!("set interface {index} up"), source))
}

/// Index and MAC of an interface.
async fn link(netlink: &Handle, name: &str) -> Result<(u32, [u8; 6]), NetError> {
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    let found =
        links.try_next().await.ok().flatten().ok_or_else(|| NetError::NoInterface(name.to_owned()))?;
    let mac = found.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    Ok((found.header.index, mac.unwrap_or_default()))
}

async fn uplink_addresses(netlink: &Handle, index: u32, name: &str) -> Result<ForwardAddress, NetError> {
    let mut found = netlink.address().get().set_link_index_filter(index).execute();
    let (mut ip4, mut ip6) = (None, None);
    let read = |source| failed(format!("read the addresses of {name}"), source);
    while let Some(message) = found.try_next().await.map_err(read)? {
        if message.header.scope != AddressScope::Universe {
            continue;
        }
        for attribute in message.attributes {
            match attribute {
                AddressAttribute::Address(IpAddr::V4(ip)) => ip4 = ip4.or(Some(ip.octets())),
                AddressAttribute::Address(IpAddr::V6(ip)) => ip6 = ip6.or(Some(ip.octets())),
                _ => {}
            }
        }
    }
    let missing = || NetError::NoAddress(name.to_owned());
    Ok(ForwardAddress { ip4: ip4.ok_or_else(missing)?, ip6: ip6.ok_or_else(missing)? })
}
