//! Notices state that did not survive a migration or a restore, beyond memory and the network.
//!
//! At boot, registers that nothing here needs are set to known values, and all that is to be watched is read once; the `state` command
//! reads it again. What does not read back as written already at boot is not watched, so a VMM's quirk is not taken for a loss. While the
//! loop spins, most of its time is spent in [`vector_registers_keep`], so a pause most likely hits it.

use crate::apic::{self, Apic};
use crate::cpu;
use crate::kvmclock;
use core::arch::asm;
use guest_core::cmdline::{Config, MAX_DEVICES};
use guest_core::page::mix;

/// Model-specific registers that this program does not use, with the bits of each that may be anything.
const CANARIES: [(&str, u32, u64); 9] = [
    ("star", 0xc000_0081, u64::MAX),
    ("lstar", 0xc000_0082, 0x7fff_ffff_ffff),
    ("cstar", 0xc000_0083, 0x7fff_ffff_ffff),
    ("sfmask", 0xc000_0084, 0x003f_0fff),
    ("fs_base", 0xc000_0100, 0x7fff_ffff_ffff),
    ("gs_base", 0xc000_0101, 0x7fff_ffff_ffff),
    ("kernel_gs_base", 0xc000_0102, 0x7fff_ffff_ffff),
    ("sysenter_esp", 0x175, 0x7fff_ffff_ffff),
    ("sysenter_eip", 0x176, 0x7fff_ffff_ffff),
];
/// Registers that are in use: only read.
const WATCHED: [(&str, u32); 3] = [("efer", 0xc000_0080), ("apic_base", 0x1b), ("pat", 0x277)];
const APIC_REGISTERS: [(&str, u32); 6] = [
    ("apic_task_priority", 0x80),
    ("apic_spurious", 0xf0),
    ("apic_lvt_timer", 0x320),
    ("apic_lvt_lint0", 0x350),
    ("apic_lvt_lint1", 0x360),
    ("apic_timer_divide", 0x3e0),
];
/// Flush to zero: distinct from the reset value and without effect here, as nothing computes with floats.
const MXCSR: u32 = 0x9f80;
/// Double precision; the reset value is extended.
const X87_CONTROL: u16 = 0x027f;
const SPIN_TURNS: u32 = 2000;
const MOST: usize = 32;

/// Something that was read at boot.
#[derive(Clone, Copy)]
struct Watch {
    name: &'static str,
    place: Place,
    value: u64,
}

#[derive(Clone, Copy)]
enum Place {
    Msr(u32),
    Apic(u32),
    IoApic(u32),
    Mxcsr,
    X87Control,
    CpuId,
}

/// What is watched on vCPU 0.
pub struct Observer {
    apic: Apic,
    watches: [Option<Watch>; MOST],
}

/// What the `state` command found.
pub struct Found {
    /// Things that were compared.
    pub checked: usize,
    /// Those that differ.
    pub wrong: usize,
    /// The name of the first of them.
    pub first_wrong: Option<&'static str>,
}

impl Observer {
    /// Sets the canaries and reads everything.
    #[must_use]
    pub fn new(apic: Apic, config: &Config, kvmclock: bool, seed: u64) -> Self {
        let mut observer = Self { apic, watches: [None; MOST] };
        for (name, msr, mask) in CANARIES {
            let value = mix(seed ^ u64::from(msr)) & mask;
            // SAFETY: `syscall`, `sysenter` and `swapgs` are not used, nor are fs and gs.
            unsafe { cpu::write_msr(msr, value) };
            if cpu::read_msr(msr) == value {
                observer.watch(name, Place::Msr(msr));
            }
        }
        set_float_control();
        WATCHED.iter().for_each(|(name, msr)| observer.watch(name, Place::Msr(*msr)));
        if kvmclock {
            observer.watch("kvmclock", Place::Msr(kvmclock::MSR_SYSTEM_TIME_NEW));
        }
        APIC_REGISTERS.iter().for_each(|(name, register)| observer.watch(name, Place::Apic(*register)));
        for window in config.devices().take(MAX_DEVICES) {
            observer.watch("ioapic", Place::IoApic(window.gsi));
        }
        observer.watch("mxcsr", Place::Mxcsr);
        observer.watch("x87_control", Place::X87Control);
        observer.watch("cpuid", Place::CpuId);
        observer
    }

    /// Compares everything with what it was at boot.
    #[must_use]
    pub fn compare(&self) -> Found {
        let mut found = Found { checked: 0, wrong: 0, first_wrong: None };
        for watch in self.watches.iter().flatten() {
            found.checked += 1;
            if self.read(watch.place) != watch.value {
                found.wrong += 1;
                found.first_wrong.get_or_insert(watch.name);
            }
        }
        found
    }

    fn watch(&mut self, name: &'static str, place: Place) {
        let value = self.read(place);
        if let Some(free) = self.watches.iter_mut().find(|w| w.is_none()) {
            *free = Some(Watch { name, place, value });
        }
    }

