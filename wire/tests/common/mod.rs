//! A machine to move, and the two configurations.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use wire::ids::{Epoch, MachineId, MigrationId};
use wire::migration::source::SourceConfig;
use wire::migration::target::TargetConfig;
use wire::units::RamSize;
use wire::vmm::{BootSpec, CpuProfile, FileRef, MachineSpec};

pub const MIGRATION: MigrationId = MigrationId::from_u64(0x1f);
pub const EPOCH: Epoch = Epoch(4);
pub const TO_EPOCH: Epoch = Epoch(5);

pub fn spec() -> MachineSpec {
    MachineSpec {
        id: MachineId::from_u64(0xbeef),
        name: "web-1".parse().unwrap(),
        vcpus: 2,
        ram: RamSize::from_bytes(64 << 20).unwrap(),
        mac: [2, 0, 0, 0, 0, 1],
        ip4: [198, 19, 0, 2],
        ip6: [0x20, 1, 0xd, 0xb8, 0x6d, 0x61, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        boot: BootSpec {
            kernel: FileRef::Path("guest.elf".into()),
            initrd: None,
            cmdline: "quiet".into(),
            guest_config: Vec::new(),
        },
        cpu: CpuProfile { name: "host".into(), features: vec!["sse2".into()], tsc_khz: 2_400_000 },
        disks: Vec::new(),
    }
}

pub fn source_config() -> SourceConfig {
    let hosts = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
    SourceConfig::new(MIGRATION, spec(), (EPOCH, TO_EPOCH), hosts, 4)
}

pub fn target_config() -> TargetConfig {
    TargetConfig::new(MIGRATION, spec(), TO_EPOCH, "host-a".parse().unwrap(), 2)
}
