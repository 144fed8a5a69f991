//! Migrations on the data plane: what carries out the actions of the protocol's state machines ([`wire::migration`]).
//!
//! * [`source`]: the session that moves a machine out, on the machine's home shard.
//! * [`rounds`]: one round of pages over all lanes.
//! * [`source_lane`]: one lane, on any shard: dirty bits to pages to QUIC.
//! * [`target`]: the session that receives a machine, on the shard that becomes its home.
//! * [`target_lane`]: one lane, on any shard: QUIC to guest memory.
//!
//! The sessions hold no rules of the protocol; they turn actions into work and the outcome of work into events.

mod buffers;
pub mod in_flight;
pub mod rounds;
pub mod source;
pub mod source_lane;
pub mod target;
pub mod target_lane;
