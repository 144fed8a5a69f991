//! One UDP socket with segmentation offload, the only file of the transport that is `unsafe`.
//!
//! The descriptor is a blocking one that is always called with `MSG_DONTWAIT`. Waiting happens on a
//! duplicate of it that glommio owns: glommio has no call for readiness, but peeking at one byte
//! through io_uring completes exactly when a datagram is there, provided the socket itself is blocking.
//!
//! The socket is always an IPv6 one that also speaks IPv4 (mapped addresses), so there is one code path
//! for addresses; callers only see the canonical forms.
//!
//! Errors of single datagrams (no route, too large for the interface, administratively refused) are not
//! errors of the socket: QUIC sees them as loss, which is what they are.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;

use bytes::{BufMut, BytesMut};
use libc::{c_int, c_void, socklen_t};
use quinn_proto::Transmit;
use rustix::net::sockopt;

use super::options::UDP_PAYLOAD_MAX;

/// More segments than this per send are refused by older kernels.
const SEGMENTS_MAX: usize = 64;
/// The largest datagram, or merged run of datagrams, that one receive can return.
pub(super) const RECEIVE_BYTES_MAX: usize = 65_536;

/// Size of control messages that are received: packet info, GRO size and room for one more.
const CONTROL_WORDS: usize = 16;

/// A datagram, or several of equal size from one sender, that was appended to the caller's buffer.
pub(super) struct Received {
    pub(super) from: SocketAddr,
    pub(super) local_ip: IpAddr,
    pub(super) bytes: usize,
    /// Size of each datagram but the last, which may be shorter.
    pub(super) stride: usize,
}

/// What became of a send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// The kernel has taken it, or it is lost like any datagram can be.
    Done,
    /// The socket's send buffer is full: try again when there is room.
    Full,
}

pub(super) struct UdpSocket {
    fd: OwnedFd,
    waiter: Rc<glommio::net::UdpSocket>,
    local: SocketAddr,
    /// Cleared when the route's device turns out to refuse segmented sends.
    segmentation: Cell<bool>,
}

