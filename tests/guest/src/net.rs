//! TCP/IP: smoltcp between the network device and the services.
//!
//! smoltcp sees bare IP packets; `guest_core::link` does Ethernet below it, because everything goes to the gateway anyway and
//! smoltcp would not talk to one outside the own prefix. A packet whose next hop is not known yet is dropped; TCP sends it again.

use crate::memory::frames::Frames;
use crate::virtio::net::{FRAME, Net, Transmitter};
use guest_core::cmdline::Config;
use guest_core::link::{HEADER_BYTES, Inbound, Link, MAX_OWN_FRAME};
use smoltcp::iface::{
    self, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet, SocketStorage,
};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

const MTU: usize = FRAME - HEADER_BYTES;
/// Frames taken in per turn, so that a flood cannot keep the loop from its other work.
const FRAMES_PER_TURN: usize = 32;
/// Times that sockets may send per turn.
const EGRESS_PER_TURN: usize = 8;

/// The network of this machine.
pub struct Stack<'a> {
    phy: Phy,
    iface: Interface,
    /// All sockets.
    pub sockets: SocketSet<'a>,
}

impl<'a> Stack<'a> {
    /// Sets up the addresses. `seed` makes sequence numbers hard to guess.
    pub fn new(
        net: Net,
        config: &Config,
        seed: u64,
        storage: &'a mut [SocketStorage<'a>],
        now_us: u64,
    ) -> Self {
        let link = Link::new(net.mac, config.ip4, config.gw4, config.ip6, config.gw6);
        let link_local = link.link_local();
        let mut phy = Phy { net, link, received: [0; FRAME] };
        let mut iface_config = iface::Config::new(HardwareAddress::Ip);
        iface_config.random_seed = seed;
        let mut iface = Interface::new(iface_config, &mut phy, instant(now_us));
        iface.update_ip_addrs(|addresses| {
            let own = [
                config.ip4.map(|ip| IpCidr::new(IpAddress::Ipv4(ip), 32)),
                config.ip6.map(|ip| IpCidr::new(IpAddress::Ipv6(ip), 128)),
                Some(IpCidr::new(IpAddress::Ipv6(link_local), 64)),
            ];
            for address in own.into_iter().flatten() {
                // There is room for four.
                let _ = addresses.push(address);
            }
        });
        // Only their presence matters: Link knows the one next hop there is.
        let gw4 = config.gw4.unwrap_or(core::net::Ipv4Addr::new(0, 0, 0, 1));
        let _ = iface.routes_mut().add_default_ipv4_route(gw4);
        let _ = iface.routes_mut().add_default_ipv6_route(config.gw6.unwrap_or(link_local));
        Self { phy, iface, sockets: SocketSet::new(storage) }
    }

    /// Adds a TCP socket with buffers of this many bytes each. It has no time-outs: a machine may sleep for days with its
    /// connections open.
    pub fn add_socket(&mut self, buffer: usize, frames: &mut Frames) -> SocketHandle {
        let rx = tcp::SocketBuffer::new(frames.take::<u8>(buffer));
        let tx = tcp::SocketBuffer::new(frames.take::<u8>(buffer));
        let mut socket = tcp::Socket::new(rx, tx);
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    /// Takes frames in; whether a socket may have something to do.
    pub fn ingress(&mut self, now_us: u64) -> bool {
        let now = instant(now_us);
        self.phy.net.acknowledge();
        let mut own = [0; MAX_OWN_FRAME];
        if let Some(bytes) = self.phy.link.ask(now_us, &mut own) {
            self.phy.net.tx.send(&own[..bytes]);
        }
        self.iface.poll_maintenance(now);
        let mut changed = false;
        for _ in 0..FRAMES_PER_TURN {
            match self.iface.poll_ingress_single(now, &mut self.phy, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                PollIngressSingleResult::PacketProcessed => {}
                PollIngressSingleResult::SocketStateChanged => changed = true,
            }
        }
        changed
    }

    /// Sends what sockets have to send.
    pub fn egress(&mut self, now_us: u64) -> bool {
        let mut changed = false;
        for _ in 0..EGRESS_PER_TURN {
            match self.iface.poll_egress(instant(now_us), &mut self.phy, &mut self.sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => changed = true,
            }
        }
        self.phy.net.announce();
        changed
    }

    /// Whether received frames raise an interrupt.
    pub fn set_interrupts(&mut self, on: bool) {
        self.phy.net.set_interrupts(on);
    }

    /// Frames received and sent.
    #[must_use]
    pub fn frames(&self) -> (u64, u64) {
        (self.phy.net.rx.frames, self.phy.net.tx.frames)
    }
}

/// The device as smoltcp wants it.
struct Phy {
    net: Net,
    link: Link,
    /// The frame that was received last.
    received: [u8; FRAME],
}

impl phy::Device for Phy {
    type RxToken<'b> = RxToken<'b>;
    type TxToken<'b> = TxToken<'b>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        for _ in 0..FRAMES_PER_TURN {
            if !self.net.tx.can_send() {
                return None;
            }
            let bytes = self.net.rx.receive(&mut self.received)?;
            let mut own = [0; MAX_OWN_FRAME];
            match self.link.inbound(&self.received[..bytes], &mut own) {
                Inbound::Ip => {
                    let packet = self.received[..bytes].get(HEADER_BYTES..).unwrap_or(&[]);
                    return Some((RxToken(packet), TxToken { tx: &mut self.net.tx, link: &self.link }));
                }
                Inbound::Answer(bytes) => self.net.tx.send(&own[..bytes]),
                Inbound::Done => {}
            }
        }
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.net.tx.can_send().then_some(TxToken { tx: &mut self.net.tx, link: &self.link })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

struct RxToken<'b>(&'b [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct TxToken<'b> {
    tx: &'b mut Transmitter,
    link: &'b Link,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = [0; FRAME];
        let (head, body) = frame.split_at_mut(HEADER_BYTES);
        // smoltcp keeps to the MTU it was given.
        let packet = &mut body[..len.min(MTU)];
        let result = f(packet);
        if let Some(header) = packet.first().and_then(|first| self.link.header(*first)) {
            head.copy_from_slice(&header);
            self.tx.send(&frame[..HEADER_BYTES + len.min(MTU)]);
        }
        result
    }
}

fn instant(us: u64) -> Instant {
    Instant::from_micros(i64::try_from(us).unwrap_or(i64::MAX))
}
