//! The end-to-end tests; what they share is in the library of this package.

mod cancelled;
mod control_plane;
mod link;
mod many;
mod refused;
mod target_lost;
