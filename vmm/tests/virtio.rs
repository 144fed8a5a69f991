//! The virtio transport and its devices, driven by hand: what the rules allow works, what they forbid stops the device by name
//! of `NEEDS_RESET`, and a reset brings it back. No KVM needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use common::driver::{Driver, INDIRECT, NEEDS_RESET, NEXT, RAM, SIZE, WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm::virtio::net::Net;
use vmm::virtio::rng::Rng;
use vmm::virtio::{Resources, Transport, TransportError};

/// A driver of a network interface, and the other end of its tap.
fn net() -> (Driver, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Driver::new(Box::new(Net::new(File::from(OwnedFd::from(ours)), [2, 0, 0, 0, 0, 9]))), theirs)
}

#[test]
fn what_a_driver_finds() {
    let (mut driver, _tap) = net();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 1);
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1, "VERSION_1");
    driver.write(0x14, 0);
    assert_eq!(driver.read(0x10), 0x1_bba3, "MAC, STATUS and offloads");
    let mut mac = [0; 6];
    driver.transport.read(0x100, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 256);
    driver.write(0x30, 2);
    assert_eq!(driver.read(0x34), 0, "there is no third queue");
    let mut odd = [0xff; 2];
    driver.transport.read(0x70, &mut odd);
    assert_eq!(odd, [0xff; 2], "registers are 32 bits wide");
}

