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