impl UdpSocket {
    /// Binds; the address may be IPv4 or IPv6, the IPv6 wildcard takes both.
    pub(super) fn bind(addr: SocketAddr, buffer_bytes: usize) -> io::Result<Self> {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET6,
            rustix::net::SocketType::DGRAM,
            Some(rustix::net::ipproto::UDP),
        )?;
        sockopt::set_ipv6_v6only(&socket, false)?;
        set_buffers(&socket, buffer_bytes)?;
        // Never fragment, and probe freely: discovery decides the size, not the kernel's cache.
        sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::PROBE)?;
        sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::PROBE)?;
        set_flag(&socket, libc::IPPROTO_UDP, libc::UDP_GRO)?;
        set_flag(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
        let fd: OwnedFd = socket;
        rustix::net::bind(&fd, &SocketAddr::V6(mapped(addr)))?;
        let local = SocketAddr::try_from(rustix::net::getsockname(&fd)?).map_err(io::Error::from)?;
        let duplicate = fd.try_clone()?.into_raw_fd();
        // SAFETY: `duplicate` was just made and given up by its owner, so glommio becomes the only
        // owner of this descriptor.
        let waiter = unsafe { glommio::net::UdpSocket::from_raw_fd(duplicate) };
        Ok(Self { fd, waiter: Rc::new(waiter), local: canonical(local), segmentation: Cell::new(true) })
    }

    /// How many datagrams of `mtu` bytes one send may carry.
    pub(super) fn segments_max(&self, mtu: u16) -> usize {
        if !self.segmentation.get() {
            return 1;
        }
        usize::from(UDP_PAYLOAD_MAX / mtu.max(1)).clamp(1, SEGMENTS_MAX)
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Takes what one receive returns, appended to `buffer`; `None` when nothing is there.
    pub(super) fn try_receive(&self, buffer: &mut BytesMut) -> io::Result<Option<Received>> {
        buffer.reserve(RECEIVE_BYTES_MAX);
        let room = buffer.spare_capacity_mut();
        let mut name = empty_name();
        let mut control = [0_u64; CONTROL_WORDS];
        let mut iov = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
        let mut message = empty_message(&mut name, &mut iov);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: every pointer in `message` is to a live, writable object of the stated length, none
        // of which moves before the call returns.
        let count = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        let Ok(bytes) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        };
        // SAFETY: the kernel has written `bytes` bytes, at most the capacity that it was given.
        unsafe { buffer.advance_mut(bytes) };
        let control = read_control(&message);
        let from = canonical(SocketAddr::V6(address_of(&name)));
        let local_ip = control.local_ip.unwrap_or_else(|| self.local.ip());
        Ok(Some(Received { from, local_ip, bytes, stride: control.stride.unwrap_or(bytes).max(1) }))
    }

    /// Sends a datagram, or a run of them as one segmented send.
    ///
    /// # Errors
    /// Only when the socket itself is broken; datagrams that cannot be delivered count as sent.
    pub(super) fn try_send(&self, transmit: &Transmit, data: &[u8]) -> io::Result<Sent> {
        let mut name = name_of(mapped(transmit.destination));
        let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let mut control = SendControl::new(transmit.segment_size, transmit.src_ip);
        let mut message = empty_message(&mut name, &mut iov);
        message.msg_controllen = control.bytes(transmit);
        if message.msg_controllen > 0 {
            message.msg_control = std::ptr::from_mut(&mut control).cast();
        }
        // SAFETY: every pointer in `message` is to a live object of the stated length; the kernel only
        // reads through `iov`, so that the shared borrow of `data` holds.
        let count = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, libc::MSG_DONTWAIT) };
        if count >= 0 {
            return Ok(Sent::Done);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) => Ok(Sent::Full),
            Some(libc::EIO) if transmit.segment_size.is_some() && self.segmentation.replace(false) => {
                tracing::warn!("the network device refuses segmented sends; throughput will suffer");
                Ok(Sent::Done)
            }
            Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT) => Err(error),
            _ => {
                tracing::trace!(%error, to = %transmit.destination, bytes = data.len(), "datagram not sent");
                Ok(Sent::Done)
            }
        }
    }

    /// Completes when a datagram is there to be received (or the socket has an error to report).
    pub(super) fn readable(&self) -> impl Future<Output = ()> + 'static {
        let waiter = Rc::clone(&self.waiter);
        async move {
            // What is peeked at, and errors, are for `try_receive` to find.
            let _ = waiter.peek_from(&mut [0_u8]).await;
        }
    }

    /// Sends one datagram of at most one segment, waiting for room in the send buffer.
    ///
    /// This is how the kernel tells us that there is room again: the first datagram of what did not fit
    /// goes through io_uring and completes when it is accepted.
    pub(super) fn send_when_possible(
        &self,
        to: SocketAddr,
        datagram: Vec<u8>,
    ) -> impl Future<Output = ()> + 'static {
        let waiter = Rc::clone(&self.waiter);
        async move {
            // A failure to send is loss.
            let _ = waiter.send_to(&datagram, SocketAddr::V6(mapped(to))).await;
        }
    }
}

/// The MTU of the route to `peer` as the kernel knows it; `None` when it does not say.
///
/// Asked through a socket of its own: connecting the shard's socket would close it to all other peers.
pub(super) fn route_mtu(peer: SocketAddr) -> Option<u32> {
    let probe = rustix::net::socket(
        rustix::net::AddressFamily::INET6,
        rustix::net::SocketType::DGRAM,
        Some(rustix::net::ipproto::UDP),
    )
    .ok()?;
    sockopt::set_ipv6_v6only(&probe, false).ok()?;
    rustix::net::connect(&probe, &SocketAddr::V6(mapped(peer))).ok()?;
    sockopt::ipv6_mtu(&probe).ok().filter(|mtu| *mtu > 0)
}

/// Asks for large kernel buffers: past the system's limit when we may, up to it otherwise.
fn set_buffers(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let socket = socket.as_fd();
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, bytes)?;
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        sockopt::set_socket_send_buffer_size(socket, bytes)?;
    }
    let granted = sockopt::socket_recv_buffer_size(socket)?;
    if granted < bytes {
        tracing::warn!(
            granted,
            wanted = bytes,
            "small socket buffer, packets will be lost under load; raise it with: sysctl -w net.core.rmem_max={bytes} net.core.wmem_max={bytes}"
        );
    }
    Ok(())
}

