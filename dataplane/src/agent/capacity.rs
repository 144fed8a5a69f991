//! What this host has: CPUs and their features, TSC frequency, and RAM as an account that cannot be overdrawn.

use std::collections::BTreeMap;
use std::fs;

use wire::fleet::Capacity;
use wire::ids::MachineId;
use wire::units::RamSize;
use wire::vmm::MachineSpec;

/// RAM left to the host itself when no limit is given, in bytes.
const HOST_RESERVE_BYTES: u64 = 1 << 30;
/// How far the TSC of two hosts may differ and still count as equal, in parts per million: what Linux's own calibration varies by.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a host cannot give to a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lacking {
    /// Not enough free RAM.
    #[error(
        "{need_mib} MiB of RAM needed, {free_mib} MiB free on this host: choose another one, or raise --ram-limit"
    )]
    Ram {
        /// Needed.
        need_mib: u64,
        /// Free.
        free_mib: u64,
    },
    /// CPU features.
    #[error("this host's CPU lacks {0}")]
    Features(String),
    /// Another TSC frequency.
    #[error(
        "the guest was told a TSC of {guest_khz} kHz, this host's has {host_khz} kHz and cannot be scaled"
    )]
    Tsc {
        /// The guest's.
        guest_khz: u32,
        /// The host's.
        host_khz: u32,
    },
}

/// The account.
#[derive(Debug)]
pub struct Ledger {
    ram_bytes: u64,
    cpus: u32,
    features: Vec<String>,
    tsc_khz: u32,
    held: BTreeMap<MachineId, (RamSize, u32)>,
}

impl Ledger {
    /// Reads what the machine has. `ram_limit`: bytes for machines, by default all but a GiB. `without`: CPU features to
    /// act as if this host lacked them.
    pub fn of_this_host(ram_limit: Option<u64>, without: &[String]) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = field(&meminfo, "MemTotal:").and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
        let mut features: Vec<String> = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
            .map(|(_, flags)| flags.split_ascii_whitespace().map(str::to_owned).collect())
            .unwrap_or_default();
        features.retain(|f| !without.contains(f));
        features.sort_unstable();
        let cpus =
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        Self {
            ram_bytes: ram_limit.unwrap_or_else(|| total.saturating_sub(HOST_RESERVE_BYTES)),
            cpus,
            features,
            tsc_khz: tsc_khz(&cpuinfo),
            held: BTreeMap::new(),
        }
    }

    /// Holds what `spec` needs, for that machine; holding it twice is holding it once.
    ///
    /// # Errors
    /// [`Lacking`], all features named at once; nothing is held then.
    pub fn hold(&mut self, spec: &MachineSpec) -> Result<(), Lacking> {
        self.fits_cpu(spec)?;
        let mine = self.held.get(&spec.id).map_or(0, |(ram, _)| ram.bytes());
        let free = self.free_bytes() + mine;
        if spec.ram.bytes() > free {
            return Err(Lacking::Ram { need_mib: spec.ram.bytes() >> 20, free_mib: free >> 20 });
        }
        self.held.insert(spec.id, (spec.ram, spec.vcpus));
        Ok(())
    }

    /// Gives it back.
    pub fn release(&mut self, machine: MachineId) {
        self.held.remove(&machine);
    }

    /// What to tell the control plane.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            ram_bytes: self.ram_bytes,
            ram_free_bytes: self.free_bytes(),
            cpus: self.cpus,
            vcpus_used: self.held.values().map(|(_, vcpus)| vcpus).sum(),
            cpu_features: self.features.clone(),
            tsc_khz: self.tsc_khz,
        }
    }

    fn free_bytes(&self) -> u64 {
        self.ram_bytes.saturating_sub(self.held.values().map(|(ram, _)| ram.bytes()).sum())
    }

    fn fits_cpu(&self, spec: &MachineSpec) -> Result<(), Lacking> {
        let missing: Vec<&str> =
            spec.cpu.features.iter().filter(|f| !self.features.contains(f)).map(String::as_str).collect();
        if !missing.is_empty() {
            return Err(Lacking::Features(missing.join(", ")));
        }
        let (guest, host) = (u64::from(spec.cpu.tsc_khz), u64::from(self.tsc_khz));
        if guest != 0 && host != 0 && guest.abs_diff(host) * 1_000_000 > host * TSC_TOLERANCE_PPM {
            return Err(Lacking::Tsc { guest_khz: spec.cpu.tsc_khz, host_khz: self.tsc_khz });
        }
        Ok(())
    }
}

