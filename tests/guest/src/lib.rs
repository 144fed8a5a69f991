//! The parts of the test guest that need no machine: parsing, page contents, budgets, link-layer frames.
//!
//! They live in a library so that they can be tested on the host (`cargo test --lib`); the program in
//! `main.rs` adds the hardware. Nothing here allocates, blocks or knows the time.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod budget;
pub mod cmdline;
pub mod command;
pub mod gap;
pub mod link;
pub mod page;
pub mod text;
