//! What packets look like on their way: checksums left to the receiver, and segments put together, as far as the driver has agreed to it.
//!
//! The header in front of each packet is the same for the tap and for the guest, so what was agreed on passes through untouched; the kernel
//! validates what the guest writes there as it does for any tap. What was not agreed on is zero.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Length of the header, `num_buffers` included.
pub const HEADER_BYTES: usize = 12;
/// Offset of `num_buffers` in the header.
pub const NUM_BUFFERS_AT: usize = 10;
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;

/// All that can be agreed on.
pub const OFFERED: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN | MRG_RXBUF;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agreed(u64);

impl Agreed {
    /// The driver has accepted `features`. What depends on another one that is missing does not count.
    pub const fn new(features: u64) -> Self {
        let mut valid = features & OFFERED;
        if valid & CSUM == 0 {
            valid &= !(HOST_TSO4 | HOST_TSO6 | HOST_ECN);
        }
        if valid & GUEST_CSUM == 0 {
            valid &= !(GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN);
        }
        Self(valid)
    }

    const fn has(self, feature: u64) -> bool {
        self.0 & feature != 0
    }

    /// Whether a packet for the guest may lie in several buffers.
    pub const fn merges(self) -> bool {
        self.has(MRG_RXBUF)
    }

    /// Whether packets for the guest may be longer than the link's MTU.
    pub const fn receives_large(self) -> bool {
        self.has(GUEST_TSO4 | GUEST_TSO6)
    }

    /// Cleans the header of a packet from the tap.
    pub fn to_guest(self, header: &mut [u8; HEADER_BYTES], buffers: u16) {
        if !self.has(GUEST_CSUM) {
            header.fill(0);
        }
        header[NUM_BUFFERS_AT..].copy_from_slice(&buffers.to_le_bytes());
    }

    /// Cleans the header of a packet from the guest. False if it asks for what was not agreed on: the packet is lost then.
    pub fn to_tap(self, header: &mut [u8; HEADER_BYTES]) -> bool {
        if !self.has(CSUM) {
            header.fill(0);
            return true;
        }
        header[NUM_BUFFERS_AT..].fill(0);
        header[0] &= NEEDS_CSUM;
        let agreed = match header[1] & !GSO_ECN {
            0 => true,
            GSO_TCPV4 => self.has(HOST_TSO4),
            GSO_TCPV6 => self.has(HOST_TSO6),
            _ => false,
        };
        agreed && (header[1] & GSO_ECN == 0 || self.has(HOST_ECN))
    }

    /// Tells the tap what it may leave to the guest. What is no tap, as in tests, and a kernel that knows no offloads leave nothing to it, which is
    /// right as well.
    pub fn set(self, tap: &File) {
        let flag = |feature, flag| if self.has(feature) { flag } else { 0 };
        let flags = flag(GUEST_CSUM, libc::TUN_F_CSUM)
            | flag(GUEST_TSO4, libc::TUN_F_TSO4)
            | flag(GUEST_TSO6, libc::TUN_F_TSO6)
            | flag(GUEST_ECN, libc::TUN_F_TSO_ECN);
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
        let _unknown =
            unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_agreed_on_passes() {
        let wants = [NEEDS_CSUM, GSO_TCPV4, 54, 0, 100, 0, 34, 0, 16, 0, 9, 9];
        let mut header = wants;
        assert!(Agreed::default().to_tap(&mut header));
        assert_eq!(header, [0; 12]);
        let mut header = wants;
        assert!(!Agreed::new(CSUM).to_tap(&mut header), "segmentation was not agreed on");
        assert!(!Agreed::new(CSUM | HOST_TSO6).to_tap(&mut wants.clone()));
        assert!(Agreed::new(CSUM | HOST_TSO4).to_tap(&mut header));
        assert_eq!(header, [NEEDS_CSUM, GSO_TCPV4, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0]);
        // UDP fragmentation never is; nor anything unknown.
        for kind in [3, 5, 0x7f, 0x83] {
            assert!(!Agreed::new(OFFERED).to_tap(&mut [0, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        }
        assert!(!Agreed::new(CSUM | HOST_TSO4).to_tap(&mut [
            1,
            GSO_TCPV4 | GSO_ECN,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0
        ]));
        // Without checksums there is no segmentation.
        assert_eq!(Agreed::new(HOST_TSO4 | GUEST_TSO4 | MRG_RXBUF), Agreed(MRG_RXBUF));
        let mut header = wants;
        Agreed::new(GUEST_CSUM).to_guest(&mut header, 2);
        assert_eq!(header, [NEEDS_CSUM, GSO_TCPV4, 54, 0, 100, 0, 34, 0, 16, 0, 2, 0]);
        Agreed::new(CSUM).to_guest(&mut header, 1);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}
