//! Raw Ethernet frames out of one interface (`AF_PACKET`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A socket that sends Ethernet frames and receives none.
#[derive(Debug)]
pub(super) struct FrameSocket {
    fd: OwnedFd,
    address: libc::sockaddr_ll,
}

impl FrameSocket {
    /// Opens it for the interface of that index. Needs `CAP_NET_RAW`.
    pub(super) fn open(interface: u32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed. Protocol 0 receives nothing.
        let raw = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` is a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).map_err(invalid)?,
            sll_protocol: 0,
            sll_ifindex: i32::try_from(interface).map_err(invalid)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        Ok(Self { fd, address })
    }

    /// Sends one frame, Ethernet header first.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap_or(0);
        let address: *const libc::sockaddr_ll = &raw const self.address;
        // SAFETY: `frame` and `address` are valid for reads of the lengths given, for the duration of the call.
        let sent = unsafe {
            libc::sendto(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, address.cast(), length)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
