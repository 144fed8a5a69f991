//! Time: the TSC and its frequency.
//!
//! The frequency comes from the best source there is: the command line, kvmclock (KVM tells exactly what it gives us), CPUID,
//! and else a measurement against the PIT. A wrong frequency would scale every figure the guest reports, so `status` names the source.

use crate::cpu;
use crate::kvmclock::KvmClock;

const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL0: u16 = 0x40;
const PIT_COMMAND: u16 = 0x43;
/// Channel 0, both bytes, rate generator: counts down from 65536 again and again.
const PIT_RATE_GENERATOR: u8 = 0x34;
/// Latches the count of channel 0 for reading.
const PIT_LATCH: u8 = 0x00;
/// Counts that are waited for, about 25 ms.
const PIT_COUNTS: u16 = 30_000;
/// A count that stands still for so many reads says that there is no PIT.
const PIT_STANDSTILL: u32 = 100;

/// The machine's clock, in TSC ticks since boot.
#[derive(Clone, Copy)]
pub struct Clock {
    /// Ticks per second.
    pub hz: u64,
    /// Where `hz` comes from.
    pub source: &'static str,
    /// The TSC at boot.
    pub boot: u64,
}

impl Clock {
    /// Finds the frequency. `boot` is the TSC to count from.
    #[must_use]
    pub fn new(boot: u64, told_khz: Option<u64>, kvmclock: Option<&KvmClock>) -> Self {
        let sources = [
            ("cmdline", told_khz.map(|khz| khz.saturating_mul(1000))),
            ("kvmclock", kvmclock.and_then(KvmClock::tsc_hz)),
            ("cpuid-hypervisor", hypervisor_leaf()),
            ("cpuid-15", crystal_leaf()),
        ];
        for (source, hz) in sources {
            if let Some(hz) = hz.filter(|hz| *hz >= 1_000_000) {
                return Self { hz, source, boot };
            }
        }
        if let Some(hz) = pit() {
            return Self { hz, source: "pit", boot };
        }
        let hz =
            if cpu::cpuid(0)[0] >= 0x16 { u64::from(cpu::cpuid(0x16)[0] & 0xffff) * 1_000_000 } else { 0 };
        assert!(hz > 0, "no way to find the TSC frequency: give mashine.tsc_khz");
        Self { hz, source: "cpuid-16", boot }
    }

    /// Ticks to microseconds.
    #[must_use]
    pub fn us(&self, ticks: u64) -> u64 {
        u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(self.hz)).unwrap_or(u64::MAX)
    }

    /// Microseconds to ticks.
    #[must_use]
    pub fn ticks(&self, us: u64) -> u64 {
        u64::try_from(u128::from(us) * u128::from(self.hz) / 1_000_000).unwrap_or(u64::MAX)
    }

    /// Microseconds since boot.
    #[must_use]
    pub fn uptime_us(&self) -> u64 {
        self.us(cpu::tsc().saturating_sub(self.boot))
    }
}

fn hypervisor_leaf() -> Option<u64> {
    let present =
        cpu::cpuid(1)[2] >> 31 == 1 && (0x4000_0010..0x4000_0100).contains(&cpu::cpuid(0x4000_0000)[0]);
    present.then(|| u64::from(cpu::cpuid(0x4000_0010)[0]) * 1000)
}

fn crystal_leaf() -> Option<u64> {
    if cpu::cpuid(0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal_hz, _] = cpu::cpuid(0x15);
    (u64::from(crystal_hz) * u64::from(numerator)).checked_div(u64::from(denominator))
}

/// Counts TSC ticks while the PIT's channel 0 counts down. `None` if there is no PIT.
fn pit() -> Option<u64> {
    cpu::out8(PIT_COMMAND, PIT_RATE_GENERATOR);
    cpu::out8(PIT_CHANNEL0, 0);
    cpu::out8(PIT_CHANNEL0, 0);
    let (first, start) = (pit_count(), cpu::tsc());
    let (mut counted, mut still) = (0, 0);
    while counted < PIT_COUNTS && still < PIT_STANDSTILL {
        // Ends long before it counts through 0 and beyond the first count again (55 ms), as reads take microseconds.
        let now = first.wrapping_sub(pit_count());
        still = if now == counted { still + 1 } else { 0 };
        counted = now;
    }
    let ticks = cpu::tsc() - start;
    (counted >= PIT_COUNTS).then(|| ticks * PIT_HZ / u64::from(counted))
}

fn pit_count() -> u16 {
    cpu::out8(PIT_COMMAND, PIT_LATCH);
    let low = cpu::in8(PIT_CHANNEL0);
    u16::from_le_bytes([low, cpu::in8(PIT_CHANNEL0)])
}
