//! What kind of machine a state archive belongs to. Checked before anything else is read.

use rkyv::{Archive, Deserialize, Serialize};

/// The fixed shape of the machine: a VM of another shape cannot take the state.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ShapeState {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// Names of the devices behind the virtio-mmio transports, by slot.
    pub devices: Vec<String>,
    /// TSC frequency the guest was told, in kHz; 0 if unknown.
    pub tsc_khz: u32,
    /// Absolute offset of the next byte of console output.
    pub console_offset: u64,
}
