//! What the guest is told by CPUID: the host's supported leaves, with this VM's topology and its TSC frequency.
//!
//! One package, one thread per core, APIC ids in vCPU order. On a target host the leaves come from the state archive
//! instead, after a check that the host supports every feature they promise.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use wire::state::CpuidEntry;

use super::features::WORDS;

/// Subleaf matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const INDEXED: u32 = 1;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_TIMING: u32 = 0x4000_0010;
/// Frequency of KVM's local APIC timer, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
/// Of leaf 0x8000_0001: AMD-V, and its secure start.
const SVM_AND_SKINIT: u32 = 1 << 2 | 1 << 12;
/// What AMD-V can do.
const SVM_LEAF: u32 = 0x8000_000a;

/// Bits needed to number `count` things.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, flags: INDEXED, eax, ebx, ecx, edx, padding: [0; 3] }
}

/// Whether the vendor is AMD, or Hygon, whose CPUs are AMD's.
fn vendor_is_amd(supported: &CpuId) -> bool {
    let vendor = supported.as_slice().iter().find(|e| e.function == 0).map(|e| [e.ebx, e.edx, e.ecx]);
    let text = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
    vendor.is_some_and(|words| matches!(text(words).as_slice(), b"AuthenticAMD" | b"HygonGenuine"))
}

/// The leaves of vCPU `id` of `vcpus`. Hardware virtualisation is not among them: the state of a guest's own guests is not moved.
pub fn for_vcpu(supported: &CpuId, id: u32, vcpus: u32, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
    let bits = id_bits(vcpus);
    let is_amd = vendor_is_amd(supported);
    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|e| !matches!(e.function, 0xb | 0x1f | KVM_TIMING | SVM_LEAF))
        .copied()
        .collect();
    for e in &mut leaves {
        match e.function {
            0 => e.eax = e.eax.max(0xb),
            1 => {
                e.ebx = (e.ebx & 0xffff) | (id & 0xff) << 24 | vcpus.next_power_of_two().min(255) << 16;
                e.ecx &= !LEAF1_ECX_VMX;
                e.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
                e.edx = if vcpus > 1 { e.edx | LEAF1_EDX_HTT } else { e.edx & !LEAF1_EDX_HTT };
            }
            // Caches, Intel's and AMD's leaf: level 3 is shared by all cores, the others by none.
            4 | 0x8000_001d if e.eax & 0x1f != 0 => {
                let last = (1 << bits) - 1;
                let shared = if e.eax >> 5 & 7 >= 3 { last } else { 0 };
                let cores = if e.function == 4 { last } else { 0 };
                e.eax = (e.eax & 0x3fff) | shared << 14 | cores << 26;
            }
            // AMD's bit for "the threads of leaf 1 are cores".
            0x8000_0001 => {
                let legacy = if is_amd && vcpus > 1 { CMP_LEGACY } else { 0 };
                e.ecx = e.ecx & !(CMP_LEGACY | SVM_AND_SKINIT) | legacy;
            }
            0x8000_0008 if is_amd => e.ecx = (e.ecx & !0xf0ff) | bits << 12 | (vcpus - 1),
            0x8000_001e => {
                e.eax = id;
                e.ebx = id & 0xff;
                e.ecx = 0;
            }
            KVM_SIGNATURE => e.eax = e.eax.max(KVM_TIMING),
            _ => {}
        }
    }
    // Threads, cores, end; the newer leaf says the same where the CPU has it.
    let has_newer = supported.as_slice().iter().any(|e| e.function == 0x1f);
    for function in [0xb, 0x1f].into_iter().take(if has_newer { 2 } else { 1 }) {
        leaves.push(entry(function, 0, [0, 1, 1 << 8, id]));
        leaves.push(entry(function, 1, [bits, vcpus, 2 << 8 | 1, id]));
        leaves.push(entry(function, 2, [0, 0, 2, id]));
    }
    if tsc_khz != 0 {
        leaves.push(kvm_cpuid_entry2 { flags: 0, ..entry(KVM_TIMING, 0, [tsc_khz, APIC_BUS_KHZ, 0, 0]) });
    }
    leaves
}

/// The XSAVE components that the leaves promise; 0 without XSAVE.
pub fn extended_state(leaves: &[kvm_cpuid_entry2]) -> u64 {
    let find = |function| leaves.iter().find(|e| e.function == function && e.index == 0);
    if find(1).is_none_or(|e| e.ecx & LEAF1_ECX_XSAVE == 0) {
        return 0;
    }
    find(0xd).map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32)
}

/// As the archive has them.
pub fn to_state(leaves: &[kvm_cpuid_entry2]) -> Vec<CpuidEntry> {
    let convert = |e: &kvm_cpuid_entry2| CpuidEntry {
        function: e.function,
        index: e.index,
        flags: e.flags,
        regs: [e.eax, e.ebx, e.ecx, e.edx],
    };
    leaves.iter().map(convert).collect()
}

