//! The migration protocol.
