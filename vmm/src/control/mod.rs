//! The control socket: frames with descriptors, one connection at a time.

mod connection;

pub use connection::{Connection, ConnectionError, Incoming};
