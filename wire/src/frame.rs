//! The envelope of every message between mashines processes.
//!
//! ```text
//!  0       4       6      8          12            16       20         24
//!  +-------+-------+------+----------+-------------+--------+----------+------- - -+--------- - -+
//!  | magic |version| kind | body_len | payload_len | crc32c | reserved | body      | payload     |
//!  +-------+-------+------+----------+-------------+--------+----------+------- - -+--------- - -+
//! ```
//!
//! All integers are little-endian. `body` is an rkyv archive of the type that `kind` names; `payload` is raw bytes whose
//! meaning the body gives (guest pages). The checksum covers bytes 0..16 and the body: what it protects is our own
//! framing (a lane that lost its place in the stream); the bytes themselves are authenticated by the transport.
//!
//! A receiver parses the fixed header first, and every length in it is held against the cap of the kind before a byte is
//! allocated. Any error here ends the session: a peer that breaks its framing cannot be resynchronised.

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

/// `MSHF`, first bytes of each frame.
pub const MAGIC: [u8; 4] = *b"MSHF";
/// Length of the fixed header, in bytes.
pub const HEADER_BYTES: usize = 24;

/// What a frame's body is. Numbers are part of the format and never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// [`crate::vmm::ToVmm`].
    ToVmm = 1,
    /// [`crate::vmm::FromVmm`].
    FromVmm = 2,
    /// [`crate::fleet::ToHost`].
    ToHost = 3,
    /// [`crate::fleet::FromHost`].
    FromHost = 4,
    /// [`crate::migration`]: control stream, either direction.
    Migration = 5,
    /// [`crate::migration`]: a lane's record, followed by pages.
    Lane = 6,
    /// [`crate::state`]: an archive of VM state.
    State = 7,
    /// [`crate::streams::StreamRequest`].
    StreamRequest = 10,
    /// [`crate::streams::StreamAnswer`].
    StreamAnswer = 11,
    /// [`crate::agent::ToAgent`].
    ToAgent = 8,
    /// [`crate::agent::FromAgent`].
    FromAgent = 9,
}

impl Kind {
    const fn from_u16(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::ToVmm,
            2 => Self::FromVmm,
            3 => Self::ToHost,
            4 => Self::FromHost,
            5 => Self::Migration,
            6 => Self::Lane,
            7 => Self::State,
            10 => Self::StreamRequest,
            11 => Self::StreamAnswer,
            8 => Self::ToAgent,
            9 => Self::FromAgent,
            _ => return None,
        })
    }

    /// Longest body of this kind, in bytes: the bound on what a peer can make us allocate.
    pub const fn body_bytes_max(self) -> u32 {
        match self {
            Self::Lane => 64 << 10,
            Self::StreamRequest | Self::StreamAnswer => 4 << 10,
            // Arguments and environment of a program are the longest; the agent holds this much for each connection.
            Self::ToAgent | Self::FromAgent => 256 << 10,
            Self::Migration => 4 << 20,
            Self::ToVmm | Self::FromVmm | Self::ToHost | Self::FromHost | Self::State => 8 << 20,
        }
    }

    /// Longest payload of this kind, in bytes: one chunk of pages for a lane, nothing for the others.
    pub const fn payload_bytes_max(self) -> u32 {
        match self {
            Self::Lane => 2 << 20,
            _ => 0,
        }
    }
}

/// A frame that is not one, or not one we can take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the lengths in the header ask for.
    #[error("frame of {have} bytes ends before byte {want}")]
    Truncated {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        want: usize,
    },
    /// The first four bytes are not [`MAGIC`].
    #[error("not a frame: wrong magic")]
    Magic,
    /// A kind this release does not know.
    #[error("unknown frame kind {0}")]
    UnknownKind(u16),
    /// A known kind where another one belongs.
    #[error("frame of kind {got:?} where {want:?} belongs")]
    WrongKind {
        /// What came.
        got: Kind,
        /// What belongs there.
        want: Kind,
    },
    /// The reserved bytes are not zero.
    #[error("reserved header bytes are not zero")]
    Reserved,
    /// A length above the cap of its kind.
    #[error("{kind:?} frame of {bytes} bytes, above its cap of {cap}")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// The length.
        bytes: u32,
        /// The cap.
        cap: u32,
    },
    /// The checksum does not match.
    #[error("frame checksum mismatch")]
    Checksum,
    /// The body is not a valid archive of its type.
    #[error("invalid {0:?} body: {1}")]
    Body(Kind, String),
}

