//! Saving and restoring a vCPU. The order of the calls is part of the contract with KVM.
//!
//! **Saving.** `mp_state` first, because asking for it makes KVM take pending INIT and SIPI; then the events, because asking for
//! them delivers a pending exception's payload into the registers that are read next; MSRs last of what moves by itself.
//!
//! **Restoring.** CPUID before all that is checked against it; the system registers (with the APIC's mode) before the local
//! APIC, the local APIC before the MSRs, because `TSC_DEADLINE` arms its timer; the deadline after the TSC, because it is
//! compared with it; events and `mp_state` last.
//!
//! **TSC.** The guest's TSC must run on, not jump. Where KVM lets us, the offset to the host's TSC is saved and set: on the
//! same physical machine it stays as it is and the guest's TSC is exactly continuous; on another one it is corrected by how far the two
//! hosts' TSCs are apart ([`TscPlan`]). Where KVM has no such attribute, `IA32_TSC` itself is written, advanced by the time the move took.

use kvm_bindings::{
    KVM_MP_STATE_UNINITIALIZED, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use wire::state::{CpuidEntry, MsrEntry, VcpuState};

use super::setup;
use crate::kvm::{Attempt, KvmError, Vm, cpuid, from_bytes, ioctl, to_bytes};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_APICBASE: u32 = 0x1b;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// How the guest's TSC goes on where it is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TscPlan {
    /// To be added to the saved offset between guest TSC and host TSC, modulo 2^64.
    pub offset_change: u64,
    /// Ticks between saving and restoring; what `IA32_TSC` is advanced by where the offset cannot be set.
    pub elapsed_ticks: u64,
}

/// Reads all of a stopped vCPU's state; `cpuid` is what it was told.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn save(vcpu: &VcpuFd, vm: &Vm, cpuid: &[CpuidEntry]) -> Result<VcpuState, KvmError> {
    let mp_state = vcpu.get_mp_state().attempt("reading mp_state")?.mp_state;
    let events = vcpu.get_vcpu_events().attempt("reading vCPU events")?;
    let state = VcpuState {
        mp_state,
        events: to_bytes(&events),
        regs: to_bytes(&vcpu.get_regs().attempt("reading the registers")?),
        sregs: to_bytes(&vcpu.get_sregs().attempt("reading the system registers")?),
        xsave: save_xsave(vcpu, vm.caps.xsave_bytes)?,
        xcrs: to_bytes(&vcpu.get_xcrs().attempt("reading the extended control registers")?),
        debugregs: to_bytes(&vcpu.get_debug_regs().attempt("reading the debug registers")?),
        lapic: to_bytes(&vcpu.get_lapic().attempt("reading the local APIC")?),
        cpuid: cpuid.to_vec(),
        tsc_khz: vcpu.get_tsc_khz().attempt("asking for the TSC frequency")?,
        tsc_offset: if vm.caps.vcpu_attributes { ioctl::tsc_offset(vcpu) } else { None },
        nested: Vec::new(),
        msrs: save_msrs(vcpu, &vm.msr_indices)?,
    };
    Ok(state)
}

/// Writes all of a vCPU's state; the vCPU has not run yet. `told` is what it was told by CPUID, and is brought up to date.
///
/// # Errors
/// [`KvmError`] when the state does not fit this host or KVM refuses it.
pub fn restore(
    vcpu: &VcpuFd,
    vm: &Vm,
    told: &mut Vec<CpuidEntry>,
    state: &VcpuState,
    plan: TscPlan,
) -> Result<(), KvmError> {
    cpuid::check(&state.cpuid, &vm.supported_cpuid)?;
    if *told != state.cpuid {
        setup::set_cpuid(vcpu, &cpuid::from_state(&state.cpuid))?;
        told.clone_from(&state.cpuid);
    }
    setup::set_tsc_khz(vm, vcpu, state.tsc_khz)?;

    let sregs: kvm_sregs = from_bytes(&state.sregs, "kvm_sregs")?;
    vcpu.set_sregs(&sregs).attempt("writing the system registers")?;
    let regs: kvm_regs = from_bytes(&state.regs, "kvm_regs")?;
    vcpu.set_regs(&regs).attempt("writing the registers")?;
    let xcrs: kvm_xcrs = from_bytes(&state.xcrs, "kvm_xcrs")?;
    vcpu.set_xcrs(&xcrs).attempt("writing the extended control registers")?;
    restore_xsave(vcpu, vm.caps.xsave_bytes, &state.xsave)?;
    let debugregs: kvm_debugregs = from_bytes(&state.debugregs, "kvm_debugregs")?;
    vcpu.set_debug_regs(&debugregs).attempt("writing the debug registers")?;

    let offset = state.tsc_offset.filter(|_| vm.caps.vcpu_attributes);
    if let Some(offset) = offset {
        let offset = offset.wrapping_add(plan.offset_change);
        ioctl::set_tsc_offset(vcpu, offset).attempt("setting the TSC offset")?;
    }
    let lapic: kvm_lapic_state = from_bytes(&state.lapic, "kvm_lapic_state")?;
    vcpu.set_lapic(&lapic).attempt("writing the local APIC")?;
    restore_msrs(vcpu, &msrs_in_order(&state.msrs, offset.is_none().then_some(plan.elapsed_ticks)))?;

    let mp_state = kvm_mp_state { mp_state: state.mp_state };
    // A vCPU that waits for INIT is in that state already, and some KVMs refuse to be told so.
    if state.mp_state != KVM_MP_STATE_UNINITIALIZED {
        vcpu.set_mp_state(mp_state).attempt("writing mp_state")?;
    }
    let events: kvm_vcpu_events = from_bytes(&state.events, "kvm_vcpu_events")?;
    vcpu.set_vcpu_events(&events).attempt("writing vCPU events")
}

