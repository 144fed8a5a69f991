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

/// Reads the clocks.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn save(vm: &Vm) -> Result<ClockState, KvmError> {
    let clock = vm.fd.get_clock().attempt("reading the clock")?;
    let has = |flag: u32| clock.flags & flag != 0;
    // Where KVM cannot read all three in one instant, reading them one after the other is off by a microsecond.
    Ok(ClockState {
        clock_ns: clock.clock,
        realtime_ns: Some(if has(KVM_CLOCK_REALTIME) { clock.realtime } else { wall_ns() }),
        host_tsc: Some(if has(KVM_CLOCK_HOST_TSC) { clock.host_tsc } else { host_tsc() }),
    })
}

/// Sets the guest's clock as if it had run on, and says what becomes of its TSC, which runs at `tsc_khz`.
///
/// # Errors
/// [`KvmError`] when KVM refuses.
pub fn restore(vm: &Vm, saved: &ClockState, tsc_khz: u32) -> Result<TscPlan, KvmError> {
    let elapsed_ns = saved.realtime_ns.map_or(0, |then| wall_ns().saturating_sub(then));
    let clock = kvm_clock_data { clock: saved.clock_ns.saturating_add(elapsed_ns), ..Default::default() };
    vm.fd.set_clock(&clock).attempt("setting the clock")?;
    Ok(plan(saved, elapsed_ns, host_tsc(), tsc_khz))
}

/// The TSC's part of [`restore`]. Pure.
fn plan(saved: &ClockState, elapsed_ns: u64, now: u64, tsc_khz: u32) -> TscPlan {
    let ticks = u128::from(elapsed_ns) * u128::from(tsc_khz) / 1_000_000;
    let elapsed_ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
    let Some(then) = saved.host_tsc else { return TscPlan { offset_change: 0, elapsed_ticks } };
    // What the source's TSC shows at this moment, and how far ours is from it.
    let apart = then.wrapping_add(elapsed_ticks).wrapping_sub(now);
    let distance = apart.min(apart.wrapping_neg());
    let tolerance = u64::from(tsc_khz) * SAME_TSC_MS + elapsed_ticks / SAME_TSC_DRIFT;
    let offset_change = if distance <= tolerance { 0 } else { apart };
    TscPlan { offset_change, elapsed_ticks }
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
        assert_eq!(got, TscPlan { offset_change: 0, elapsed_ticks: 20_000_000 });
    }

    #[test]
    fn on_another_machine_the_guests_tsc_goes_on() {
        for target in [1_000u64, 900_000_000_000] {
            let got = plan(&saved(50_000_000_000), 10_000_000, target, KHZ);
            // Guest TSC = host TSC + offset; with an offset of 0 on the source it must show what the source's would.
            assert_eq!(target.wrapping_add(got.offset_change), 50_020_000_000);
        }
    }

    #[test]
    fn a_wall_clock_that_is_behind_does_not_turn_time_back() {
        let got = plan(&saved(50_000_000_000), 0, 1_000, KHZ);
        assert_eq!(1_000u64.wrapping_add(got.offset_change), 50_000_000_000);
        assert_eq!(plan(&saved(0), u64::MAX, 0, u32::MAX).elapsed_ticks, u64::MAX);
    }
}
