//! The instructions Rust has no words for: ports, TSC, CPUID, and the call into ring 0.
//!
//! All of this runs in ring 3. What needs ring 0 (model-specific registers, `hlt`) goes through `ring0_call` in `boot.s`,
//! a `ud2` that the invalid-opcode handler knows by its address.

use core::arch::{asm, x86_64};

const RING0_IDLE: u32 = 0;
const RING0_READ_MSR: u32 = 1;
const RING0_WRITE_MSR: u32 = 2;

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: ports reach devices, not memory; the TSS allows all of them to ring 3.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes a 16-bit word to an I/O port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from an I/O port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// The time stamp counter.
#[must_use]
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: ring 3 may read the counter (CR4.TSD is clear) and every x86-64 CPU has it.
    unsafe { x86_64::_rdtsc() }
}

/// EAX, EBX, ECX, EDX of a CPUID leaf.
#[must_use]
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let r = x86_64::__cpuid(leaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Reads a model-specific register. One that does not exist ends the guest with a #GP report.
#[must_use]
pub fn read_msr(msr: u32) -> u64 {
    ring0(RING0_READ_MSR, msr, 0)
}

/// Writes a model-specific register.
///
/// # Safety
/// The value must not take away what the program runs on (its page tables, descriptor tables, memory).
pub unsafe fn write_msr(msr: u32, value: u64) {
    ring0(RING0_WRITE_MSR, msr, value);
}

/// Halts until an interrupt was taken. Interrupts are taken nowhere else, so one that came before is not missed.
/// With `arm`, first writes this MSR, which is to start the timer.
pub fn idle(arm: Option<(u32, u64)>) {
    let (msr, value) = arm.unwrap_or((0, 0));
    ring0(RING0_IDLE, msr, value);
}

/// Halts for ever.
pub fn halt() -> ! {
    loop {
        idle(None);
    }
}

fn ring0(function: u32, msr: u32, value: u64) -> u64 {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
    let (low, high): (u32, u32);
    // SAFETY: `ring0_call` returns behind its `ud2` with all registers but rax, rcx and rdx kept; interrupt
    // handlers on the way touch only their own counters. It pushes a return address: the stack is usable.
    unsafe {
        asm!(
            "call ring0_call",
            in("edi") function,
            inout("ecx") msr => _,
            inout("eax") u32::from_le_bytes([b0, b1, b2, b3]) => low,
            inout("edx") u32::from_le_bytes([b4, b5, b6, b7]) => high,
        );
    }
    u64::from(high) << 32 | u64::from(low)
}
