//! The transport between hosts: QUIC, driven by one loop per shard.
//!
//! `quinn-proto` is QUIC without sockets and without a clock. Each shard (a glommio executor pinned to a
//! core) owns one UDP socket, one protocol endpoint and its connections, and drives them from a single
//! task ([`driver`](self)): no locks, no hand-over between threads, and one copy fewer than with a
//! general-purpose runtime. Shards share nothing; a transfer that is to use several cores makes a
//! connection per shard, to a port of its own on the other side.
//!
//! ```text
//!  tasks of the shard            driver task                      kernel
//!  SendStream --Bytes--> quinn-proto --packets--> one buffer --sendmsg(UDP_SEGMENT)-->
//!  RecvStream <--Bytes-- quinn-proto <--views of the receive block-- recvmsg(UDP_GRO) <--
//!        \--- bell: "look at this connection" ---^
//! ```
//!
//! * **Back-pressure.** Writers wait while the send window or the peer's receive window is full;
//!   readers' unread bytes are bounded by the receive window. No queue here is unbounded.
//! * **Identity.** TLS 1.3 with certificates on both sides, from the fleet's authority only; a
//!   [`Connection`] exists only once the peer has proved who it is.
//! * **Failure.** A dead peer is noticed by the idle timeout (3 s by default). Whatever ends a connection
//!   ends every wait on it and on its streams with the same [`Lost`]. Nothing a peer sends can panic.
//! * **Datagram size.** Begins at Ethernet's and is probed up to what the route's interface carries;
//!   a path that stops carrying the size in use is noticed and falls back to 1200 bytes.

mod connection;
mod driver;
mod endpoint;
mod error;
mod notify;
mod options;
mod pool;
mod recv;
mod send;
mod shared;
mod socket;
#[cfg(test)]
mod tests;

pub use connection::{Connection, ConnectionStats};
pub use endpoint::Endpoint;
pub use error::{Lost, QuicError};
pub use options::TransportOptions;
pub use pool::Pool;
pub use recv::RecvStream;
pub use send::SendStream;
