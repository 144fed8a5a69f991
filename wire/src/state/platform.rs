//! The platform's own registers: events that the guest has not seen yet, and which machine it believes to be.

use rkyv::{Archive, Deserialize, Serialize};

/// Pending events and the VM generation id.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct PlatformState {
    /// Bit 0: the power button was pressed. Bit 1: the generation id has changed.
    pub pending_events: u32,
    /// The generation id. A machine that moves keeps it; one that is a copy of a snapshot gets a new one.
    pub generation_id: [u8; 16],
}
