//! Interrupt controllers: the local APIC with its timer, and the IOAPIC.
//!
//! x2APIC where CPUID has it (its registers are model-specific, so each access is a call into ring 0), else the
//! register window of the xAPIC. The timer is one-shot and counts at a rate measured against the TSC at boot.

use crate::clock::Clock;
use crate::memory::window::Window;
use crate::{cpu, trap};
use core::sync::atomic::{AtomicU32, Ordering};

const MSR_APIC_BASE: u32 = 0x1b;
// SAFETY: the register window of the local APIC, by the architecture.
const XAPIC: Window = unsafe { Window::new(0xfee0_0000, 4096) };
const IOAPIC: u64 = 0xfec0_0000;
/// Distance between IOAPICs, and interrupts each of them has.
const IOAPIC_STRIDE: u64 = 0x1_0000;
const IOAPIC_PINS: u32 = 24;

const TASK_PRIORITY: u32 = 0x80;
const SPURIOUS_VECTOR: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;
const MASKED: u32 = 1 << 16;

unsafe extern "C" {
    static x2apic_on: AtomicU32;
}

/// The local APIC of the vCPU that made it.
#[derive(Clone, Copy)]
pub struct Apic {
    x2: bool,
    timer_per_ms: u64,
}

impl Apic {
    /// Enables the local APIC of vCPU 0 and measures its timer.
    #[must_use]
    pub fn new(clock: &Clock) -> Self {
        let mut apic = Self { x2: cpu::cpuid(1)[2] >> 21 & 1 == 1, timer_per_ms: 0 };
        // SAFETY: a word in `boot.s` that only interrupt stubs read, and none has run yet.
        unsafe { &x2apic_on }.store(u32::from(apic.x2), Ordering::Relaxed);
        apic.enable();
        apic.write(TIMER_INITIAL, u32::MAX);
        let until = cpu::tsc() + clock.ticks(1000);
        while cpu::tsc() < until {}
        apic.timer_per_ms = u64::from(u32::MAX - apic.read(TIMER_CURRENT)).max(1);
        apic.write(TIMER_INITIAL, 0);
        apic
    }

    /// Enables the local APIC of the vCPU this runs on.
    pub fn enable(&self) {
        let base = cpu::read_msr(MSR_APIC_BASE) | if self.x2 { 0xc00 } else { 0x800 };
        // SAFETY: turns the interrupt controller on; touches no memory.
        unsafe { cpu::write_msr(MSR_APIC_BASE, base) };
        self.write(TASK_PRIORITY, 0);
        self.write(SPURIOUS_VECTOR, 0x100 | u32::from(trap::SPURIOUS));
        self.write(LVT_LINT0, MASKED);
        self.write(LVT_LINT1, MASKED);
        self.write(TIMER_DIVIDE, 0xb);
        self.write(LVT_TIMER, u32::from(trap::TIMER));
    }

    /// Halts until an interrupt, at most this long.
    pub fn idle(&self, us: u32) {
        let count = (self.timer_per_ms * u64::from(us) / 1000).clamp(1, u64::from(u32::MAX));
        if self.x2 {
            cpu::idle(Some((msr(TIMER_INITIAL), count)));
        } else {
            self.write(TIMER_INITIAL, u32::try_from(count).unwrap_or(u32::MAX));
            cpu::idle(None);
        }
    }

    /// Sends an interrupt command (INIT, start-up) to a vCPU.
    pub fn send(&self, apic_id: u32, command: u32) {
        if self.x2 {
            // SAFETY: interrupts other vCPUs only; what they run is set up by `smp`.
            unsafe { cpu::write_msr(msr(COMMAND), u64::from(apic_id) << 32 | u64::from(command)) };
        } else {
            self.write(COMMAND + 0x10, apic_id << 24);
            self.write(COMMAND, command);
        }
    }

    /// Reads a register by its xAPIC offset.
    #[must_use]
    pub fn read(&self, register: u32) -> u32 {
        if self.x2 {
            u32::try_from(cpu::read_msr(msr(register)) & 0xffff_ffff).unwrap_or(0)
        } else {
            XAPIC.read(u64::from(register))
        }
    }

    fn write(&self, register: u32, value: u32) {
        if self.x2 {
            // SAFETY: registers of the interrupt controller; none of them makes it write memory.
            unsafe { cpu::write_msr(msr(register), u64::from(value)) };
        } else {
            XAPIC.write(u64::from(register), value);
        }
    }
}

/// The x2APIC's model-specific register of an xAPIC register offset.
fn msr(register: u32) -> u32 {
    0x800 + (register >> 4)
}

/// Lets a global system interrupt (edge, active high) arrive on vCPU 0 as this vector.
pub fn route(gsi: u32, vector: u8) {
    let low = redirection(gsi);
    write_ioapic(gsi, low + 1, 0);
    write_ioapic(gsi, low, u32::from(vector));
}

/// How a global system interrupt is routed, without the bits that change by themselves.
#[must_use]
pub fn routed(gsi: u32) -> u64 {
    const CHANGING: u32 = 1 << 12 | 1 << 14;
    let low = redirection(gsi);
    u64::from(read_ioapic(gsi, low + 1)) << 32 | u64::from(read_ioapic(gsi, low) & !CHANGING)
}

/// The IOAPIC's register for the lower half of an interrupt's entry.
fn redirection(gsi: u32) -> u32 {
    0x10 + 2 * (gsi % IOAPIC_PINS)
}

fn ioapic(gsi: u32) -> Window {
    let at = IOAPIC + u64::from(gsi / IOAPIC_PINS) * IOAPIC_STRIDE;
    // SAFETY: the register window of an IOAPIC, by the contract with the VMM.
    unsafe { Window::new(at, 0x20) }
}

fn read_ioapic(gsi: u32, register: u32) -> u32 {
    let window = ioapic(gsi);
    window.write(0, register);
    window.read(0x10)
}

fn write_ioapic(gsi: u32, register: u32, value: u32) {
    let window = ioapic(gsi);
    window.write(0, register);
    window.write(0x10, value);
}
