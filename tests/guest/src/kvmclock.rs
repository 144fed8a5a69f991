//! kvmclock: the frequency of the TSC as KVM gives it, and a second clock to hold against the TSC across migrations.
//!
//! The host fills in a structure of 32 bytes (version, pad, tsc_timestamp, system_time, mul, shift, flags) under a version that
//! is odd while it is being changed.

use crate::cpu;
use crate::memory::frames::Frames;
use crate::memory::physical;

/// The register that says where the structure is.
pub const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
/// Bounded, so that a host that dies half way does not stop the guest.
const READ_TRIES: u32 = 100;

/// The structure the host keeps.
pub struct KvmClock {
    at: u64,
    /// Where the host writes the wall clock when asked: version, seconds, nanoseconds.
    wall_at: u64,
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
        let at = frames.take::<u64>(4).as_ptr().expose_provenance() as u64;
        let wall_at = frames.take::<u64>(2).as_ptr().expose_provenance() as u64;
        // SAFETY: the host writes 32 bytes there, which are set aside for it and only read by `physical::read`.
        unsafe { cpu::write_msr(MSR_SYSTEM_TIME_NEW, at | 1) };
        Some(Self { at, wall_at })
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
        unsafe { cpu::write_msr(MSR_WALL_CLOCK_NEW, self.wall_at) };
        // SAFETY: what the host wrote.
        let seconds: u32 = unsafe { physical::read(self.wall_at + 4) };
        // SAFETY: likewise.
        let nanoseconds: u32 = unsafe { physical::read(self.wall_at + 8) };
        let start = u64::from(seconds) * 1_000_000 + u64::from(nanoseconds) / 1000;
        Some(start + self.ns(tsc)? / 1000)
    }

    fn snapshot(&self) -> Option<Snapshot> {
        for _ in 0..READ_TRIES {
            let version: u32 = self.read(0);
            let [mul, rest] = [self.read(24), self.read(28)];
            let snapshot = Snapshot {
                tsc: self.read(8),
                ns: self.read(16),
                mul,
                shift: i8::from_le_bytes([rest & 0xff].map(|b: u32| u8::try_from(b).unwrap_or(0))),
            };
            if version.is_multiple_of(2) && version == self.read(0) {
                return (snapshot.mul != 0 && snapshot.shift.unsigned_abs() < 32).then_some(snapshot);
            }
        }
        None
    }

    fn read<T: physical::Plain>(&self, offset: u64) -> T {
        // SAFETY: within the structure, aligned; it is only ever read here and written by the host.
        unsafe { physical::read(self.at + offset) }
    }
}