/// As KVM has them.
pub fn from_state(leaves: &[CpuidEntry]) -> Vec<kvm_cpuid_entry2> {
    leaves.iter().map(|e| kvm_cpuid_entry2 { flags: e.flags, ..entry(e.function, e.index, e.regs) }).collect()
}

/// A feature the guest was promised and this host's KVM does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host lacks the CPU feature `{0}`, which the guest was promised; choose a host that fits the machine's CPU profile"
)]
pub struct MissingFeature(pub String);

/// Checks that `supported` has every feature that `wanted` promises.
///
/// # Errors
/// The first feature that is missing.
pub fn check(wanted: &[CpuidEntry], supported: &CpuId) -> Result<(), MissingFeature> {
    for word in WORDS {
        let (function, index, register) = (word.function, word.index, word.register);
        let have = supported.as_slice().iter().find(|e| e.function == function && e.index == index);
        let have = have.map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][register]);
        let want = wanted.iter().find(|e| e.function == function && e.index == index);
        let want = want.map_or(0, |e| e.regs[register]);
        let missing = want & !have & !word.not_features;
        if missing != 0 {
            return Err(MissingFeature(word.name(missing.trailing_zeros())));
        }
    }
    check_extended_state(wanted, supported)
}

/// Registers saved by XSAVE lie where this CPU puts them, in the guest's memory too. CPUs of two vendors may have the same
/// components in different places.
fn check_extended_state(wanted: &[CpuidEntry], supported: &CpuId) -> Result<(), MissingFeature> {
    const COMPONENTS: std::ops::Range<u32> = 2..63;
    let find = |index| supported.as_slice().iter().find(|e| e.function == 0xd && e.index == index);
    let components = wanted.iter().filter(|e| e.function == 0xd && COMPONENTS.contains(&e.index));
    for component in components.filter(|e| e.regs[0] != 0) {
        let have = find(component.index).map(|e| [e.eax, e.ebx]);
        if have != Some([component.regs[0], component.regs[1]]) {
            return Err(MissingFeature(format!("XSAVE component {} in its place", component.index)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let flat = |e: kvm_cpuid_entry2| kvm_cpuid_entry2 { flags: 0, ..e };
        let leaves = [
            flat(entry(1, 0, [0x806ea, 0xffff_0800, 0x1, 0x1])),
            entry(7, 0, [0, 0b1010, 0, 0]),
            entry(4, 3, [0x163, 0, 0, 0]),
            flat(entry(KVM_SIGNATURE, 0, [0x4000_0001, 0, 0, 0])),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_id_and_the_same_topology() {
        for id in 0..3 {
            let leaves = for_vcpu(&supported(), id, 3, 2_500_000);
            let leaf = |f, i| leaves.iter().find(|e| e.function == f && e.index == i).unwrap();
            assert_eq!(leaf(1, 0).ebx >> 24, id);
            assert_eq!(leaf(0xb, 1).edx, id);
            assert_eq!(leaf(0xb, 1).ebx, 3);
            assert_eq!(leaf(0xb, 1).eax, 2);
            assert_eq!(leaf(4, 3).eax >> 26, 3);
            assert_eq!(leaf(KVM_SIGNATURE, 0).eax, KVM_TIMING);
            assert_eq!(leaf(KVM_TIMING, 0).eax, 2_500_000);
        }
    }

    #[test]
    fn guests_have_no_guests() {
        let flat = |function, ecx| kvm_cpuid_entry2 { flags: 0, ..entry(function, 0, [0, 0, ecx, 0]) };
        let all = [flat(1, LEAF1_ECX_VMX), flat(0x8000_0001, SVM_AND_SKINIT | 1), flat(SVM_LEAF, 0)];
        let leaves = for_vcpu(&CpuId::from_entries(&all).unwrap(), 0, 1, 0);
        let ecx = |function| leaves.iter().find(|e| e.function == function).map(|e| e.ecx);
        assert_eq!(ecx(1).map(|ecx| ecx & LEAF1_ECX_VMX), Some(0));
        assert_eq!((ecx(0x8000_0001), ecx(SVM_LEAF)), (Some(1), None));
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut wanted = to_state(&for_vcpu(&supported(), 0, 1, 0));
        assert_eq!(check(&wanted, &supported()), Ok(()));
        wanted.iter_mut().find(|e| e.function == 7).unwrap().regs[1] |= 1 << 16;
        assert_eq!(check(&wanted, &supported()), Err(MissingFeature("avx512f".to_owned())));
        wanted.iter_mut().find(|e| e.function == 7).unwrap().regs[1] = 1 << 2;
        let unnamed = check(&wanted, &supported()).unwrap_err();
        assert_eq!(unnamed.0, "CPUID 0x7.0 ebx bit 2");
    }

    #[test]
    fn leaves_survive_the_archive() {
        let leaves = for_vcpu(&supported(), 1, 2, 1);
        assert_eq!(from_state(&to_state(&leaves)), leaves);
    }
}
