//! kvmclock: the frequency of the TSC as KVM gives it, and a second clock to hold against the TSC across migrations.
//!
//! The host fills in a structure of 32 bytes (version, pad, tsc_timestamp, system_time, mul, shift, flags) under a version that
//! is odd while it is being changed.

use crate::cpu;
use crate::memory::frames::Frames;
use crate::memory::window::Window;

/// The register that says where the structure is.
pub const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
/// Bounded, so that a host that dies half way does not stop the guest.
const READ_TRIES: u32 = 100;

/// The structure the host keeps.
pub struct KvmClock {
    time: Window,
    /// What the host writes when asked for the wall clock: version, seconds, nanoseconds.
    wall: Window,
}

struct Snapshot {
    tsc: u64,
    ns: u64,
    mul: u32,
    shift: i8,
}

impl KvmClock {
    /// Asks KVM to keep the clock, if this is KVM.
    pub fn start(frames: &mut Frames) -> Option<Self> {
        let [max, b, c, d] = cpu::cpuid(0x4000_0000);
        let signature = (b, c, d) == (0x4b4d_564b, 0x564b_4d56, 0x4d);
        let hypervisor = cpu::cpuid(1)[2] >> 31 == 1;
        if !hypervisor
            || !signature
            || max < 0x4000_0001
            || cpu::cpuid(0x4000_0001)[0] & FEATURE_CLOCKSOURCE2 == 0
        {
            return None;
        }
        let (time, wall) = (frames.share(32), frames.share(12));
        // SAFETY: the host writes 32 bytes there, which are set aside for it.
        unsafe { cpu::write_msr(MSR_SYSTEM_TIME_NEW, time.at() | 1) };
        Some(Self { time, wall })
    }

    /// The TSC frequency that the host's factors stand for.
    #[must_use]
    pub fn tsc_hz(&self) -> Option<u64> {
        let Snapshot { mul, shift, .. } = self.snapshot()?;
        let hz = (1_000_000_000u128 << 32).checked_div(u128::from(mul))?;
        let hz = if shift < 0 { hz << shift.unsigned_abs() } else { hz >> shift.unsigned_abs() };
        u64::try_from(hz).ok()
    }

    /// Nanoseconds at this TSC value.
    #[must_use]
    pub fn ns(&self, tsc: u64) -> Option<u64> {
        let s = self.snapshot()?;
        let ticks = u128::from(tsc.saturating_sub(s.tsc));
        let ticks =
            if s.shift < 0 { ticks >> s.shift.unsigned_abs() } else { ticks << s.shift.unsigned_abs() };
        s.ns.checked_add(u64::try_from((ticks * u128::from(s.mul)) >> 32).ok()?)
    }

    /// Microseconds since 1970 at this TSC value, asked of the host anew.
    #[must_use]
    pub fn wall_us(&self, tsc: u64) -> Option<u64> {
        // SAFETY: the host writes 12 bytes there now, which are set aside for it.
        unsafe { cpu::write_msr(MSR_WALL_CLOCK_NEW, self.wall.at()) };
        let (seconds, nanoseconds): (u32, u32) = (self.wall.read(4), self.wall.read(8));
        let start = u64::from(seconds) * 1_000_000 + u64::from(nanoseconds) / 1000;
        Some(start + self.ns(tsc)? / 1000)
    }

    fn snapshot(&self) -> Option<Snapshot> {
        for _ in 0..READ_TRIES {
            let version: u32 = self.time.read(0);
            let [mul, rest] = [self.time.read(24), self.time.read(28)];
            let snapshot = Snapshot {
                tsc: self.time.read(8),
                ns: self.time.read(16),
                mul,
                shift: i8::from_le_bytes([rest & 0xff].map(|b: u32| u8::try_from(b).unwrap_or(0))),
            };
            if version.is_multiple_of(2) && version == self.time.read(0) {
                return (snapshot.mul != 0 && snapshot.shift.unsigned_abs() < 32).then_some(snapshot);
            }
        }
        None
    }
}
