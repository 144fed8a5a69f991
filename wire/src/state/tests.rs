//! Round trips, refusals by name, and golden bytes of the container.

use super::*;

fn machine() -> MachineId {
    MachineId::from_u64(7)
}

fn shape() -> ShapeState {
    ShapeState {
        vcpus: 2,
        ram_bytes: 1 << 30,
        devices: vec!["net".to_owned(), "rng".to_owned()],
        tsc_khz: 2_000_000,
        console_offset: 99,
    }
}

fn clock() -> ClockState {
    ClockState { clock_ns: 5, realtime_ns: Some(6), host_tsc: None }
}

#[test]
fn components_come_back_as_they_were() {
    let mut archive = StateArchive::new(machine());
    archive.add(0, &shape()).unwrap();
    archive.add(0, &clock()).unwrap();
    let bytes = archive.encode().unwrap();
    let mut back = StateArchive::decode(&bytes).unwrap();
    assert_eq!(back.machine(), machine());
    assert_eq!(back.take::<ClockState>(0).unwrap(), clock());
    assert_eq!(back.take::<ShapeState>(0).unwrap(), shape());
    back.finish().unwrap();
}

#[test]
fn what_is_missing_or_left_over_is_named() {
    let mut archive = StateArchive::new(machine());
    archive.add(1, &clock()).unwrap();
    let error = archive.take::<ClockState>(0).unwrap_err().to_string();
    assert_eq!(error, "the state archive has no `clock` number 0");
    let error = archive.finish().unwrap_err().to_string();
    assert_eq!(error, "the state archive holds `clock` number 1, which this machine does not have");
}

#[test]
fn another_version_is_refused_by_name() {
    let mut archive = StateArchive::new(machine());
    archive.add(0, &clock()).unwrap();
    archive.components[0].version = 9;
    let error = archive.take::<ClockState>(0).unwrap_err().to_string();
    assert_eq!(error, "`clock` has version 9; this release reads version 1");

    let bytes = frame::encode(VERSION + 1, &StateArchive::new(machine()), 0).unwrap();
    assert!(matches!(StateArchive::decode(&bytes), Err(StateError::Container { got }) if got == VERSION + 1));
}

#[test]
fn too_many_components_are_refused() {
    let mut archive = StateArchive::new(machine());
    for index in 0..=u32::try_from(COMPONENTS_MAX).unwrap() {
        archive.add(index, &clock()).unwrap();
    }
    let bytes = archive.encode().unwrap();
    assert!(matches!(StateArchive::decode(&bytes), Err(StateError::TooMany(_))));
}

#[test]
fn damage_anywhere_is_an_error_and_never_a_panic() {
    let mut archive = StateArchive::new(machine());
    archive.add(0, &shape()).unwrap();
    let bytes = archive.encode().unwrap();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 0x40;
        // The version field is covered by the checksum as well, so every flipped bit is found.
        assert!(StateArchive::decode(&bad).is_err(), "flipped byte {at}");
        assert!(StateArchive::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn damaged_component_bytes_never_panic() {
    let mut archive = StateArchive::new(machine());
    archive.add(0, &shape()).unwrap();
    for at in 0..archive.components[0].bytes.len() {
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut bad = archive.clone();
            bad.components[0].bytes[at] = value;
            // A changed number is a valid archive still; a changed length or offset must be found. Neither may panic.
            let _ = bad.take::<ShapeState>(0);
        }
        let mut cut = archive.clone();
        cut.components[0].bytes.truncate(at);
        assert!(cut.take::<ShapeState>(0).is_err(), "cut at {at}");
    }
}

/// The bytes of an archive are a promise to other releases: when this test fails, raise a version instead of the bytes.
#[test]
fn golden_bytes() {
    let mut archive = StateArchive::new(machine());
    archive.add(0, &clock()).unwrap();
    let hex: String = archive.encode().unwrap().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = concat!(
    "4d5348460100070050000000000000007b8b831f00000000",
    "0500000000000000010000000000000006000000000000000000000000000000",
    "0000000000000000636c6f636bffffff0000000001000000c8ffffff28000000",
    "0700000000000000e0ffffff01000000",
);

fn sum<C: Component>(component: &C) -> (usize, u32) {
    let bytes = rkyv::to_bytes::<rancor::Error>(component).unwrap();
    (bytes.len(), crc32c::crc32c(&bytes))
}

fn virtio() -> VirtioState {
    let queue = QueueState {
        size: 256,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x3000,
        next_avail: 7,
        next_used: 8,
    };
    let transport = TransportState {
        status: 15,
        interrupt_status: 1,
        device_features_sel: 1,
        driver_features_sel: 1,
        driver_features: 1 << 32,
        queue_sel: 1,
        config_generation: 0,
        queues: vec![queue; 2],
    };
    VirtioState { transport, device_features: 1 << 32 | 1 << 5 }
}

/// The same promise for each component, with a byte or two where a machine has kilobytes.
#[test]
fn golden_components() {
    let vcpu = VcpuState {
        mp_state: 3,
        regs: vec![1],
        sregs: vec![2],
        xsave: vec![3],
        xcrs: vec![4],
        debugregs: vec![5],
        lapic: vec![6],
        events: vec![7],
        msrs: vec![MsrEntry { index: 0x10, value: 8 }],
        cpuid: vec![CpuidEntry { function: 1, index: 0, flags: 0, regs: [1, 2, 3, 4] }],
        tsc_khz: 2_000_000,
        tsc_offset: Some(9),
        nested: vec![],
    };
    let serial = SerialState {
        baud_divisor_low: 12,
        baud_divisor_high: 0,
        interrupt_enable: 1,
        interrupt_identification: 1,
        line_control: 3,
        line_status: 0x60,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 0,
        in_buffer: vec![1, 2],
        backlog: vec![3],
    };
    let irqchip = IrqchipState { pic_master: vec![1], pic_slave: vec![2], ioapic: vec![3] };
    let size = crate::space::DiskSize::from_bytes(4 << 20).unwrap();
    let disk = DiskShape { name: "root".to_owned(), size };
    let sums = [
        sum(&shape()),
        sum(&vcpu),
        sum(&irqchip),
        sum(&PitState { bytes: vec![1, 2, 3] }),
        sum(&clock()),
        sum(&serial),
        sum(&NetState { virtio: virtio(), mac: [2, 0, 0, 0, 0, 1] }),
        sum(&RngState { virtio: virtio() }),
        sum(&PlatformState { pending_events: 1, generation_id: [7; 16] }),
        sum(&BlkState { virtio: virtio() }),
        sum(&DisksState { disks: vec![disk] }),
    ];
    assert_eq!(sums, COMPONENTS);
}

const COMPONENTS: [(usize, u32); 11] = [
    (56, 0xf9fa_49b3),
    (160, 0x331b_8bde),
    (28, 0x9f1e_5092),
    (12, 0xa3b9_4125),
    (40, 0x5399_a9b5),
    (32, 0x6888_2029),
    (136, 0xf7db_8953),
    (128, 0xe3b7_5e21),
    (20, 0x9c03_9a5b),
    (128, 0xe3b7_5e21),
    (24, 0x9ec2_198a),
];
