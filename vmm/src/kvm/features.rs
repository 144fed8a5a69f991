//! What people call the bits of CPUID: the names of Linux's `/proc/cpuinfo`, for messages. Bits that are not in the list are named by
//! their place.

/// A feature word of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// 0 to 3 for `eax` to `edx`.
    pub register: usize,
    /// Bits that mirror settings of the operating system, or that the VMM sets itself, instead of features of the CPU.
    pub not_features: u32,
    /// Names by bit.
    names: &'static [(u32, &'static str)],
}

const fn word(
    function: u32,
    index: u32,
    register: usize,
    not_features: u32,
    names: &'static [(u32, &'static str)],
) -> Word {
    Word { function, index, register, not_features, names }
}

/// All words that hold features.
pub const WORDS: [Word; 11] = [
    // x2apic, tsc_deadline_timer and hypervisor are KVM's; OSXSAVE mirrors CR4.
    word(1, 0, 2, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31, LEAF_1_ECX),
    // ht is topology.
    word(1, 0, 3, 1 << 28, LEAF_1_EDX),
    word(7, 0, 1, 0, LEAF_7_EBX),
    // OSPKE mirrors CR4.
    word(7, 0, 2, 1 << 4, LEAF_7_ECX),
    word(7, 0, 3, 0, LEAF_7_EDX),
    word(7, 1, 0, 0, &[(4, "avx_vnni"), (5, "avx512_bf16")]),
    word(0xd, 1, 0, 0, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")]),
    word(0x8000_0001, 0, 2, 0, EXTENDED_1_ECX),
    word(0x8000_0001, 0, 3, 0, EXTENDED_1_EDX),
    word(0x8000_0008, 0, 1, 0, &[(0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd")]),
    // What the guest does with its hypervisor's help, it goes on doing on the next host.
    word(0x4000_0001, 0, 0, 0, PARAVIRTUAL),
];

const LEAF_1_ECX: &[(u32, &str)] = &[
    (0, "pni"),
    (1, "pclmulqdq"),
    (9, "ssse3"),
    (12, "fma"),
    (13, "cx16"),
    (17, "pcid"),
    (19, "sse4_1"),
    (20, "sse4_2"),
    (22, "movbe"),
    (23, "popcnt"),
    (25, "aes"),
    (26, "xsave"),
    (28, "avx"),
    (29, "f16c"),
    (30, "rdrand"),
];

const LEAF_1_EDX: &[(u32, &str)] = &[
    (0, "fpu"),
    (4, "tsc"),
    (5, "msr"),
    (6, "pae"),
    (8, "cx8"),
    (9, "apic"),
    (13, "pge"),
    (15, "cmov"),
    (16, "pat"),
    (19, "clflush"),
    (23, "mmx"),
    (24, "fxsr"),
    (25, "sse"),
    (26, "sse2"),
];

const LEAF_7_EBX: &[(u32, &str)] = &[
    (0, "fsgsbase"),
    (1, "tsc_adjust"),
    (3, "bmi1"),
    (5, "avx2"),
    (7, "smep"),
    (8, "bmi2"),
    (9, "erms"),
    (10, "invpcid"),
    (16, "avx512f"),
    (17, "avx512dq"),
    (18, "rdseed"),
    (19, "adx"),
    (20, "smap"),
    (21, "avx512ifma"),
    (23, "clflushopt"),
    (24, "clwb"),
    (28, "avx512cd"),
    (29, "sha_ni"),
    (30, "avx512bw"),
    (31, "avx512vl"),
];

const LEAF_7_ECX: &[(u32, &str)] = &[
    (1, "avx512vbmi"),
    (2, "umip"),
    (3, "pku"),
    (6, "avx512_vbmi2"),
    (8, "gfni"),
    (9, "vaes"),
    (10, "vpclmulqdq"),
    (11, "avx512_vnni"),
    (12, "avx512_bitalg"),
    (14, "avx512_vpopcntdq"),
    (16, "la57"),
    (22, "rdpid"),
];

const LEAF_7_EDX: &[(u32, &str)] = &[
    (4, "fsrm"),
    (10, "md_clear"),
    (22, "amx_bf16"),
    (23, "avx512_fp16"),
    (24, "amx_tile"),
    (25, "amx_int8"),
    (29, "arch_capabilities"),
    (31, "ssbd"),
];

const EXTENDED_1_ECX: &[(u32, &str)] = &[
    (0, "lahf_lm"),
    (2, "svm"),
    (4, "cr8_legacy"),
    (5, "abm"),
    (6, "sse4a"),
    (7, "misalignsse"),
    (8, "3dnowprefetch"),
];

const EXTENDED_1_EDX: &[(u32, &str)] = &[
    (11, "syscall"),
    (20, "nx"),
    (22, "mmxext"),
    (25, "fxsr_opt"),
    (26, "pdpe1gb"),
    (27, "rdtscp"),
    (29, "lm"),
];

/// These are in no `/proc/cpuinfo`; the names are those of Linux's documentation of the leaf.
const PARAVIRTUAL: &[(u32, &str)] = &[
    (0, "kvm_clocksource"),
    (3, "kvm_clocksource2"),
    (4, "kvm_async_pf"),
    (5, "kvm_steal_time"),
    (6, "kvm_pv_eoi"),
    (7, "kvm_pv_unhalt"),
    (9, "kvm_pv_tlb_flush"),
    (11, "kvm_pv_send_ipi"),
    (12, "kvm_poll_control"),
    (13, "kvm_pv_sched_yield"),
    (14, "kvm_async_pf_int"),
    (15, "kvm_msi_ext_dest_id"),
    (24, "kvm_clocksource_stable"),
];

impl Word {
    /// The bits that have one of these names.
    pub fn bits_of(&self, features: &[&str]) -> u32 {
        let named = self.names.iter().filter(|(_, name)| features.contains(name));
        named.fold(0, |bits, (bit, _)| bits | 1 << bit)
    }

    /// The name of one of its bits.
    pub fn name(&self, bit: u32) -> String {
        let known = self.names.iter().find(|(at, _)| *at == bit);
        let register = ["eax", "ebx", "ecx", "edx"].get(self.register).unwrap_or(&"?");
        known.map_or_else(
            || format!("CPUID {:#x}.{} {register} bit {bit}", self.function, self.index),
            |(_, name)| (*name).to_owned(),
        )
    }
}