/// The TSC's frequency as Linux shows it for a constant TSC; 0 if it does not.
fn tsc_khz(cpuinfo: &str) -> u32 {
    let mhz = cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(':'));
    let Some((_, mhz)) = mhz else { return 0 };
    let (whole, part) = mhz.trim().split_once('.').unwrap_or((mhz.trim(), "0"));
    let part = format!("{part:0<3}");
    let khz = whole.parse::<u32>().ok().zip(part.get(..3).and_then(|p| p.parse::<u32>().ok()));
    khz.and_then(|(mhz, khz)| mhz.checked_mul(1000)?.checked_add(khz)).unwrap_or(0)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::vmm::{BootSpec, CpuProfile, FileRef};

    fn spec(id: u64, mib: u64, features: &[&str], tsc_khz: u32) -> MachineSpec {
        MachineSpec {
            id: MachineId::from_u64(id),
            name: "m".parse().unwrap(),
            vcpus: 2,
            ram: RamSize::from_bytes(mib << 20).unwrap(),
            mac: [0; 6],
            ip4: [0; 4],
            ip6: [0; 16],
            boot: BootSpec {
                kernel: FileRef::Path(String::new()),
                initrd: None,
                cmdline: String::new(),
                guest_config: Vec::new(),
            },
            disks: Vec::new(),
            cpu: CpuProfile {
                name: "host".into(),
                features: features.iter().map(ToString::to_string).collect(),
                tsc_khz,
            },
        }
    }

    fn ledger() -> Ledger {
        Ledger {
            ram_bytes: 1 << 30,
            cpus: 2,
            features: vec!["avx".into(), "sse2".into()],
            tsc_khz: 2_000_000,
            held: BTreeMap::new(),
        }
    }

    #[test]
    fn ram_cannot_be_overdrawn_and_comes_back() {
        let mut ledger = ledger();
        ledger.hold(&spec(1, 600, &[], 0)).unwrap();
        ledger.hold(&spec(1, 600, &[], 0)).unwrap();
        assert_eq!(ledger.hold(&spec(2, 600, &[], 0)), Err(Lacking::Ram { need_mib: 600, free_mib: 424 }));
        assert_eq!(ledger.capacity().vcpus_used, 2);
        ledger.release(MachineId::from_u64(1));
        ledger.hold(&spec(2, 1024, &[], 0)).unwrap();
        assert_eq!(ledger.capacity().ram_free_bytes, 0);
    }

    #[test]
    fn missing_features_are_named_all_at_once() {
        let refused = ledger().hold(&spec(1, 16, &["amx", "avx", "zzz"], 0));
        assert_eq!(refused, Err(Lacking::Features("amx, zzz".into())));
    }

    #[test]
    fn tsc_must_match_within_the_tolerance() {
        assert!(ledger().hold(&spec(1, 16, &[], 2_000_400)).is_ok());
        assert!(matches!(ledger().hold(&spec(1, 16, &[], 2_100_000)), Err(Lacking::Tsc { .. })));
    }

    #[test]
    fn frequencies_are_read_to_the_kilohertz() {
        assert_eq!(tsc_khz("processor: 0\ncpu MHz\t\t: 2596.130\n"), 2_596_130);
        assert_eq!(tsc_khz("cpu MHz : 2000.5"), 2_000_500);
        assert_eq!(tsc_khz("nothing"), 0);
    }
}
