//! Opening tap and tun devices: the ioctls that no crate of ours wraps.
//!
//! The interface belongs to the network namespace of the calling thread and lives as long as a descriptor of it is open: the VMM's
//! copy keeps a running machine's tap when `mashined` restarts, and nothing is left when both are gone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

/// Length of the virtio-net header that precedes each packet on our devices (virtio 1.2, section 5.1.6: with `num_buffers`).
pub const VNET_HEADER_BYTES: usize = 12;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// `/dev/net/tun` is missing or closed to us.
    #[error("cannot open /dev/net/tun: run as root, and load the tun module")]
    Open(#[source] io::Error),
    /// The interface name is too long.
    #[error("`{0}` is no interface name: at most 15 bytes")]
    Name(String),
    /// An ioctl failed.
    #[error("cannot set up interface `{name}` ({what}); is it there already?")]
    SetUp {
        /// Interface.
        name: String,
        /// Which step.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A tap or tun device with virtio-net headers, non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Makes the tap (Ethernet) interface `name`.
    ///
    /// # Errors
    /// [`TunError`]; an interface of that name that somebody else holds is `SetUp`.
    pub fn open(name: &str) -> Result<Self, TunError> {
        Self::open_kind(name, libc::IFF_TAP)
    }

    /// Makes the tun (IP) interface `name`.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn open_tun(name: &str) -> Result<Self, TunError> {
        Self::open_kind(name, libc::IFF_TUN)
    }

    /// A descriptor of a tap that a VMM gave back.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }

    fn open_kind(name: &str, kind: libc::c_int) -> Result<Self, TunError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TunError::Open)?;
        let set_up = |what| {
            let name = name.to_owned();
            move |source| TunError::SetUp { name, what, source }
        };
        set_interface(&file, name, kind)?.map_err(set_up("name"))?;
        set_header_length(&file).map_err(set_up("header length"))?;
        Ok(Self { file })
    }

    /// The file, for reading and writing packets.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn set_interface(file: &File, name: &str, kind: libc::c_int) -> Result<io::Result<()>, TunError> {
    let flags = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        return Err(TunError::Name(name.to_owned()));
    }
    // The kernel reads the flags as 16 bits; IFF_TUN_EXCL is the highest of them.
    let [low, high, ..] = flags.to_le_bytes();
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: i16::from_le_bytes([low, high]) },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, and which outlives the call.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Ok(if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
}

fn set_header_length(file: &File) -> io::Result<()> {
    let bytes: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which `bytes` is.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
