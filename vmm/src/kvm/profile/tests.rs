//! Each level on a host that has everything, and what a host that has less answers.

use super::*;

fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, flags: 1, eax, ebx, ecx, edx, padding: [0; 3] }
}

/// A CPU with every bit set, and with its XSAVE components where Intel has them.
fn everything() -> Vec<kvm_cpuid_entry2> {
    const ALL: u32 = u32::MAX;
    vec![
        leaf(0, 0, [0x20, 1, 2, 3]),
        leaf(1, 0, [0x806f8, 0x0100_0800, ALL, ALL]),
        leaf(5, 0, [64, 64, 3, 0]),
        leaf(6, 0, [ALL; 4]),
        leaf(7, 0, [2, ALL, ALL, ALL]),
        leaf(7, 1, [ALL; 4]),
        leaf(0xa, 0, [ALL; 4]),
        leaf(0xb, 0, [0, 1, 0x100, 0]),
        leaf(0xd, 0, [0x6_02e7, 0x240, 0x2b00, 0]),
        leaf(0xd, 1, [0x1f, 0x2b00, 0x1800, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0xd, 5, [0x40, 0x440, 0, 0]),
        leaf(0xd, 6, [0x200, 0x480, 0, 0]),
        leaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0xd, 9, [8, 0xa80, 0, 0]),
        leaf(0xd, 18, [0x2000, 0xb00, 2, 0]),
        leaf(0x1d, 0, [1, 0, 0, 0]),
        leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, 0, [ALL, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0022, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, ALL, ALL]),
        leaf(0x8000_0008, 0, [0x3934, ALL, 0x3003, ALL]),
        leaf(0x8000_000a, 0, [1, 16, 0, ALL]),
        leaf(0x8000_0021, 0, [ALL, 0, 0, 0]),
    ]
}

fn cut(profile: Profile) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = everything();
    apply(&mut leaves, profile).unwrap();
    leaves
}

fn word(leaves: &[kvm_cpuid_entry2], function: u32, index: u32, register: usize) -> u32 {
    let found = leaves.iter().find(|e| (e.function, e.index) == (function, index));
    found.map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][register])
}

/// Names of all features in the leaves, by the tables that other messages use.
fn names(leaves: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    for w in WORDS.iter().filter(|w| w.function != 0x4000_0001) {
        let have = word(leaves, w.function, w.index, w.register) & !w.not_features;
        names.extend((0..32).filter(|bit| have >> bit & 1 == 1).map(|bit| w.name(bit)));
    }
    names
}

#[test]
fn the_host_profile_changes_nothing() {
    assert_eq!(cut(Profile::Host), everything());
}

#[test]
fn a_level_shows_its_own_features_and_none_above() {
    let levels = [Profile::V2, Profile::V3, Profile::V4];
    for profile in levels {
        let names = names(&cut(profile));
        for other in levels {
            for feature in other.features() {
                let wanted = profile.features().contains(&feature);
                assert_eq!(names.iter().any(|n| n == feature), wanted, "{feature} in {}", profile.name());
            }
        }
        for gone in ["aes", "rdrand", "smep", "svm", "pku", "la57", "sha_ni", "ssbd", "amx_tile", "pdpe1gb"] {
            assert!(!names.iter().any(|n| n == gone), "{gone} in {}", profile.name());
        }
        for kept in ["nx", "lm", "syscall", "sse2", "pat", "apic", "clflush", "fxsr"] {
            assert!(names.iter().any(|n| n == kept), "{kept} not in {}", profile.name());
        }
    }
}

#[test]
fn extended_state_has_the_components_of_the_level_and_their_size() {
    // (profile, XCR0, bytes, components)
    let table: [(Profile, u32, u32, &[u32]); 3] = [
        (Profile::V2, 0, 0, &[]),
        (Profile::V3, 0x7, 0x340, &[0, 1, 2]),
        (Profile::V4, 0xe7, 0xa80, &[0, 1, 2, 5, 6, 7]),
    ];
    for (profile, xcr0, bytes, components) in table {
        let leaves = cut(profile);
        let of_leaf: Vec<u32> = leaves.iter().filter(|e| e.function == 0xd).map(|e| e.index).collect();
        assert_eq!(of_leaf, components, "{}", profile.name());
        assert_eq!(word(&leaves, 0xd, 0, 0), xcr0);
        assert_eq!(word(&leaves, 0xd, 0, 2), bytes);
        assert_eq!((0..4).map(|r| word(&leaves, 0xd, 1, r)).sum::<u32>(), 0, "no compacted areas");
    }
}

#[test]
fn leaves_of_what_is_gone_are_gone() {
    for profile in [Profile::V2, Profile::V3, Profile::V4] {
        let leaves = cut(profile);
        for function in [5, 0xa, 0x1d, 0x8000_000a, 0x8000_0021] {
            assert!(leaves.iter().all(|e| e.function != function), "{function:#x}");
        }
        assert_eq!(word(&leaves, 0, 0, 0), if profile == Profile::V2 { 0xb } else { 0xd });
        assert_eq!(word(&leaves, 0x8000_0000, 0, 0), 0x8000_0008);
        assert_eq!(word(&leaves, 0x8000_0008, 0, 0), 0x3028, "40 and 48 address bits");
        assert_eq!(word(&leaves, 0x8000_0008, 0, 2), 0x3003, "topology stays");
        assert_eq!(word(&leaves, 6, 0, 0), 4);
        assert_eq!(word(&leaves, 7, 0, 0), 0);
        assert_eq!(word(&leaves, 0x4000_0001, 0, 0), u32::MAX);
        assert_eq!(word(&leaves, 1, 0, 3) & HTT, HTT);
    }
}

#[test]
fn a_host_below_the_level_is_refused_by_the_feature() {
    for (function, index, register, bit, name) in
        [(1, 0, 2, 23, "popcnt"), (7, 0, 1, 5, "avx2"), (1, 0, 2, 26, "xsave"), (7, 0, 1, 31, "avx512vl")]
    {
        let mut leaves = everything();
        let e = leaves.iter_mut().find(|e| (e.function, e.index) == (function, index)).unwrap();
        *[&mut e.eax, &mut e.ebx, &mut e.ecx, &mut e.edx][register] &= !(1 << bit);
        assert_eq!(apply(&mut leaves, Profile::V4), Err(MissingFeature(name.to_owned())));
    }
}
