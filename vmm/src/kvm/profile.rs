//! Fleet baselines: CPUID cut down to a level of the x86-64 psABI, so that a guest finds the same features on every host of the fleet.
//!
//! It is an allow-list. What no table here names is not there: new instructions, and leaves that describe what was taken away, disappear by default
//! and not because somebody remembered them. Speculation controls go too, because hosts of one level differ in them; who wants them, and a fleet
//! of equal hosts, takes the profile `host`. The vendor, family and model stay what they are: kernels choose their workarounds by them.

use kvm_bindings::kvm_cpuid_entry2;
use wire::cpu::Profile;

use super::cpuid::MissingFeature;
use super::features::WORDS;

/// Address bits of every baseline: what all hosts have, and enough for any machine's RAM.
const PHYSICAL_BITS: u32 = 40;
const LINEAR_BITS: u32 = 48;

/// Features of the operating system's side that every CPU of a level has: paging, system calls, interrupts, clocks. By CPUID word.
const SYSTEM: [(u32, usize, u32); 4] = [
    // Everything of a first 64-bit CPU but its debug store, thermal monitor and serial number.
    (1, 3, 0x078b_fbff),
    // x2apic, tsc_deadline_timer, hypervisor are KVM's; OSXSAVE follows CR4.
    (1, 2, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    // cmp_legacy describes the topology.
    (0x8000_0001, 2, 1 << 1),
    // AMD's copies of leaf 1's bits, syscall, nx, pdpe1gb is left out, rdtscp is left out, lm.
    (0x8000_0001, 3, 0x0183_fbff | 1 << 11 | 1 << 20 | 1 << 29),
];

/// XSAVE components: x87, SSE, AVX; opmask and both halves of the AVX-512 registers.
const XCR0_AVX: u64 = 0b111;
const XCR0_AVX512: u64 = 0b1110_0000;
/// End of the legacy region and header of an XSAVE area.
const XSAVE_HEADER_END: u32 = 576;

/// Leaves that say what is there by saying it, not by feature bits: vendor, caches, topology, sizes, names, and KVM's own.
const fn is_kept(function: u32) -> bool {
    matches!(
        function,
        0..=2 | 4 | 6 | 7 | 0xb | 0xd | 0x1f
            | 0x4000_0000..=0x4000_00ff
            | 0x8000_0000..=0x8000_0006
            | 0x8000_0008
            | 0x8000_001d
            | 0x8000_001e
    )
}

/// The bits of a feature word that `profile` allows.
fn allowed(profile: Profile, function: u32, index: u32, register: usize) -> u32 {
    let system = SYSTEM.iter().find(|(f, r, _)| index == 0 && *f == function && *r == register);
    let word = WORDS.iter().find(|w| (w.function, w.index, w.register) == (function, index, register));
    let named = word.map_or(0, |word| word.bits_of(&profile.features()));
    named | system.map_or(0, |(_, _, bits)| *bits)
}

/// Cuts `leaves` down to `profile`.
///
/// # Errors
/// [`MissingFeature`] when the host does not have the level.
pub fn apply(leaves: &mut Vec<kvm_cpuid_entry2>, profile: Profile) -> Result<(), MissingFeature> {
    if profile == Profile::Host {
        return Ok(());
    }
    leaves.retain(|e| is_kept(e.function) && !(e.function == 7 && e.index != 0));
    for e in leaves.iter_mut() {
        let allow = |register| allowed(profile, e.function, e.index, register);
        let (a, b, c, d) = (allow(0), allow(1), allow(2), allow(3));
        match e.function {
            1 => (e.ecx, e.edx) = (e.ecx & c, e.edx & (d | HTT)),
            // Only that the timer of the local APIC runs always.
            6 => (e.eax, e.ebx, e.ecx, e.edx) = (e.eax & 1 << 2, 0, 0, 0),
            7 => (e.eax, e.ebx, e.ecx, e.edx) = (a, e.ebx & b, e.ecx & c, e.edx & d),
            0x8000_0001 => (e.ecx, e.edx) = (e.ecx & c, e.edx & d),
            0x8000_0008 => {
                e.eax = (e.eax & 0xff).min(PHYSICAL_BITS) | LINEAR_BITS << 8;
                (e.ebx, e.edx) = (0, 0);
            }
            _ => {}
        }
    }
    cut_extended_state(leaves, profile);
    cut_maxima(leaves);
    require(leaves, profile)
}

const HTT: u32 = 1 << 28;

/// Leaf 0xd: the components of the level, and the size that an area for them has; nothing without XSAVE.
fn cut_extended_state(leaves: &mut Vec<kvm_cpuid_entry2>, profile: Profile) {
    let components = match profile {
        Profile::V3 => XCR0_AVX,
        Profile::V4 => XCR0_AVX | XCR0_AVX512,
        Profile::V2 | Profile::Host => 0,
    };
    leaves.retain(|e| {
        e.function != 0xd || (components != 0 && (e.index < 2 || components >> e.index & 1 == 1))
    });
    let area = leaves.iter().filter(|e| e.function == 0xd && e.index >= 2);
    let bytes = area.map(|e| e.eax.saturating_add(e.ebx)).max().unwrap_or(0).max(XSAVE_HEADER_END);
    for e in leaves.iter_mut().filter(|e| e.function == 0xd) {
        match e.index {
            0 => {
                let [low, high] = [components & 0xffff_ffff, components >> 32];
                e.eax &= u32::try_from(low).unwrap_or(0);
                e.edx &= u32::try_from(high).unwrap_or(0);
                // What is on after power-on, which KVM keeps up to date, and what can be.
                (e.ebx, e.ecx) = (XSAVE_HEADER_END, bytes);
            }
            1 => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            // Neither aligned in compacted areas nor a supervisor component: both belong to features that are gone.
            _ => (e.ecx, e.edx) = (0, 0),
        }
    }
}

/// The highest leaves are those that are left.
fn cut_maxima(leaves: &mut [kvm_cpuid_entry2]) {
    for base in [0, 0x8000_0000] {
        let in_range = |e: &&kvm_cpuid_entry2| (base..base + 0x1000_0000).contains(&e.function);
        let last = leaves.iter().filter(in_range).map(|e| e.function).max().unwrap_or(base);
        for e in leaves.iter_mut().filter(|e| e.function == base) {
            e.eax = e.eax.min(last);
        }
    }
}

/// Whether all of the level is there.
fn require(leaves: &[kvm_cpuid_entry2], profile: Profile) -> Result<(), MissingFeature> {
    for word in &WORDS {
        let wanted = word.bits_of(&profile.features());
        let have = leaves.iter().find(|e| e.function == word.function && e.index == word.index);
        let have = have.map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][word.register]);
        let missing = wanted & !have;
        if missing != 0 {
            return Err(MissingFeature(word.name(missing.trailing_zeros())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
