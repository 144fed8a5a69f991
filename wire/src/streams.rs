//! Streams beside the command stream of a host's link to the control plane: bytes that neither end looks into.
//!
//! Either side opens a bidirectional QUIC stream and sends one [`StreamRequest`]; the other answers with one [`StreamAnswer`]. After
//! [`StreamAnswer::Open`] both directions carry raw bytes until either ends. Nothing is resumed here: whoever uses a stream
//! (a session with a guest, a download) numbers its bytes and opens the next.

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]

use rkyv::{Archive, Deserialize, Serialize};

use crate::fleet::RefusalCode;
use crate::ids::{Digest, MachineId};

/// What a stream is for.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum StreamRequest {
    /// Of the control plane: a connection to a vsock port of a guest.
    Guest {
        /// The machine.
        machine: MachineId,
        /// The guest's port.
        port: u32,
    },
    /// Of a host: a blob's bytes from `offset` on.
    Blob {
        /// Which.
        digest: Digest,
        /// First byte wanted.
        offset: u64,
    },
}

/// Whether there is something to read and write.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum StreamAnswer {
    /// Bytes follow.
    Open {
        /// The blob's size in all, in bytes; 0 for a guest.
        bytes: u64,
    },
    /// No, and why.
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people: one line, with the remedy.
        detail: String,
    },
}
