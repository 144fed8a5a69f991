//! Further vCPUs: started one after the other by INIT and start-up interrupts, then working on their share of memory.
//!
//! There is no table to count them in, so the command line says how many there are. One that does not start within a second ends the
//! starting: the guest goes on with those it has and says so.

use crate::apic::Apic;
use crate::clock::Clock;
use crate::cpu;
use crate::memory::frames::Frames;
use crate::memory::managed::Managed;
use crate::memory::orders::REPORTS;
use crate::memory::window::{Window, address};
use crate::memory::worker::Worker;
use crate::once::Once;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use guest_core::command::Mode;
use guest_core::gap::Gaps;

/// Page below 1 MiB that the trampoline is copied to; its number is the start-up vector.
const TRAMPOLINE: u64 = 0x8000;
const COMMAND_INIT: u32 = 0x4500;
const COMMAND_START: u32 = 0x4600 | 8;
const PATIENCE_US: u64 = 1_000_000;
/// After INIT, as the CPU manuals ask for.
const INIT_US: u64 = 10_000;
const RING0_STACK: usize = 4096;
const RING3_STACK: usize = 64 * 1024;
const TSS_BYTES: usize = 104 + 8192 + 8;
const TSS_SELECTOR: u32 = 0x28;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_arguments: [AtomicU32; 4];
    static gdt: [AtomicU64; 37];
}

/// What further vCPUs need to know before they can work.
#[derive(Clone, Copy)]
pub struct Crew {
    /// Managed pages.
    pub managed: &'static Managed,
    /// Time.
    pub clock: Clock,
    /// vCPUs in all.
    pub vcpus: u32,
}

static APIC: Once<Apic> = Once::new();
static CREW: Once<Crew> = Once::new();
/// [`Mode::halt_us`].
static HALT_US: AtomicU32 = AtomicU32::new(0);

/// Starts vCPUs 1 to `vcpus - 1`; how many run in all. They wait for [`go`].
pub fn start(vcpus: u32, frames: &mut Frames, apic: Apic, clock: &Clock) -> u32 {
    if vcpus > 1 {
        APIC.set(apic);
        copy_trampoline();
    }
    (1..vcpus).find(|number| !start_one(*number, frames, apic, clock)).unwrap_or(vcpus)
}

/// Lets the started vCPUs work.
pub fn go(crew: Crew) {
    if crew.vcpus > 1 {
        CREW.set(crew);
    }
}

/// What vCPUs without work do.
pub fn set_mode(mode: Mode) {
    HALT_US.store(mode.halt_us(), Ordering::Relaxed);
}

fn copy_trampoline() {
    let from = (&raw const ap_trampoline).addr() as u64;
    let bytes = (&raw const ap_trampoline_end).addr() as u64 - from;
    // SAFETY: the code in `boot.s` between the two marks.
    let from = unsafe { Window::new(from, bytes) };
    // SAFETY: low memory, whose boot data was copied out; nothing of ours is there.
    let to = unsafe { Window::new(TRAMPOLINE, bytes) };
    for i in 0..bytes {
        to.write(i, from.read::<u8>(i));
    }
}

fn start_one(number: u32, frames: &mut Frames, apic: Apic, clock: &Clock) -> bool {
    let ring0 = top(frames.take::<u8>(RING0_STACK));
    let ring3 = top(frames.take::<u8>(RING3_STACK));
    let selector = describe_tss(number, ring0, frames);
    // SAFETY: four words in `boot.s`; the vCPU before has read them, as it is alive.
    let arguments = unsafe { &ap_arguments };
    // Handed-out memory is below 4 GiB: it lies behind the image.
    let words = [u64::from(selector), ring0, ring3, u64::from(number)];
    for (place, word) in arguments.iter().zip(words) {
        place.store(u32::try_from(word).unwrap_or(0), Ordering::SeqCst);
    }
    apic.send(number, COMMAND_INIT);
    wait(clock, INIT_US, || false);
    apic.send(number, COMMAND_START);
    let Some(report) = REPORTS.get(usize::try_from(number).unwrap_or(usize::MAX)) else { return false };
    wait(clock, PATIENCE_US, || report.alive.load(Ordering::Acquire) == 1)
}

/// Makes a TSS with all ports allowed, and its descriptor; the selector.
fn describe_tss(number: u32, ring0_stack: u64, frames: &mut Frames) -> u32 {
    let tss = frames.take::<u8>(TSS_BYTES);
    tss[4..12].copy_from_slice(&ring0_stack.to_le_bytes());
    tss[102] = 104;
    tss[TSS_BYTES - 8..].fill(0xff);
    let at = tss.as_ptr().expose_provenance() as u64;
    let limit = TSS_BYTES as u64 - 1;
    let low = limit | (at & 0xff_ffff) << 16 | 0x89 << 40 | (at >> 24 & 0xff) << 56;
    let selector = TSS_SELECTOR + 16 * number;
    // SAFETY: the table of `boot.s`; these two entries are this vCPU's, which does not run yet.
    let table = unsafe { &gdt };
    let index = address(u64::from(selector / 8));
    table[index].store(low, Ordering::SeqCst);
    table[index + 1].store(at >> 32, Ordering::SeqCst);
    selector
}

fn top(stack: &'static mut [u8]) -> u64 {
    stack.as_mut_ptr_range().end.expose_provenance() as u64
}

/// Waits until `done`, at most this long; whether it was.
fn wait(clock: &Clock, us: u64, done: impl Fn() -> bool) -> bool {
    let until = cpu::tsc() + clock.ticks(us);
    while cpu::tsc() < until {
        if done() {
            return true;
        }
        core::hint::spin_loop();
    }
    done()
}

/// Where `boot.s` goes on, in ring 3 on further vCPUs.
#[unsafe(no_mangle)]
extern "C" fn rust_ap_main(number: u32) -> ! {
    let report = usize::try_from(number).ok().and_then(|n| REPORTS.get(n));
    let (Some(report), Some(apic)) = (report, APIC.get()) else { cpu::halt() };
    apic.enable();
    report.alive.store(1, Ordering::Release);
    let crew = loop {
        if let Some(crew) = CREW.get() {
            break crew;
        }
        core::hint::spin_loop();
    };
    let mut worker = Worker::new(crew.managed, report, number, crew.vcpus, crew.clock.hz);
    let mut gaps = Gaps::new(crew.clock.hz, cpu::tsc());
    loop {
        let gap = gaps.sample(cpu::tsc());
        if gap > report.gap_max.load(Ordering::Relaxed) {
            report.gap_max.store(gap, Ordering::Relaxed);
        }
        let halt_us = HALT_US.load(Ordering::Relaxed);
        if !worker.step() && halt_us > 0 {
            apic.idle(halt_us);
            gaps.skip(cpu::tsc());
        }
    }
}