#[test]
fn features_are_negotiated_and_not_just_taken() {
    for (features, accepted) in [
        (1 << 32, true),
        (1 << 32 | 1 << 5, true),
        (1 << 5, false),
        (1 << 32 | 1 << 1, true),
        (1 << 32 | 1 << 10, false),
    ] {
        let (mut driver, _tap) = net();
        driver.features(features);
        assert_eq!(driver.status() & 8 != 0, accepted, "{features:#x}");
    }
    // DRIVER_OK without FEATURES_OK.
    let (mut driver, _tap) = net();
    driver.write(0x70, 1);
    driver.write(0x70, 7);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn packets_go_both_ways() {
    let (driver, tap) = net();
    let mut driver = driver.start(2);
    // Two descriptors: header and frame.
    driver.descriptor(1, 0, (0x8000, 12), NEXT, 1);
    driver.descriptor(1, 1, (0x8800, 60), 0, 0);
    driver.put(0x8000, [0xff; 12]);
    driver.put(0x8800, [0x42; 60]);
    driver.offer(1, 0);
    assert!(!driver.notify(1));
    let mut packet = [0; 100];
    assert_eq!(tap.recv(&mut packet).unwrap(), 72);
    assert_eq!(packet[..12], [0; 12], "the guest's header does not reach the tap");
    assert_eq!(packet[12..72], [0x42; 60]);
    assert_eq!(driver.used(1), (1, 0, 0));
    assert_eq!(driver.interrupts(), 1, "one interrupt for the packet");

    // Nothing is read from the tap before there is a buffer for it.
    let mut frame = vec![0xee; 12];
    frame.extend_from_slice(&[0x17; 100]);
    tap.send(&frame).unwrap();
    driver.transport.host_event();
    assert!(!driver.transport.wants_host_event(), "no buffer: the tap is not listened to");
    driver.dirty.set_active(true);
    driver.descriptor(0, 3, (0x9ff0, 2048), WRITE, 0);
    driver.offer(0, 3);
    driver.notify(0);
    assert_eq!(driver.used(0), (1, 3, 112));
    let mut got = [0; 112];
    driver.ram.memory().read_slice(&mut got, GuestAddress(0x9ff0)).unwrap();
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(got[12..], [0x17; 100]);
    // Both pages of the buffer and the used ring are dirty, and nothing else.
    let dirty = driver.dirty.word(0);
    assert_eq!(dirty, 1 << 9 | 1 << 10 | 1 << 0x10 | 1 << 0x11 | 1 << 0x12, "{dirty:#x}");
}

#[test]
fn a_packet_larger_than_its_buffer_is_dropped_and_the_next_one_arrives() {
    let (driver, tap) = net();
    let mut driver = driver.start(2);
    driver.descriptor(0, 0, (0x8000, 64), WRITE, 0);
    driver.descriptor(0, 1, (0x9000, 2048), WRITE, 0);
    driver.offer(0, 0);
    driver.offer(0, 1);
    tap.send(&[1; 200]).unwrap();
    tap.send(&[2; 200]).unwrap();
    driver.notify(0);
    assert_eq!(driver.used(0), (2, 1, 200));
    assert_eq!(driver.status(), 15);
}

/// Several small buffers make up a large packet, and the driver sees all of them at once.
#[test]
fn large_packets_are_spread_over_merged_buffers() {
    const GUEST_CSUM: u64 = 1 << 1;
    const GUEST_TSO4: u64 = 1 << 7;
    const MRG_RXBUF: u64 = 1 << 15;
    let (driver, tap) = net();
    let mut driver = driver.start_with(2, GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF);
    let header = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
    let mut frame = header.to_vec();
    frame.extend((0..9000u32).map(|at| u8::try_from(at % 251).unwrap()));
    // Not enough room for any packet: nothing is read, until the driver says that this is all there is.
    for index in 0..3 {
        driver.descriptor(0, index, (0x20_0000 + u64::from(index) * 0x1_0000, 4096), WRITE, 0);
        driver.offer(0, index);
    }
    tap.send(&frame).unwrap();
    driver.transport.host_event();
    assert_eq!(driver.used(0).0, 0);
    assert!(!driver.transport.wants_host_event());
    driver.notify(0);
    assert_eq!(driver.used(0), (3, 2, 9012 - 2 * 4096));
    let mut got = vec![0; 9012];
    for (at, part) in (0u64..).zip(got.chunks_mut(4096)) {
        driver.ram.memory().read_slice(part, GuestAddress(0x20_0000 + at * 0x1_0000)).unwrap();
    }
    assert_eq!(got[..12], [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 3, 0], "three buffers");
    assert_eq!(got[12..], frame[12..]);
    // A packet that no buffers hold is lost, and the buffers serve the next one.
    driver.offer(0, 1);
    tap.send(&frame).unwrap();
    tap.send(&frame[..100]).unwrap();
    driver.notify(0);
    assert_eq!(driver.used(0), (4, 1, 100));
    // With room for the largest, the tap is read as packets come.
    driver.descriptor(0, 0, (0x30_0000, 70_000), WRITE, 0);
    driver.offer(0, 0);
    driver.notify(0);
    tap.send(&frame).unwrap();
    driver.transport.host_event();
    assert_eq!(driver.used(0), (5, 0, 9012));
    assert_eq!(driver.status(), 15);
}

#[test]
fn entropy_fills_the_buffer() {
    let mut driver = Driver::new(Box::new(Rng)).start(1);
    driver.descriptor(0, 0, (0x8000, 64), WRITE, 0);
    driver.offer(0, 0);
    driver.notify(0);
    assert_eq!(driver.used(0), (1, 0, 64));
    let mut got = [0; 64];
    driver.ram.memory().read_slice(&mut got, GuestAddress(0x8000)).unwrap();
    assert!(got.iter().filter(|&&byte| byte == 0).count() < 16, "{got:?}");
}

/// Each way to break the rules stops the device; a reset and a new start bring it back.
#[test]
fn broken_rules_stop_the_device() {
    type Crime = fn(&mut Driver);
    let crimes: [(&str, Crime); 8] = [
        ("more entries than the ring has", |d| d.set_index(1, SIZE + 1)),
        ("a head beyond the table", |d| d.offer(1, SIZE)),
        ("a buffer beyond RAM", |d| {
            d.descriptor(1, 0, (RAM - 8, 64), 0, 0);
            d.offer(1, 0);
        }),
        ("a buffer at the end of the address space", |d| {
            d.descriptor(1, 0, (u64::MAX - 3, 64), 0, 0);
            d.offer(1, 0);
        }),
        ("a buffer to write where one to read belongs", |d| {
            d.descriptor(1, 0, (0x8000, 64), WRITE, 0);
            d.offer(1, 0);
        }),
        ("a chain longer than any packet", |d| {
            d.descriptor(1, 0, (0x8000, u32::MAX), 0, 0);
            d.offer(1, 0);
        }),
        ("a loop of descriptors", |d| {
            d.descriptor(1, 0, (0x8000, 65_000), NEXT, 1);
            d.descriptor(1, 1, (0x8000, 65_000), NEXT, 0);
            d.offer(1, 0);
        }),
        ("an indirect table with a loop of nothing", |d| {
            for index in 0..4096u64 {
                let (next, at) = (u16::try_from((index + 1) % 4096).unwrap(), 0x10_0000 + 16 * index);
                d.put(at, 0x8000u64.to_le_bytes());
                d.put(at + 8, 0u32.to_le_bytes());
                d.put(at + 12, NEXT.to_le_bytes());
                d.put(at + 14, next.to_le_bytes());
            }
            d.descriptor(1, 0, (0x10_0000, 4096 * 16), INDIRECT, 0);
            d.offer(1, 0);
        }),
    ];
    for (name, crime) in crimes {
        let (driver, tap) = net();
        let mut driver = driver.start(2);
        driver.interrupts();
        crime(&mut driver);
        assert!(!driver.notify(1), "{name}");
        assert_eq!(driver.status(), 15 | NEEDS_RESET, "{name}");
        assert_eq!(driver.read(0x60), 2, "{name}: a configuration interrupt says so");
        assert_eq!(driver.interrupts(), 1, "{name}");
        assert_eq!(driver.used(1).0, 0, "{name}");
        assert!(!driver.transport.wants_host_event(), "{name}");
        // Nothing happens any more.
        driver.descriptor(1, 0, (0x8000, 64), 0, 0);
        driver.set_index(1, 1);
        driver.notify(1);
        assert!(tap.recv(&mut [0; 16]).is_err(), "{name}");

        driver.set_index(1, 0);
        driver.made_available = [0; 5];
        let mut driver = driver.start(2);
        driver.offer(1, 0);
        driver.notify(1);
        assert_eq!(tap.recv(&mut [0; 100]).unwrap(), 64, "{name}");
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    for at in [RAM, RAM - 0x1000, 0xffff_f000, 0x1_0008] {
        let (mut driver, _tap) = net();
        driver.features(1 << 32);
        driver.queue(0, at);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{at:#x}");
        assert_eq!(driver.read(0x44), 0);
    }
    for size in [0, 3, 512, 0x1_0000, 0x1_0008] {
        let (mut driver, _tap) = net();
        driver.features(1 << 32);
        for (offset, value) in
            [(0x30, 0), (0x38, size), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1)]
        {
            driver.write(offset, value);
        }
        assert_eq!(driver.read(0x44), 0, "size {size}");
    }
}

#[test]
fn the_state_moves_to_another_transport() {
    let (driver, tap) = net();
    let mut driver = driver.start(2);
    driver.descriptor(1, 0, (0x8000, 64), 0, 0);
    driver.offer(1, 0);
    driver.notify(1);
    let saved = driver.transport.save();
    // Written by the driver after the source stopped looking; its notification was lost with the source.
    driver.offer(1, 0);
    let _drained = tap.recv(&mut [0; 100]).unwrap();

    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let net = Net::new(File::from(OwnedFd::from(ours)), [2, 0, 0, 0, 0, 9]);
    let resources = Resources::new(2).unwrap();
    let mut target = Transport::new(Box::new(net), Arc::clone(driver.ram.memory()), resources);
    target.restore(&saved).unwrap();
    assert_eq!(target.save(), saved);
    target.resume();
    assert_eq!(
        target.resources().interrupt.read().unwrap(),
        1,
        "an interrupt not yet acknowledged comes again"
    );
    assert_eq!(target.resources().notify[1].read().unwrap(), 1, "queues are looked at once");
    target.queue_event(1);
    assert_eq!(theirs.recv(&mut [0; 100]).unwrap(), 64);
    assert_eq!(driver.used(1), (2, 0, 0));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let (driver, _tap) = net();
    let mut driver = driver.start(2);
    let saved = driver.transport.save();

    let mut bad = saved.clone();
    bad.transport.driver_features |= 1 << 50;
    assert!(
        matches!(driver.transport.restore(&bad), Err(TransportError::Features { missing, .. }) if missing == 1 << 50)
    );
    let mut bad = saved.clone();
    bad.transport.queues.pop();
    assert!(matches!(driver.transport.restore(&bad), Err(TransportError::Queues { have: 1, want: 2, .. })));
    let mut bad = saved.clone();
    bad.transport.queues[1].used_ring = RAM;
    assert!(matches!(driver.transport.restore(&bad), Err(TransportError::Queue { index: 1, .. })));
    assert_eq!(driver.status(), 0, "a failed restore leaves a reset device");
    driver.transport.restore(&saved).unwrap();
}
