//! The end-to-end tests; what they share is in the library of this package.

mod cancelled;
mod control_plane;
mod link;
mod many;
mod refused;
mod source_lost;
mod target_lost;
