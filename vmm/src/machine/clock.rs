//! Time across a move: the guest's paravirtual clock and TSC run on as if it had never stopped.
//!
//! What is saved is one instant seen on three clocks: the guest's (kvmclock), the wall clock, and the source's TSC. Where it is
//! restored, the wall clock says how long the move took; the guest's clocks are advanced by that. They never step back: a target whose
//! wall clock is behind counts as no time at all.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use wire::state::ClockState;

use crate::kvm::{Attempt, KvmError, Vm};
use crate::vcpu::TscPlan;

/// How far two readings of one machine's TSC may be from what the wall clock says, in milliseconds; more means that it is another TSC.
const SAME_TSC_MS: u64 = 2;
/// And how much more per tick passed, as a fraction: wall clocks are corrected by up to 500 parts per million.
const SAME_TSC_DRIFT: u64 = 2000;

fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and nothing here forbids it to user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The guest's clock and the host's TSC in one instant.
#[derive(Debug, Clone, Copy)]
struct Reading {
    clock_ns: u64,
    /// The wall clock, if KVM read it in the same instant.
    realtime_ns: Option<u64>,
    tsc: u64,
    /// How many ticks `tsc` may be off.
    uncertain_ticks: u64,
}

fn read_once(vm: &Vm) -> Result<Reading, KvmError> {
    let before = host_tsc();
    let clock = vm.fd.get_clock().attempt("reading the clock")?;
    let half = host_tsc().wrapping_sub(before) / 2;
    let has = |flag: u32| clock.flags & flag != 0;
    let together = has(KVM_CLOCK_HOST_TSC);
    Ok(Reading {
        clock_ns: clock.clock,
        realtime_ns: has(KVM_CLOCK_REALTIME).then_some(clock.realtime),
        // Where KVM does not say, the clock was read about half-way.
        tsc: if together { clock.host_tsc } else { before.wrapping_add(half) },
        uncertain_ticks: if together { 0 } else { half },
    })
}

/// The best of a few readings: a thread that the host takes the CPU from in the middle of one is off by milliseconds.
fn read(vm: &Vm) -> Result<Reading, KvmError> {
    const READINGS: u32 = 4;
    const GOOD_ENOUGH_TICKS: u64 = 20_000;
    let mut best = read_once(vm)?;
    for _ in 1..READINGS {
        if best.uncertain_ticks <= GOOD_ENOUGH_TICKS {
            break;
        }
        let again = read_once(vm)?;
        if again.uncertain_ticks < best.uncertain_ticks {
            best = again;
        }
    }
    Ok(best)
}

/// Reads the clocks.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn save(vm: &Vm) -> Result<ClockState, KvmError> {
    let Reading { clock_ns, realtime_ns, tsc, .. } = read(vm)?;
    let realtime_ns = Some(realtime_ns.unwrap_or_else(wall_ns));
    Ok(ClockState { clock_ns, realtime_ns, host_tsc: Some(tsc) })
}

/// Sets the guest's clock as if it had run on, and says what becomes of its TSC, which runs at `tsc_khz`.
///
/// Linux holds its clocks against each other twice a second and gives one up that is off by 100 us. So both of ours go by the same
/// measure of how long the move took: on the same machine the TSC, which nobody corrects, elsewhere the wall clock.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn restore(vm: &Vm, saved: &ClockState, tsc_khz: u32) -> Result<TscPlan, KvmError> {
    let now = host_tsc();
    let wall_elapsed_ns = saved.realtime_ns.map_or(0, |then| wall_ns().saturating_sub(then));
    let (plan, elapsed_ns) = plan(saved, wall_elapsed_ns, now, tsc_khz);
    let base = saved.clock_ns.saturating_add(elapsed_ns);
    settle(vm, |tsc| base.saturating_add(ns_of(tsc.wrapping_sub(now), tsc_khz)))?;
    Ok(plan)
}

