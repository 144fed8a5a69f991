//! Interrupt and exception vectors.
//!
//! The stubs are in `boot.s`, 16 bytes apart; the table that points to them is filled in here, in ring 3, as ring 0 may
//! be slow. An interrupt only counts: the loop looks at the counters after a halt. An exception is the end: its stub
//! notes what happened and goes on in [`rust_exception`].

use crate::power;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// First interrupt vector: the timer.
pub const TIMER: u8 = 32;
/// First device vector.
pub const DEVICES: u8 = 33;
/// Spurious interrupts.
pub const SPURIOUS: u8 = 63;

const VECTORS: usize = 64;
const CODE0: u64 = 0x08;
/// Present, ring 0, interrupt gate.
const GATE: u64 = 0x8e00;

unsafe extern "C" {
    static vector_stubs: u8;
    static idt: [[AtomicU64; 2]; VECTORS];
    static irq_counts: [AtomicU32; VECTORS - 32];
    static exception_info: [AtomicU64; 5];
}

/// Fills in the interrupt table. `boot.s` has loaded its address already.
pub fn init() {
    let stubs = (&raw const vector_stubs).addr() as u64;
    // SAFETY: a table of this size in `boot.s`, written by nobody else, read by the CPU; atomics allow that.
    let table = unsafe { &idt };
    for (entry, vector) in table.iter().zip(0u64..) {
        let at = stubs + 16 * vector;
        let low = at & 0xffff | CODE0 << 16 | GATE << 32 | (at >> 16 & 0xffff) << 48;
        entry[1].store(at >> 32, Ordering::Relaxed);
        entry[0].store(low, Ordering::Relaxed);
    }
}

/// How many interrupts of this vector (>= 32) were taken.
#[must_use]
pub fn count(vector: u8) -> u32 {
    // SAFETY: a table of this size in `boot.s`; the stubs increment its words.
    let counts = unsafe { &irq_counts };
    counts.get(usize::from(vector).wrapping_sub(32)).map_or(0, |c| c.load(Ordering::Relaxed))
}

/// Where an exception stub goes on, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn rust_exception() -> ! {
    // SAFETY: five words in `boot.s`, written before this was entered.
    let info = unsafe { &exception_info };
    let [vector, error, rip, cs, cr2] = [0, 1, 2, 3, 4].map(|i: usize| info[i].load(Ordering::Relaxed));
    power::fatal(format_args!("exception {vector} error={error:#x} rip={rip:#x} cs={cs:#x} cr2={cr2:#x}"))
}
