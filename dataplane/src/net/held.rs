//! Packets that reached the source's tap while its guest was paused: taken out of the tap and put back into the kernel, which
//! forwards them along the forward route.

use std::io::{self, Read as _, Write as _};

use super::tun::{Tap, TunError, VNET_HEADER_BYTES};

const ETHERNET_HEADER_BYTES: usize = 14;
/// Longest packet a tap can hold, with its headers: 64 KiB when segmentation is left to the receiver.
const PACKET_BYTES_MAX: usize = (64 << 10) + VNET_HEADER_BYTES + ETHERNET_HEADER_BYTES;
/// Bound on one draining, above a tap's default queue of 1000 packets: a sender that is faster than we are must not hold us here.
const PACKETS_MAX: usize = 4096;

/// The way back into the kernel: a tun interface of the host.
#[derive(Debug)]
pub struct Reinjector {
    tun: Tap,
}

impl Reinjector {
    /// Name of its interface.
    pub const INTERFACE: &'static str = "mash-held";

    /// Makes the interface. It still has to be set up and configured by [`super::HostNetwork`].
    ///
    /// # Errors
    /// [`TunError`].
    pub fn open() -> Result<Self, TunError> {
        Ok(Self { tun: Tap::open_tun(Self::INTERFACE)? })
    }

    /// Moves all packets that wait in `tap` back into the kernel; returns how many. Stops at an empty queue.
    ///
    /// # Errors
    /// Reading the tap; packets that the kernel does not take back are dropped, as it would drop them itself.
    pub fn drain(&self, tap: &Tap) -> io::Result<u64> {
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        let mut moved = 0;
        for _ in 0..PACKETS_MAX {
            let length = match tap.file().read(&mut buffer) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            if let Some(packet) = ip_packet(&mut buffer[..length]) {
                moved += u64::from(self.tun.file().write(packet).is_ok());
            }
        }
        Ok(moved)
    }
}

/// Turns `virtio header, Ethernet header, IP packet` into `virtio header, IP packet` in place; `None` if it is not IP.
fn ip_packet(frame: &mut [u8]) -> Option<&[u8]> {
    let ip_start = VNET_HEADER_BYTES + ETHERNET_HEADER_BYTES;
    let ethertype = frame.get(ip_start - 2..ip_start)?;
    if ethertype != [0x08, 0x00] && ethertype != [0x86, 0xdd] {
        return None;
    }
    // Both offsets (virtio 1.2, section 5.1.6: hdr_len at 2, csum_start at 6) count from the Ethernet header that goes away.
    for at in [2, 6] {
        let field = frame.get_mut(at..at + 2)?;
        let value = u16::from_le_bytes([field[0], field[1]]).saturating_sub(14);
        field.copy_from_slice(&value.to_le_bytes());
    }
    frame.copy_within(..VNET_HEADER_BYTES, ETHERNET_HEADER_BYTES);
    frame.get(ETHERNET_HEADER_BYTES..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_header_goes_and_offsets_follow() {
        let mut frame = vec![1, 3, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        frame.extend([0xaa; 12]);
        frame.extend([0x08, 0x00, 0x45, 1, 2, 3]);
        let packet = ip_packet(&mut frame).unwrap();
        assert_eq!(packet, [1, 3, 40, 0, 0, 0, 20, 0, 16, 0, 0, 0, 0x45, 1, 2, 3]);
    }

    #[test]
    fn what_is_not_ip_is_left_out() {
        let mut arp = vec![0; 24];
        arp.extend([0x08, 0x06, 0, 1]);
        assert_eq!(ip_packet(&mut arp), None);
        assert_eq!(ip_packet(&mut [0; 5]), None);
    }
}
