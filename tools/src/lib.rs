//! The `mashines` command line.
//!
//! Data goes to standard output, messages to standard error; with `--json` the data is JSON with the field names of the REST
//! API. Errors say what to do about them, and the exit code says what kind they are ([`exit`]).
//!
//! * [`args`]: what can be typed. * [`config`]: where the control plane is. * [`client`]: talking to it.
//! * [`session`]: programs, terminals and files in a guest.
//! * [`commands`]: what each command does. * [`output`]: tables and JSON. * [`units`]: sizes and durations.

pub mod args;
pub mod client;
pub mod commands;
pub mod config;
pub mod exit;
pub mod output;
pub mod session;
pub mod sse;
pub mod units;