/// Sets the clock to what it should be, as a function of the host's TSC; once more if the call took so long that it is not.
fn settle(vm: &Vm, due_ns: impl Fn(u64) -> u64) -> Result<(), KvmError> {
    const ATTEMPTS: u32 = 5;
    const GOOD_ENOUGH_NS: u64 = 20_000;
    let mut lead_ns = 0i64;
    for _ in 0..ATTEMPTS {
        let clock = due_ns(host_tsc()).saturating_add_signed(lead_ns);
        vm.fd.set_clock(&kvm_clock_data { clock, ..Default::default() }).attempt("setting the clock")?;
        let got = read(vm)?;
        let due = due_ns(got.tsc);
        if due.abs_diff(got.clock_ns) <= GOOD_ENOUGH_NS {
            break;
        }
        lead_ns = lead_ns.saturating_add(due.checked_signed_diff(got.clock_ns).unwrap_or(0));
    }
    Ok(())
}

/// `ticks` of a TSC of `khz` in nanoseconds; none if its frequency is not known.
fn ns_of(ticks: u64, khz: u32) -> u64 {
    let ns = (u128::from(ticks) * 1_000_000).checked_div(khz.into()).unwrap_or(0);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// The TSC's part of [`restore`], and how long the move took, in nanoseconds. Pure.
fn plan(saved: &ClockState, elapsed_ns: u64, now: u64, tsc_khz: u32) -> (TscPlan, u64) {
    let ticks = u128::from(elapsed_ns) * u128::from(tsc_khz) / 1_000_000;
    let elapsed_ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
    let Some(then) = saved.host_tsc.filter(|_| tsc_khz != 0) else {
        return (TscPlan { offset_change: 0, elapsed_ticks }, elapsed_ns);
    };
    // What the source's TSC shows at this moment, and how far ours is from it.
    let apart = then.wrapping_add(elapsed_ticks).wrapping_sub(now);
    let distance = apart.min(apart.wrapping_neg());
    let tolerance = u64::from(tsc_khz) * SAME_TSC_MS + elapsed_ticks / SAME_TSC_DRIFT;
    if distance > tolerance {
        return (TscPlan { offset_change: apart, elapsed_ticks }, elapsed_ns);
    }
    // The same TSC; it cannot have gone backwards but for the tolerance.
    let passed = if now.wrapping_sub(then) > u64::MAX / 2 { 0 } else { now.wrapping_sub(then) };
    (TscPlan { offset_change: 0, elapsed_ticks: passed }, ns_of(passed, tsc_khz))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 2_000_000;

    fn saved(host_tsc: u64) -> ClockState {
        ClockState { clock_ns: 0, realtime_ns: Some(0), host_tsc: Some(host_tsc) }
    }

    #[test]
    fn on_the_same_machine_the_offset_stays() {
        // 10 ms later, the same TSC has made 20,000,000 ticks and a few.
        let got = plan(&saved(5_000), 10_000_000, 20_007_000, KHZ);
        // The wall clock may be off; the TSC is what both clocks go by.
        assert_eq!(got, (TscPlan { offset_change: 0, elapsed_ticks: 20_002_000 }, 10_001_000));
    }

    #[test]
    fn on_another_machine_the_guests_tsc_goes_on() {
        for target in [1_000u64, 900_000_000_000] {
            let (got, elapsed_ns) = plan(&saved(50_000_000_000), 10_000_000, target, KHZ);
            assert_eq!(elapsed_ns, 10_000_000);
            // Guest TSC = host TSC + offset; with an offset of 0 on the source it must show what the source's would.
            assert_eq!(target.wrapping_add(got.offset_change), 50_020_000_000);
        }
    }

    #[test]
    fn a_wall_clock_that_is_behind_does_not_turn_time_back() {
        let (got, _) = plan(&saved(50_000_000_000), 0, 1_000, KHZ);
        assert_eq!(1_000u64.wrapping_add(got.offset_change), 50_000_000_000);
        assert_eq!(plan(&saved(0), u64::MAX, 1 << 63, u32::MAX).0.elapsed_ticks, u64::MAX);
    }

    #[test]
    fn a_tsc_that_seems_to_step_back_stands_still() {
        let (got, elapsed_ns) = plan(&saved(5_000), 0, 4_000, KHZ);
        assert_eq!((got.elapsed_ticks, got.offset_change, elapsed_ns), (0, 0, 0));
    }
}