/// A message that cannot be put into a frame.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// rkyv could not serialise it (out of memory, or a length beyond 32 bits).
    #[error("cannot archive a {0:?} message")]
    Archive(Kind, #[source] rancor::Error),
    /// Body or payload above the cap of the kind.
    #[error("{kind:?} message of {bytes} bytes, above its cap of {cap}")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// The length.
        bytes: usize,
        /// The cap.
        cap: u32,
    },
}

/// A type that is the body of a kind of frame.
pub trait Message:
    Archive<
        Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                      + Deserialize<Self, HighDeserializer<rancor::Error>>,
    > + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
    + Sized
{
    /// The kind of its frames.
    const KIND: Kind;
}

macro_rules! message {
    ($($ty:ty => $kind:ident),+ $(,)?) => {
        $(impl Message for $ty { const KIND: Kind = Kind::$kind; })+
    };
}

message! {
    crate::vmm::ToVmm => ToVmm,
    crate::vmm::FromVmm => FromVmm,
    crate::fleet::ToHost => ToHost,
    crate::fleet::FromHost => FromHost,
    crate::streams::StreamRequest => StreamRequest,
    crate::streams::StreamAnswer => StreamAnswer,
    crate::agent::ToAgent => ToAgent,
    crate::agent::FromAgent => FromAgent,
}

/// The fixed part of a frame, checked against the caps of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Version of the protocol that the body is written in.
    pub version: u16,
    /// What the body is.
    pub kind: Kind,
    /// Length of the body, within [`Kind::body_bytes_max`].
    pub body_bytes: u32,
    /// Length of the payload, within [`Kind::payload_bytes_max`].
    pub payload_bytes: u32,
    crc: u32,
}

impl Header {
    /// Parses a fixed header. Lengths are within their caps when this succeeds; the checksum is verified by [`Header::decode`].
    ///
    /// # Errors
    /// [`FrameError`] when it is no header or a length is above its cap.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let (magic, rest) = bytes.split_at(4);
        if magic != MAGIC {
            return Err(FrameError::Magic);
        }
        let word = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let version = u16::from_le_bytes([rest[0], rest[1]]);
        let raw_kind = u16::from_le_bytes([rest[2], rest[3]]);
        let kind = Kind::from_u16(raw_kind).ok_or(FrameError::UnknownKind(raw_kind))?;
        let header = Self { version, kind, body_bytes: word(4), payload_bytes: word(8), crc: word(12) };
        if word(16) != 0 {
            return Err(FrameError::Reserved);
        }
        for (bytes, cap) in
            [(header.body_bytes, kind.body_bytes_max()), (header.payload_bytes, kind.payload_bytes_max())]
        {
            if bytes > cap {
                return Err(FrameError::TooLong { kind, bytes, cap });
            }
        }
        Ok(header)
    }

    fn fixed_part(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        out[12..16].copy_from_slice(&self.payload_bytes.to_le_bytes());
        out
    }

    fn checksum(&self, body: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.fixed_part()), body)
    }

    /// Checks the body's checksum and gives validated zero-copy access to it. `body` must be 16-byte aligned, as an
    /// [`AlignedVec`] is.
    ///
    /// # Errors
    /// [`FrameError`] when the kind is another, the length, checksum or archive is wrong.
    pub fn access<'a, M: Message>(&self, body: &'a AlignedVec) -> Result<&'a M::Archived, FrameError> {
        if self.kind != M::KIND {
            return Err(FrameError::WrongKind { got: self.kind, want: M::KIND });
        }
        let want = self.body_bytes as usize;
        if body.len() != want {
            return Err(FrameError::Truncated { have: body.len(), want });
        }
        if self.checksum(body) != self.crc {
            return Err(FrameError::Checksum);
        }
        rkyv::access::<M::Archived, rancor::Error>(body)
            .map_err(|e| FrameError::Body(self.kind, e.to_string()))
    }

    /// As [`Header::access`], then copies the message out.
    ///
    /// # Errors
    /// As [`Header::access`].
    pub fn decode<M: Message>(&self, body: &AlignedVec) -> Result<M, FrameError> {
        let archived = self.access::<M>(body)?;
        rkyv::deserialize::<M, rancor::Error>(archived)
            .map_err(|e| FrameError::Body(self.kind, e.to_string()))
    }
}

