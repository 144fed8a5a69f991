//! Hosts that dial in: QUIC with mutual TLS, one bidirectional stream of frames each.
//!
//! A host's name comes from its certificate; a Hello that says otherwise is turned away. What a host says is handed to the
//! [core](crate::core), which also gives commands back. Nothing is remembered here: a broken link costs a reconnect, and the core
//! sends again whatever has no answer.

pub mod frames;
mod link;
mod streams;

pub use frames::LinkError;
pub use link::{Server, ServerError};
pub use streams::{GuestError, connect_guest};
