//! The chips KVM keeps for the VM: interrupt controllers, timer, paravirtual clock.

use rkyv::{Archive, Deserialize, Serialize};

/// `kvm_irqchip` of both PICs and the IOAPIC, 520 bytes each.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct IrqchipState {
    /// First PIC.
    pub pic_master: Vec<u8>,
    /// Second PIC.
    pub pic_slave: Vec<u8>,
    /// IOAPIC.
    pub ioapic: Vec<u8>,
}

/// `kvm_pit_state2`.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct PitState {
    /// The structure's bytes.
    pub bytes: Vec<u8>,
}

/// The VM's clock, read in one instant.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ClockState {
    /// kvmclock, in nanoseconds since the VM was made.
    pub clock_ns: u64,
    /// Wall clock of the source in the same instant, in nanoseconds since 1970; `None` where KVM cannot say.
    pub realtime_ns: Option<u64>,
    /// The source's TSC in the same instant; `None` where KVM cannot say.
    pub host_tsc: Option<u64>,
}