/// Puts `message` into a frame whose payload of `payload_bytes` the caller sends after it.
///
/// # Errors
/// [`EncodeError`] when body or payload is above the cap of its kind.
pub fn encode<M: Message>(version: u16, message: &M, payload_bytes: u32) -> Result<AlignedVec, EncodeError> {
    let kind = M::KIND;
    let body = rkyv::to_bytes::<rancor::Error>(message).map_err(|e| EncodeError::Archive(kind, e))?;
    if payload_bytes > kind.payload_bytes_max() {
        return Err(EncodeError::TooLong {
            kind,
            bytes: payload_bytes as usize,
            cap: kind.payload_bytes_max(),
        });
    }
    let body_bytes = u32::try_from(body.len())
        .ok()
        .filter(|&n| n <= kind.body_bytes_max())
        .ok_or(EncodeError::TooLong { kind, bytes: body.len(), cap: kind.body_bytes_max() })?;
    let mut header = Header { version, kind, body_bytes, payload_bytes, crc: 0 };
    header.crc = header.checksum(&body);
    let mut out = AlignedVec::with_capacity(HEADER_BYTES + body.len());
    out.extend_from_slice(&header.fixed_part());
    out.extend_from_slice(&header.crc.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&body);
    Ok(out)
}

/// Decodes a frame without payload that lies in memory whole, with nothing behind it.
///
/// # Errors
/// As [`Header::parse`] and [`Header::decode`]; [`FrameError::Truncated`] also when bytes are left over.
pub fn decode_whole<M: Message>(bytes: &[u8]) -> Result<(u16, M), FrameError> {
    let truncated = |want| FrameError::Truncated { have: bytes.len(), want };
    let (fixed, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(truncated(HEADER_BYTES))?;
    let header = Header::parse(fixed)?;
    if rest.len() != header.body_bytes as usize || header.payload_bytes != 0 {
        return Err(truncated(HEADER_BYTES + header.body_bytes as usize));
    }
    let mut body = AlignedVec::with_capacity(rest.len());
    body.extend_from_slice(rest);
    Ok((header.version, header.decode(&body)?))
}

/// Blocking frames over byte streams, for the two processes that talk over a Unix socket and for the control link.
pub mod io {
    use std::io::{Error, ErrorKind, Read, Result};

    use super::{AlignedVec, HEADER_BYTES, Header, Message};

    /// Reads one frame without payload. `None` at end of file between frames.
    ///
    /// # Errors
    /// The stream's own; [`ErrorKind::InvalidData`] with the [`super::FrameError`] as its source.
    pub fn read<M: Message>(from: &mut impl Read) -> Result<Option<(u16, M)>> {
        let mut fixed = [0; HEADER_BYTES];
        if from.read(&mut fixed[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut fixed[1..])?;
        let invalid = |e| Error::new(ErrorKind::InvalidData, e);
        let header = Header::parse(&fixed).map_err(invalid)?;
        let mut body = AlignedVec::with_capacity(header.body_bytes as usize);
        body.resize(header.body_bytes as usize, 0);
        from.read_exact(&mut body)?;
        Ok(Some((header.version, header.decode(&body).map_err(invalid)?)))
    }
}
