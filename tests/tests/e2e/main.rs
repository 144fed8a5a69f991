//! The end-to-end tests; what they share is in the library of this package.

mod cancelled;
mod chaos;
mod control_plane;
mod input;
mod link;
mod many;
mod refused;
mod source_lost;
mod target_lost;
