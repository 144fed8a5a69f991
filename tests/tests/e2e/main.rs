//! The end-to-end tests; what they share is in the library of this package.

mod refused;
mod target_lost;
