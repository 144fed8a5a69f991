//! How often the kernel had to send a segment of a TCP connection again: the client's count of lost packets.
//!
//! std and rustix do not offer `TCP_INFO`, so this is the one place of this program that calls the kernel by hand.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Segments sent again over the life of the connection.
///
/// # Errors
/// The kernel's, for a socket that is no longer one.
pub fn retransmits(stream: &TcpStream) -> io::Result<u32> {
    // SAFETY: `tcp_info` is a plain C struct of integers, for which all-zero bytes are a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: `info` and `length` outlive the call and `length` is the size of `info`, so the kernel writes at most
    // that much; the descriptor is open because `stream` is borrowed.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.tcpi_total_retrans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_connection_over_loopback_loses_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(retransmits(&stream).unwrap(), 0);
    }
}
