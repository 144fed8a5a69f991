//! Where the agent is reached: vsock in a guest, a Unix socket elsewhere.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// An address to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A vsock port, from any peer: only the host can reach it.
    Vsock(u32),
    /// A Unix socket; a file that is there already is replaced.
    Unix(PathBuf),
}

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;

/// A vsock address as the kernel wants it.
struct Vsock(libc::sockaddr_vm);

impl Vsock {
    fn any(port: u32) -> Self {
        // SAFETY: `sockaddr_vm` is integers and arrays of integers, for which zeros are values.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        Self(address)
    }
}

// SAFETY: the pointer is to a `sockaddr_vm` that lives through the call, and the length is its size.
unsafe impl SocketAddrArg for Vsock {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        let length = SocketAddrLen::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default();
        f((&raw const self.0).cast(), length)
    }
}

/// Listens.
///
/// # Errors
/// The kernel's: no vsock device, address in use, no such directory.
pub fn listen(address: &Address) -> io::Result<OwnedFd> {
    let family = match address {
        Address::Vsock(_) => AddressFamily::VSOCK,
        Address::Unix(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match address {
        Address::Vsock(port) => rustix::net::bind(&socket, &Vsock::any(*port))?,
        Address::Unix(path) => {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        }
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Takes the next connection, if one waits.
///
/// # Errors
/// The kernel's, such as too many open files.
pub fn accept(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(connection) => Ok(Some(connection)),
        Err(error) if error == rustix::io::Errno::AGAIN || error == rustix::io::Errno::CONNABORTED => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
