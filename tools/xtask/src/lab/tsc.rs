//! Frequency of this machine's TSC, which is what the emulated processors show as theirs.
//!
//! A lab host that calibrates by itself, on a busy machine, is wrong by a thousandth, each by another one; then no host can take
//! a machine of another, because the emulated processor cannot scale. So it is measured once, here, and told to all.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How long is measured: a delay of 10 us at either end is then 40 millionths.
const TIME: Duration = Duration::from_millis(250);

/// Measures it, in kHz.
///
/// # Errors
/// When the counter does not count.
pub(super) fn measured_khz() -> Result<u64> {
    let (begun, first) = (Instant::now(), now());
    std::thread::sleep(TIME);
    let (time, last) = (begun.elapsed(), now());
    khz(last.wrapping_sub(first), time).context("the TSC of this machine does not count")
}

fn khz(ticks: u64, time: Duration) -> Option<u64> {
    let khz = u128::from(ticks) * 1_000_000 / time.as_nanos().max(1);
    u64::try_from(khz).ok().filter(|&khz| khz > 0)
}

fn now() -> u64 {
    // SAFETY: every x86-64 has the instruction, it touches no memory, and Linux allows it in user space unless a process has
    // asked for the opposite (`PR_SET_TSC`), which this program never does.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_a_frequency() {
        assert_eq!(khz(575_000_000, TIME), Some(2_300_000));
        assert_eq!(khz(0, TIME), None);
        assert!((100_000..10_000_000).contains(&measured_khz().unwrap()));
    }
}
