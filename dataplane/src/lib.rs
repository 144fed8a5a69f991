//! `mashined`, the daemon of a host: it owns the host's machines and moves their bytes.
//!
//! Two kinds of thread that never wait for each other on the hot path:
//! * the **shards**, one glommio executor pinned to each core: QUIC, pages, dirty bitmaps, the migration sessions and the
//!   control sockets of the VMMs;
//! * the **agent**, one thread with a tokio runtime: the link to the control plane, starting and ending VMM processes, netlink.

pub mod agent;
pub mod doorbell;
pub mod memory;
pub mod migrate;
pub mod net;
mod pulse;
pub mod quic;
pub mod shard;
pub mod shards;
pub mod vm;
