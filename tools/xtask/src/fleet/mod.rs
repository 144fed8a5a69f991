//! A fleet to play with: a control plane and N hosts on this machine, each in a network namespace of its own.
//!
//! [`Fleet::up`] makes namespaces, certificates and processes, in this order, and returns when all hosts have joined. Until
//! [`Fleet::keep`] is called the fleet is taken down when the value is dropped, so that an error, a panic or Ctrl-C half-way
//! leaves nothing. [`down`] works from names alone and needs no record, so that it also clears up after a `kill -9`.
//!
//! Files of a fleet are in `/run/mashines/NAME`: `fleet.json` (what is up), `api.sock` (REST), `pki/`, `control/`, `host-a/`
//! and one log per process.

pub(crate) mod children;
mod faults;
pub mod layout;
pub mod leaks;
pub mod netns;
pub mod processes;
mod running;
pub(crate) mod services;
pub(crate) mod state;

pub use running::{Fleet, Plan, down, give_api_to, images, is_up, url};
pub(crate) use running::{clear, cli, make_certificates};