fn set_flag(socket: impl AsFd, level: c_int, option: c_int) -> io::Result<()> {
    let on: c_int = 1;
    let length = socklen_t::try_from(size_of::<c_int>()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value pointer is to a live `c_int` and `length` is its size.
    let result = unsafe { libc::setsockopt(fd, level, option, std::ptr::from_ref(&on).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Control messages of a send, laid out as the kernel reads them: each header is followed by its value,
/// padded to eight bytes. Segment size comes first so that the packet info can be left off.
#[repr(C)]
struct SendControl {
    segment_header: libc::cmsghdr,
    segment_bytes: u16,
    segment_padding: [u8; 6],
    source_header: libc::cmsghdr,
    source: libc::in6_pktinfo,
    source_padding: [u8; 4],
}

const SEGMENT_SPACE: usize = size_of::<libc::cmsghdr>() + 8;
const _: () = assert!(size_of::<SendControl>() == SEGMENT_SPACE + size_of::<libc::cmsghdr>() + 24);

impl SendControl {
    fn new(segment_bytes: Option<usize>, source: Option<IpAddr>) -> Self {
        let header = |level, kind, value_bytes| libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + value_bytes,
            cmsg_level: level,
            cmsg_type: kind,
        };
        let source = source.map_or(Ipv6Addr::UNSPECIFIED, mapped_ip);
        Self {
            segment_header: header(libc::SOL_UDP, libc::UDP_SEGMENT, size_of::<u16>()),
            // Zero means: one datagram.
            segment_bytes: segment_bytes.and_then(|bytes| u16::try_from(bytes).ok()).unwrap_or(0),
            segment_padding: [0; 6],
            source_header: header(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, size_of::<libc::in6_pktinfo>()),
            source: libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: source.octets() },
                ipi6_ifindex: 0,
            },
            source_padding: [0; 4],
        }
    }

    /// How much of it the kernel is to read for this transmit.
    fn bytes(&self, transmit: &Transmit) -> usize {
        match (transmit.segment_size, transmit.src_ip) {
            (_, Some(_)) => size_of::<Self>(),
            (Some(_), None) => SEGMENT_SPACE,
            (None, None) => 0,
        }
    }
}

#[derive(Default)]
struct ReceiveControl {
    stride: Option<usize>,
    local_ip: Option<IpAddr>,
}

fn read_control(message: &libc::msghdr) -> ReceiveControl {
    let mut found = ReceiveControl::default();
    // SAFETY: the kernel has set control pointer and length to what it wrote into our live buffer.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR/CMSG_NXTHDR return only headers that lie wholly within the buffer.
        let header = unsafe { next.read_unaligned() };
        // SAFETY: as above; this only computes an address.
        let value: *const c_void = unsafe { libc::CMSG_DATA(next) }.cast();
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: the kernel writes a `c_int` for this message.
                let stride = unsafe { value.cast::<c_int>().read_unaligned() };
                found.stride = usize::try_from(stride).ok();
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: the kernel writes an `in6_pktinfo` for this message.
                let info = unsafe { value.cast::<libc::in6_pktinfo>().read_unaligned() };
                found.local_ip = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
            }
            _ => {}
        }
        // SAFETY: `next` is a header of `message`, whose buffer is still live.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    found
}

fn empty_message(name: &mut libc::sockaddr_in6, iov: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = std::ptr::from_mut(name).cast();
    message.msg_namelen = NAME_BYTES;
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message
}

#[expect(clippy::cast_possible_truncation, reason = "28 bytes")]
const NAME_BYTES: socklen_t = size_of::<libc::sockaddr_in6>() as socklen_t;

#[expect(clippy::cast_possible_truncation, reason = "10")]
const FAMILY: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

fn empty_name() -> libc::sockaddr_in6 {
    name_of(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0))
}

fn name_of(addr: SocketAddrV6) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: FAMILY,
        sin6_port: addr.port().to_be(),
        sin6_flowinfo: addr.flowinfo(),
        sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
        sin6_scope_id: addr.scope_id(),
    }
}

fn address_of(name: &libc::sockaddr_in6) -> SocketAddrV6 {
    let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
    SocketAddrV6::new(ip, u16::from_be(name.sin6_port), 0, name.sin6_scope_id)
}

fn mapped_ip(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn mapped(addr: SocketAddr) -> SocketAddrV6 {
    match addr {
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0),
        SocketAddr::V6(v6) => v6,
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_canonical() {
            IpAddr::V4(v4) => SocketAddr::new(v4.into(), v6.port()),
            IpAddr::V6(_) => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}
