//! `cargo xtask demo`: the main job, watched from all sides.
//!
//! Two hosts and a client, each in a namespace; a machine whose memory is full and being rewritten; a TCP connection that never rests;
//! migrations to and fro. What is reported is seen from outside (client, kernel) and from inside (guest), beside what
//! our own processes say. Everything started is gone afterwards, however it ends.

pub mod echo;
mod flow;
pub mod guest;
mod result;
mod tcp_info;
#[cfg(test)]
mod tests;
pub mod watch;

pub use flow::run;
pub use result::{DemoResult, Options};
