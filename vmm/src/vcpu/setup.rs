//! A fresh vCPU, and the state in which the boot protocols enter a kernel.
//!
//! Both of them: 32-bit protected mode, paging off, flat segments, interrupts off. PVH has `ebx` point to `hvm_start_info`; Linux has `esi`
//! point to `boot_params`, the other registers zero, and its own numbers for the segments.
//! Further vCPUs wait for their start-up message, which KVM does for them.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;

use wire::cpu::Profile;
use wire::state::CpuidEntry;

use crate::kvm::{Attempt, KvmError, Vm, cpuid, profile};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Largest difference of TSC frequencies that is taken as none: what NTP corrects, 250 parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Where the segment descriptors of [`Protocol::Linux`] are.
pub const LINUX_GDT: u64 = 0x500;

/// By which boot protocol a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH.
    Pvh,
    /// Linux's, at the 32-bit entry point.
    Linux,
}

/// Where a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub address: u64,
    /// Guest-physical address of what the protocol passes.
    pub parameters: u64,
    /// The protocol.
    pub protocol: Protocol,
}

/// Makes vCPU `id` of `count` and tells it what it is, which is given back too: some KVMs answer another CPUID than
/// the one they were given. `profile` is what it may see of the host's CPU, `tsc_khz` the frequency it is to see; 0 takes the host's.
///
/// # Errors
/// [`KvmError`] when KVM refuses, or cannot give the TSC that frequency.
pub fn create(
    vm: &Vm,
    id: u32,
    count: u32,
    profile: Profile,
    tsc_khz: u32,
) -> Result<(VcpuFd, Vec<CpuidEntry>), KvmError> {
    let vcpu = vm.create_vcpu(id)?;
    set_tsc_khz(vm, &vcpu, tsc_khz)?;
    let khz = vcpu.get_tsc_khz().attempt("asking for the TSC frequency")?;
    let mut leaves = cpuid::for_vcpu(&vm.supported_cpuid, id, count, khz);
    profile::apply(&mut leaves, profile)?;
    set_cpuid(&vcpu, &leaves)?;
    enable_extended_state(&vcpu, cpuid::extended_state(&leaves))?;
    Ok((vcpu, cpuid::to_state(&leaves)))
}

/// Switches on all of `components` in XCR0, as firmware may: it has no effect until a kernel sets CR4.OSXSAVE, and kernels then write their own
/// choice. A hypervisor below us that lets `xsetbv` of a nested guest slip by (an emulated AMD-V) would otherwise have KVM
/// answer CPUID for the value after power-on, and Linux do without AVX.
fn enable_extended_state(vcpu: &VcpuFd, components: u64) -> Result<(), KvmError> {
    if components == 0 {
        return Ok(());
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: components };
    vcpu.set_xcrs(&xcrs).attempt("setting XCR0")
}

/// Sets CPUID leaves.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn set_cpuid(vcpu: &VcpuFd, leaves: &[kvm_bindings::kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let too_many = |_| KvmError::Size { what: "CPUID", have: leaves.len(), want: 256 };
    let leaves = CpuId::from_entries(leaves).map_err(too_many)?;
    vcpu.set_cpuid2(&leaves).attempt("setting CPUID")
}

/// Gives the guest's TSC the frequency `wanted` kHz, if it is not the host's already.
///
/// # Errors
/// [`KvmError::TscFrequency`] when this host cannot.
pub fn set_tsc_khz(vm: &Vm, vcpu: &VcpuFd, wanted: u32) -> Result<(), KvmError> {
    let have = vcpu.get_tsc_khz().attempt("asking for the TSC frequency")?;
    let apart = u64::from(wanted.abs_diff(have)) * 1_000_000;
    if wanted == 0 || apart <= u64::from(have) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    if !vm.caps.tsc_control {
        return Err(KvmError::TscFrequency { want: wanted, have });
    }
    vcpu.set_tsc_khz(wanted).attempt("setting the TSC frequency")
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// Puts the vCPU at the entry of a kernel.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn set_boot_state(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut regs = kvm_regs { rip: entry.address, rflags: 2, ..Default::default() };
    let (code, data) = match entry.protocol {
        Protocol::Pvh => {
            regs.rbx = entry.parameters;
            (0x08, 0x10)
        }
        Protocol::Linux => {
            regs.rsi = entry.parameters;
            (0x10, 0x18)
        }
    };
    vcpu.set_regs(&regs).attempt("setting the registers")?;

    let mut sregs = vcpu.get_sregs().attempt("reading the system registers")?;
    if entry.protocol == Protocol::Linux {
        (sregs.gdt.base, sregs.gdt.limit) = (LINUX_GDT, 4 * 8 - 1);
    }
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.cs = segment(code, 0xb);
    let data = segment(data, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..Default::default() };
    vcpu.set_sregs(&sregs).attempt("setting the system registers")?;

    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let initial =
        [msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)];
    let too_many = |_| KvmError::Size { what: "MSRs", have: initial.len(), want: initial.len() };
    let msrs = Msrs::from_entries(&initial).map_err(too_many)?;
    // A KVM that does not know one of them leaves the power-on value, which boots as well.
    vcpu.set_msrs(&msrs).attempt("setting the MSRs")?;
    Ok(())
}
