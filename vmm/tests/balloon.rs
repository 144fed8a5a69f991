//! virtio-balloon, driven by hand: reported pages leave the host, statistics are read and asked for again. No KVM needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};

use common::driver::{Driver, NEEDS_RESET, NEXT, RAM, WRITE, rings};
use vmm::virtio::balloon::{Balloon, Gauge};

const STATS: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;
const AT: u64 = 0x80_0000;

fn balloon(features: u64) -> (Driver, Gauge) {
    let mut gauge = None;
    let driver = Driver::with_file(|ram, file| {
        let balloon = Balloon::new(file, ram).unwrap();
        gauge = Some(balloon.gauge());
        Box::new(balloon)
    });
    (driver.start_with(5, features), gauge.unwrap())
}

/// Blocks of the RAM memfd that the host holds, in pages.
fn resident(driver: &Driver) -> u64 {
    driver.ram_file.metadata().unwrap().blocks() * 512 / 4096
}

/// The specification's number of the queue, and those that older Linux counts.
#[test]
fn reported_pages_go_back_to_the_host_and_read_as_zero() {
    for (features, queue) in [(STATS | REPORTING, 4), (STATS | REPORTING, 3), (REPORTING, 2)] {
        let (mut driver, gauge) = balloon(features);
        driver.ram_file.write_all_at(&[0xaa; 64 << 12], AT).unwrap();
        driver.descriptor(queue, 0, (AT + 0x1000, 0x4000), WRITE | NEXT, 1);
        // Only whole pages can go.
        driver.descriptor(queue, 1, (AT + 0x10_800, 0x1800), WRITE, 0);
        driver.offer(queue, 0);
        driver.put(rings(queue) + 0x2000, [0; 4]);
        driver.dirty.set_active(true);
        let before = resident(&driver);
        assert!(driver.notify(queue), "one report at a time");
        assert!(!driver.notify(queue));
        assert_eq!(driver.used(queue), (1, 0, 0));
        assert_eq!(before - resident(&driver), 5, "queue {queue}");
        let mut page = [1; 4096];
        for (at, value) in [(0, 0xaa), (1, 0), (4, 0), (5, 0xaa), (0x10, 0xaa), (0x11, 0), (0x12, 0xaa)] {
            driver.ram_file.read_exact_at(&mut page, AT + at * 0x1000).unwrap();
            assert!(page.iter().all(|&byte| byte == value), "page {at}");
        }
        // The target of a migration has to see the zeros.
        let word = driver.dirty.word(usize::try_from(AT / 4096 / 64).unwrap());
        assert_eq!(word, 0b1_1110 | 1 << 0x11, "{word:#x}");
        assert_eq!(gauge.read().reported_bytes, 5 << 12);
    }
}

#[test]
fn statistics_are_read_and_asked_for_again() {
    let (mut driver, gauge) = balloon(STATS);
    assert_eq!(gauge.read().total_bytes, None);
    let put = |driver: &Driver, free: u64| {
        for (index, (tag, value)) in
            (0u64..).zip([(0u16, 1), (4, free), (5, 1 << 30), (99, 2), (6, 77), (7, 78)])
        {
            driver.put(AT + index * 10, tag.to_le_bytes());
            driver.put(AT + index * 10 + 2, value.to_le_bytes());
        }
        driver.descriptor(2, 0, (AT, 60), 0, 0);
    };
    put(&driver, 1000);
    driver.offer(2, 0);
    // Asked before there was anything: the driver gets its first buffer back as soon as the loop turns.
    driver.transport.host_event();
    assert_eq!(driver.used(2), (1, 0, 0));
    driver.offer(2, 0);
    driver.notify(2);
    assert_eq!(driver.used(2).0, 1, "the buffer stays until somebody asks");
    let report = gauge.read();
    assert_eq!((report.free_bytes, report.total_bytes), (Some(1000), Some(1 << 30)));
    assert_eq!((report.available_bytes, report.caches_bytes), (Some(77), Some(78)));
    // A restored device has the figures at once.
    let saved = driver.transport.save();
    driver.transport.restore(&saved).unwrap();
    assert_eq!(gauge.read().free_bytes, None);
    driver.notify(2);
    assert_eq!(gauge.read().free_bytes, Some(1000));
    driver.transport.host_event();
    assert_eq!(driver.used(2).0, 2);
    put(&driver, 900);
    driver.offer(2, 0);
    driver.notify(2);
    assert_eq!(gauge.read().free_bytes, Some(900));
}

#[test]
fn what_a_driver_inflates_by_itself_is_acknowledged() {
    let (mut driver, _gauge) = balloon(0);
    for queue in [0, 1] {
        driver.descriptor(queue, 0, (AT, 1024), 0, 0);
        driver.offer(queue, 0);
        driver.notify(queue);
        assert_eq!(driver.used(queue), (1, 0, 0));
    }
}

#[test]
fn reports_that_are_lies_hurt_nobody() {
    let (mut driver, gauge) = balloon(STATS | REPORTING);
    driver.ram_file.write_all_at(&[0xaa; 4096], RAM - 4096).unwrap();
    // Beyond RAM, around the end of the address space, across the end of RAM, nothing.
    let lies = [(RAM, 4096), (u64::MAX - 100, 4096), (RAM - 0x1800, 0x1_0000), (AT, 0)];
    for (index, lie) in (0..4).zip(lies) {
        driver.descriptor(3, index, lie, WRITE, 0);
        driver.offer(3, index);
        driver.notify(3);
    }
    assert_eq!(driver.used(3).0, 4);
    assert_eq!(driver.status(), 15);
    assert_eq!(gauge.read().reported_bytes, 4096, "the last page of RAM");
    // For the wrong direction.
    driver.descriptor(3, 0, (AT, 4096), 0, 0);
    driver.offer(3, 0);
    driver.notify(3);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
    // More statistics than anybody has.
    let (mut driver, _gauge) = balloon(STATS);
    driver.descriptor(2, 0, (AT, 65_536), 0, 0);
    driver.offer(2, 0);
    driver.notify(2);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
}