    fn read(&self, place: Place) -> u64 {
        match place {
            Place::Msr(msr) => cpu::read_msr(msr),
            Place::Apic(register) => u64::from(self.apic.read(register)),
            Place::IoApic(gsi) => apic::routed(gsi),
            Place::Mxcsr => u64::from(mxcsr()),
            Place::X87Control => u64::from(x87_control()),
            Place::CpuId => cpuid_digest(),
        }
    }
}

/// A digest of the CPUID leaves that say what the CPU can do.
fn cpuid_digest() -> u64 {
    [0, 1, 7, 0x8000_0000, 0x8000_0001, 0x8000_0007, 0x8000_0008].into_iter().fold(0, |digest, leaf| {
        let [a, mut b, c, d] = cpu::cpuid(leaf);
        if leaf == 1 {
            // The number of the physical CPU this happens to run on, where the hypervisor lets it through.
            b &= 0x00ff_ffff;
        }
        [a, b, c, d].into_iter().fold(digest, |digest, register| mix(digest ^ u64::from(register)))
    })
}

fn set_float_control() {
    // SAFETY: nothing here computes with floats, so their modes have no effect.
    unsafe { asm!("ldmxcsr [{0}]", in(reg) &MXCSR, options(nostack, readonly, preserves_flags)) };
    // SAFETY: likewise.
    unsafe { asm!("fldcw [{0}]", in(reg) &X87_CONTROL, options(nostack, readonly, preserves_flags)) };
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores into a local.
    unsafe { asm!("stmxcsr [{0}]", in(reg) &mut value, options(nostack, preserves_flags)) };
    value
}

fn x87_control() -> u16 {
    let mut value = 0u16;
    // SAFETY: stores into a local.
    unsafe { asm!("fnstcw [{0}]", in(reg) &mut value, options(nostack, preserves_flags)) };
    value
}

/// Aligned as `movaps` wants it. Only its address is used.
#[repr(align(16))]
#[expect(dead_code, reason = "read by assembly")]
struct Pattern([[u8; 16]; 16]);

/// Different bytes in each register, so that swapped ones are seen too.
static PATTERN: Pattern = {
    let mut rows = [[0; 16]; 16];
    let mut row = 0u8;
    while row < 16 {
        let mut column = 0u8;
        while column < 16 {
            rows[row as usize][column as usize] = (row * 16 + column).wrapping_mul(167);
            column += 1;
        }
        row += 1;
    }
    Pattern(rows)
};

/// Holds a pattern in all vector registers for about a microsecond; whether it was still there.
#[must_use]
pub fn vector_registers_keep() -> bool {
    let same: u32;
    // SAFETY: reads the pattern, which is aligned for it, and changes registers only.
    unsafe {
        asm!(
            "movaps xmm0, [{p}]", "movaps xmm1, [{p} + 16]", "movaps xmm2, [{p} + 32]", "movaps xmm3, [{p} + 48]",
            "movaps xmm4, [{p} + 64]", "movaps xmm5, [{p} + 80]", "movaps xmm6, [{p} + 96]", "movaps xmm7, [{p} + 112]",
            "movaps xmm8, [{p} + 128]", "movaps xmm9, [{p} + 144]", "movaps xmm10, [{p} + 160]", "movaps xmm11, [{p} + 176]",
            "movaps xmm12, [{p} + 192]", "movaps xmm13, [{p} + 208]", "movaps xmm14, [{p} + 224]", "movaps xmm15, [{p} + 240]",
            "2: dec {turns:e}", "jnz 2b",
            "pcmpeqb xmm0, [{p}]", "pcmpeqb xmm1, [{p} + 16]", "pcmpeqb xmm2, [{p} + 32]", "pcmpeqb xmm3, [{p} + 48]",
            "pcmpeqb xmm4, [{p} + 64]", "pcmpeqb xmm5, [{p} + 80]", "pcmpeqb xmm6, [{p} + 96]", "pcmpeqb xmm7, [{p} + 112]",
            "pcmpeqb xmm8, [{p} + 128]", "pcmpeqb xmm9, [{p} + 144]", "pcmpeqb xmm10, [{p} + 160]", "pcmpeqb xmm11, [{p} + 176]",
            "pcmpeqb xmm12, [{p} + 192]", "pcmpeqb xmm13, [{p} + 208]", "pcmpeqb xmm14, [{p} + 224]", "pcmpeqb xmm15, [{p} + 240]",
            "pand xmm0, xmm1", "pand xmm2, xmm3", "pand xmm4, xmm5", "pand xmm6, xmm7",
            "pand xmm8, xmm9", "pand xmm10, xmm11", "pand xmm12, xmm13", "pand xmm14, xmm15",
            "pand xmm0, xmm2", "pand xmm4, xmm6", "pand xmm8, xmm10", "pand xmm12, xmm14",
            "pand xmm0, xmm4", "pand xmm8, xmm12", "pand xmm0, xmm8", "pmovmskb {same:e}, xmm0",
            p = in(reg) &PATTERN, turns = inout(reg) SPIN_TURNS => _, same = out(reg) same,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, readonly)
        );
    }
    same == 0xffff
}
