//! Time: the TSC and its frequency.
//!
//! The frequency comes from the best source there is: the command line, kvmclock (KVM tells exactly what it gives us), CPUID,
//! and else a measurement against the PIT. A wrong frequency would scale every figure the guest reports, so `status` names the source.

use crate::cpu;
use crate::kvmclock::KvmClock;

const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
const PIT_GATE: u16 = 0x61;
/// About 20 ms.
const PIT_COUNT: u16 = 23_864;

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

/// Counts TSC ticks while the PIT's channel 2 counts down. `None` if there is no PIT.
fn pit() -> Option<u64> {
    let [low, high] = PIT_COUNT.to_le_bytes();
    cpu::out8(PIT_GATE, cpu::in8(PIT_GATE) & !3 | 1);
    cpu::out8(PIT_COMMAND, 0xb0);
    cpu::out8(PIT_CHANNEL2, low);
    cpu::out8(PIT_CHANNEL2, high);
    let start = cpu::tsc();
    // A port read takes microseconds, so this many take longer than the 20 ms that are waited for.
    for turn in 0..1_000_000 {
        if cpu::in8(PIT_GATE) & 0x20 != 0 {
            let ticks = cpu::tsc() - start;
            // Where nothing answers, ports read as all ones at once.
            return (turn > 2).then(|| ticks * PIT_HZ / u64::from(PIT_COUNT));
        }
    }
    None
}
