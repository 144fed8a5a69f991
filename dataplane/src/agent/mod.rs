//! The agent.
pub mod capacity;
pub mod link;
