//! One vCPU as KVM describes it.
//!
//! Register files that KVM hands out as fixed C structures of its stable x86-64 ABI are kept as those bytes
//! (little-endian by the ABI of the only architecture we run on); what has to be reasoned about (MSRs, CPUID, TSC) is typed.

use rkyv::{Archive, Deserialize, Serialize};

/// State of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct VcpuState {
    /// `kvm_mp_state`.
    pub mp_state: u32,
    /// `kvm_regs`.
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    pub sregs: Vec<u8>,
    /// `kvm_xsave`, or `kvm_xsave2` when the host's is larger than 4096 bytes.
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`.
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    pub debugregs: Vec<u8>,
    /// `kvm_lapic_state`.
    pub lapic: Vec<u8>,
    /// `kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// All MSRs of the host's list that could be read, in the host's order.
    pub msrs: Vec<MsrEntry>,
    /// What the guest was told by CPUID.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// Guest TSC minus host TSC, modulo 2^64, where KVM can tell.
    pub tsc_offset: Option<u64>,
    /// Nested virtualisation state, where KVM has it and there is any.
    pub nested: Vec<u8>,
}

/// One model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct MsrEntry {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// One leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct CpuidEntry {
    /// Leaf (`eax` of the question).
    pub function: u32,
    /// Subleaf (`ecx` of the question).
    pub index: u32,
    /// KVM's flags: 1 = the subleaf matters.
    pub flags: u32,
    /// The answer: `eax`, `ebx`, `ecx`, `edx`.
    pub regs: [u32; 4],
}
