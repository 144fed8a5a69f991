//! The header of a vsock packet (virtio 1.2, section 5.10.6).
//!
//! Parsed by hand from the bytes of the whole chain: the driver may lay header and data out over as many descriptors as it likes, and Linux does
//! (from 6.7 on for zero-copy, later for all large packets), which the crates for it refuse.

/// Length of a header.
pub const HEADER_BYTES: usize = 44;
/// Most data that a packet carries, either way; Linux sends no more.
pub const DATA_BYTES_MAX: usize = 64 << 10;
/// The guest's address. It never leaves the machine, so all machines have the same one and keep it wherever they go.
pub const GUEST_CID: u64 = 3;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only kind of connection there is here.
pub const STREAM: u16 = 1;
/// SHUTDOWN: the sender receives no more.
pub const NO_MORE_RECEIVING: u32 = 1;
/// SHUTDOWN: the sender sends no more.
pub const NO_MORE_SENDING: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts it.
    Response,
    /// Refuses or ends it.
    Reset,
    /// Ends one direction or both.
    Shutdown,
    /// Carries data.
    Data,
    /// Says how much room there is.
    CreditUpdate,
    /// Asks how much room there is.
    CreditRequest,
    /// Anything else.
    Unknown(u16),
}

const OPS: [Op; 7] =
    [Op::Request, Op::Response, Op::Reset, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest];

impl From<u16> for Op {
    fn from(raw: u16) -> Self {
        let known = usize::from(raw).checked_sub(1).and_then(|at| OPS.get(at));
        known.copied().unwrap_or(Self::Unknown(raw))
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(raw) => raw,
        }
    }
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's address.
    pub src_cid: u64,
    /// Receiver's address.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub data_bytes: u32,
    /// [`STREAM`], or what we do not know.
    pub kind: u16,
    /// What it is for.
    pub op: Op,
    /// Flags of [`Op::Shutdown`].
    pub flags: u32,
    /// How much the sender of this packet buffers.
    pub buf_alloc: u32,
    /// How many bytes it has passed on since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header. Any bytes are one.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            data_bytes: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes it.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.data_bytes.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &u16::from(self.op).to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// Takes the next `N` bytes; zeros beyond the end, which a header's fields do not reach.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((first, more)) => {
            *rest = more;
            *first
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_lie_as_the_specification_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 5,
            data_bytes: 6,
            kind: STREAM,
            op: Op::Data,
            flags: 7,
            buf_alloc: 8,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[24..32], [6, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[40], 9);
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn every_operation_comes_back() {
        for raw in 0..=u16::MAX {
            assert_eq!(u16::from(Op::from(raw)), raw);
        }
        assert_eq!(Op::from(0), Op::Unknown(0));
        assert_eq!(Op::from(8), Op::Unknown(8));
    }
}
