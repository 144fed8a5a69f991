//! Packets of virtio-vsock (virtio 1.2, section 5.10.6): a header of 44 bytes, little-endian, and for some of them data.

/// Length of the header, in bytes.
pub const HEADER_BYTES: usize = 44;
/// Most data in one packet, in bytes: what Linux sends at most.
pub const DATA_BYTES_MAX: usize = 64 << 10;
/// Address of the host.
pub const HOST_CID: u64 = 2;
/// Address of every guest: it never leaves the VMM, so that all may have the same.
pub const GUEST_CID: u64 = 3;
/// A stream, the only type of socket here.
const STREAM: u16 = 1;

/// Flag of a shutdown: no more is received.
pub const NO_RECEIVE: u32 = 1;
/// Flag of a shutdown: no more is sent.
pub const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// May I connect?
    Request,
    /// You may.
    Response,
    /// The connection is no more.
    Reset,
    /// One or both directions are at their end.
    Shutdown,
    /// Data.
    Data,
    /// This much may be sent.
    CreditUpdate,
    /// How much may be sent?
    CreditRequest,
}

impl Operation {
    const fn from_u16(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    const fn as_u16(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A header, seen from the host: `host_port` is ours whoever sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Port on the host.
    pub host_port: u32,
    /// Port in the guest.
    pub guest_port: u32,
    /// Length of the data.
    pub data_bytes: u32,
    /// What it is for.
    pub operation: Operation,
    /// See [`NO_RECEIVE`], [`NO_SEND`].
    pub flags: u32,
    /// How much the sender has room for in all.
    pub room_bytes: u32,
    /// How much it has taken out of that room since the beginning; wraps.
    pub taken_bytes: u32,
}

/// What a guest's packet is.
#[derive(Debug, PartialEq, Eq)]
pub enum FromGuest<'a> {
    /// A packet for us, with its data.
    Packet(Header, &'a [u8]),
    /// Something that no connection of ours can have sent; answered with a reset of these ports (host, guest).
    Stray(u32, u32),
    /// Not a packet; left alone.
    Noise,
}

impl Header {
    /// Reads a packet of the guest.
    pub fn parse(packet: &[u8]) -> FromGuest<'_> {
        let Some((fixed, data)) = packet.split_first_chunk::<HEADER_BYTES>() else { return FromGuest::Noise };
        let half = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (guest_port, host_port) = (word(16), word(20));
        let for_us = long(0) == GUEST_CID && long(8) == HOST_CID && half(28) == STREAM;
        let Some(operation) = Operation::from_u16(half(30)).filter(|_| for_us) else {
            return FromGuest::Stray(host_port, guest_port);
        };
        let header = Self {
            host_port,
            guest_port,
            data_bytes: word(24),
            operation,
            flags: word(32),
            room_bytes: word(36),
            taken_bytes: word(40),
        };
        match usize::try_from(header.data_bytes).ok().and_then(|bytes| data.get(..bytes)) {
            Some(data) => FromGuest::Packet(header, data),
            None => FromGuest::Stray(host_port, guest_port),
        }
    }

    /// The header as the guest reads it.
    pub fn to_guest(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &HOST_CID.to_le_bytes());
        put(8, &GUEST_CID.to_le_bytes());
        put(16, &self.host_port.to_le_bytes());
        put(20, &self.guest_port.to_le_bytes());
        put(24, &self.data_bytes.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &self.operation.as_u16().to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.room_bytes.to_le_bytes());
        put(40, &self.taken_bytes.to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            host_port: 7,
            guest_port: 1024,
            data_bytes: 3,
            operation: Operation::Data,
            flags: 0,
            room_bytes: 4096,
            taken_bytes: 9,
        }
    }

    /// What the guest would send back: the same with sender and receiver exchanged.
    fn mirrored(header: Header) -> Vec<u8> {
        let mut bytes = header.to_guest().to_vec();
        bytes[..8].copy_from_slice(&GUEST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
        bytes[16..20].copy_from_slice(&header.guest_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&header.host_port.to_le_bytes());
        bytes
    }

    #[test]
    fn packets_are_read_as_they_are_written() {
        let mut packet = mirrored(header());
        packet.extend(b"abcd");
        assert_eq!(Header::parse(&packet), FromGuest::Packet(header(), b"abc"));
    }

    #[test]
    fn packets_of_another_form_are_stray_or_noise() {
        let packet = mirrored(header());
        assert_eq!(Header::parse(&packet), FromGuest::Stray(7, 1024), "data that are not there");
        assert_eq!(Header::parse(&packet[..43]), FromGuest::Noise);
        for (at, byte) in [(0, 9), (8, 9), (28, 2), (30, 77)] {
            let mut packet = mirrored(Header { data_bytes: 0, ..header() });
            packet[at] = byte;
            assert_eq!(Header::parse(&packet), FromGuest::Stray(7, 1024), "byte {at}");
        }
    }
}