/// The MSRs in the order in which they are to be written: the TSC as `elapsed_ticks` says, its deadline last.
fn msrs_in_order(saved: &[MsrEntry], elapsed_ticks: Option<u64>) -> Vec<kvm_msr_entry> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let plain = |m: &&MsrEntry| !matches!(m.index, MSR_IA32_TSC | MSR_IA32_TSC_DEADLINE | MSR_IA32_APICBASE);
    let mut out: Vec<_> = saved.iter().filter(plain).map(|m| msr(m.index, m.value)).collect();
    let find = |index| saved.iter().find(|m| m.index == index).map(|m| m.value);
    if let (Some(tsc), Some(elapsed)) = (find(MSR_IA32_TSC), elapsed_ticks) {
        out.push(msr(MSR_IA32_TSC, tsc.wrapping_add(elapsed)));
    }
    if let Some(deadline) = find(MSR_IA32_TSC_DEADLINE) {
        out.push(msr(MSR_IA32_TSC_DEADLINE, deadline));
    }
    out
}

fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrEntry>, KvmError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    // KVM stops at the first MSR it cannot read, and says how many it has read. That one is left out.
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let too_many = |_| KvmError::Size { what: "MSRs", have: rest.len(), want: rest.len() };
        let mut msrs = Msrs::from_entries(&entries).map_err(too_many)?;
        let read = vcpu.get_msrs(&mut msrs).attempt("reading MSRs")?.min(rest.len());
        let convert = |m: &kvm_msr_entry| MsrEntry { index: m.index, value: m.data };
        saved.extend(msrs.as_slice()[..read].iter().map(convert));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

fn restore_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let too_many = |_| KvmError::Size { what: "MSRs", have: entries.len(), want: entries.len() };
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(too_many)?;
        let written = vcpu.set_msrs(&msrs).attempt("writing MSRs")?.min(rest.len());
        // KVM stops at the first it refuses. One whose value is 0 may simply not exist here; any other is part of the guest.
        if let Some(refused) = rest.get(written)
            && refused.data != 0
        {
            return Err(KvmError::Msr { index: refused.index, value: refused.data });
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Bytes of the XSAVE area that every host has; what is beyond is the extra part of `kvm_xsave2`.
const XSAVE_BASE_BYTES: usize = size_of::<kvm_xsave>();

fn save_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, KvmError> {
    if bytes <= XSAVE_BASE_BYTES {
        return Ok(to_bytes(&vcpu.get_xsave().attempt("reading the extended state")?));
    }
    let mut xsave = new_xsave(bytes)?;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave for this VM.
    let read = unsafe { vcpu.get_xsave2(&mut xsave) };
    read.attempt("reading the extended state")?;
    let mut out = to_bytes(&xsave.as_fam_struct_ref().xsave);
    for word in xsave.as_slice() {
        out.extend_from_slice(&word.to_le_bytes());
    }
    Ok(out)
}

fn restore_xsave(vcpu: &VcpuFd, bytes: usize, saved: &[u8]) -> Result<(), KvmError> {
    let wrong = KvmError::Size { what: "kvm_xsave", have: saved.len(), want: bytes };
    let Some((base, extra)) = saved.split_at_checked(XSAVE_BASE_BYTES) else { return Err(wrong) };
    let base: kvm_xsave = from_bytes(base, "kvm_xsave")?;
    if saved.len() > bytes && extra.iter().any(|&b| b != 0) {
        return Err(wrong);
    }
    if bytes <= XSAVE_BASE_BYTES {
        // SAFETY: KVM reads 4096 bytes on this host, which is the size of the structure.
        let written = unsafe { vcpu.set_xsave(&base) };
        return written.attempt("writing the extended state");
    }
    let mut xsave = new_xsave(bytes)?;
    // SAFETY: only the payload is written, the length stays as it is.
    let inner = unsafe { xsave.as_mut_fam_struct() };
    inner.xsave = base;
    for (word, raw) in xsave.as_mut_slice().iter_mut().zip(extra.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*raw);
    }
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave for this VM.
    let written = unsafe { vcpu.set_xsave2(&xsave) };
    written.attempt("writing the extended state")
}

fn new_xsave(bytes: usize) -> Result<Xsave, KvmError> {
    let extra = (bytes - XSAVE_BASE_BYTES).div_ceil(4);
    Xsave::new(extra).map_err(|_| KvmError::Size { what: "kvm_xsave2", have: bytes, want: XSAVE_BASE_BYTES })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Vec<MsrEntry> {
        [(MSR_IA32_TSC_DEADLINE, 9), (MSR_IA32_APICBASE, 3), (MSR_IA32_TSC, 100), (0x174, 5)]
            .map(|(index, value)| MsrEntry { index, value })
            .to_vec()
    }

    #[test]
    fn the_deadline_comes_last_and_the_tsc_just_before_it() {
        let order: Vec<_> = msrs_in_order(&saved(), Some(11)).iter().map(|m| (m.index, m.data)).collect();
        assert_eq!(order, [(0x174, 5), (MSR_IA32_TSC, 111), (MSR_IA32_TSC_DEADLINE, 9)]);
    }

    #[test]
    fn the_tsc_is_not_written_when_its_offset_is_set() {
        let order: Vec<_> = msrs_in_order(&saved(), None).iter().map(|m| m.index).collect();
        assert_eq!(order, [0x174, MSR_IA32_TSC_DEADLINE]);
    }
}
