//! Devices: waiting for them by the kernel's events, and growing the file system on one.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::ioctl;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// Group of the kernel's own events.
const KERNEL_EVENTS: u32 = 1;

/// The kernel's news about devices.
#[derive(Debug)]
pub struct Events(OwnedFd);

impl Events {
    /// Listens from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(netlink::KOBJECT_UEVENT);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
        Ok(Self(socket))
    }

    /// Waits until `there` says so, asking at each event. `false` when the limit is over.
    pub fn wait(&self, limit: Duration, mut there: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0; 8192];
        loop {
            // All events up to now, so that what is asked next is newer than each of them. One that was dropped for want of room counts as well.
            while rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty()).is_ok() {}
            if there() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = Timespec::try_from(left).ok();
            let _ = rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref());
        }
    }
}

/// Lets the mounted ext4 at `mounted` fill its device.
///
/// # Errors
/// The kernel's: no room left in the group descriptors, not ext4.
pub fn grow(device: &Path, mounted: &Path) -> io::Result<()> {
    let bytes = File::open(device)?.seek(SeekFrom::End(0))?;
    let blocks = bytes / rustix::fs::statvfs(mounted)?.f_bsize.max(1);
    const RESIZE: ioctl::Opcode = ioctl::opcode::write::<u64>(b'f', 16);
    // SAFETY: EXT4_IOC_RESIZE_FS reads one 64-bit number, which `Setter` passes by pointer for the time of the call.
    let request = unsafe { ioctl::Setter::<RESIZE, u64>::new(blocks) };
    let directory = File::open(mounted)?;
    // SAFETY: as above; a file system of another kind answers ENOTTY.
    Ok(unsafe { ioctl::ioctl(&directory, request) }?)
}
