//! The virtio transport and its devices, driven by hand: what the rules allow works, what they forbid stops the device by name
//! of `NEEDS_RESET`, and a reset brings it back. No KVM needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm::dirty::DirtyBitmap;
use vmm::memory::Ram;
use vmm::virtio::net::Net;
use vmm::virtio::rng::Rng;
use vmm::virtio::{Device, Resources, Transport, TransportError};
use wire::units::RamSize;

const RAM: u64 = 16 << 20;
const NEEDS_RESET: u32 = 64;
const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd.into()
}

/// A driver with a device of its own.
struct Driver {
    ram: Ram,
    dirty: Arc<DirtyBitmap>,
    transport: Transport,
    made_available: [u16; 2],
}

/// First page of a queue's rings: descriptors, available ring and used ring, a page each.
fn rings(queue: u16) -> u64 {
    0x1_0000 + u64::from(queue) * 0x1_0000
}

impl Driver {
    fn new(device: Box<dyn Device>) -> Self {
        let size = RamSize::from_bytes(RAM).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(&memfd(size.pages() / 8), size.pages()).unwrap());
        let ram = Ram::new(&memfd(RAM), size, &dirty).unwrap();
        let resources = Resources::new(device.queue_sizes().len()).unwrap();
        let transport = Transport::new(device, Arc::clone(ram.memory()), resources);
        Self { ram, dirty, transport, made_available: [0; 2] }
    }

    fn net() -> (Self, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Self::new(Box::new(Net::new(File::from(OwnedFd::from(ours)), [2, 0, 0, 0, 0, 9]))), theirs)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut raw = [0xff; 4];
        self.transport.read(offset, &mut raw);
        u32::from_le_bytes(raw)
    }

    fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    fn features(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        let [low, high] = [features & 0xffff_ffff, features >> 32].map(|half| u32::try_from(half).unwrap());
        for (sel, half) in [(0, low), (1, high)] {
            self.write(0x24, sel);
            self.write(0x20, half);
        }
        self.write(0x70, 11);
    }

    fn queue(&mut self, queue: u16, at: u64) {
        let at = u32::try_from(at).unwrap();
        let registers = [
            (0x30, queue.into()),
            (0x38, SIZE.into()),
            (0x80, at),
            (0x90, at.wrapping_add(0x1000)),
            (0xa0, at.wrapping_add(0x2000)),
            (0x44, 1),
        ];
        for (offset, value) in registers {
            self.write(offset, value);
        }
    }

    /// Sets everything up by the rules.
    fn start(mut self, queues: u16) -> Self {
        self.features(1 << 32);
        assert_eq!(self.status(), 11);
        for queue in 0..queues {
            self.queue(queue, rings(queue));
        }
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
        self
    }

    fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    fn descriptor(&self, queue: u16, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let at = rings(queue) + 16 * u64::from(index);
        self.put(at, buffer.0.to_le_bytes());
        self.put(at + 8, buffer.1.to_le_bytes());
        self.put(at + 12, flags.to_le_bytes());
        self.put(at + 14, next.to_le_bytes());
    }

    /// Makes the chain that begins at descriptor `head` available.
    fn offer(&mut self, queue: u16, head: u16) {
        let count = &mut self.made_available[usize::from(queue)];
        let at = rings(queue) + 0x1000 + 4 + 2 * u64::from(*count % SIZE);
        *count += 1;
        let count = *count;
        self.put(at, head.to_le_bytes());
        self.set_index(queue, count);
    }

    fn set_index(&self, queue: u16, index: u16) {
        self.put(rings(queue) + 0x1000 + 2, index.to_le_bytes());
    }

    fn notify(&mut self, queue: u16) -> bool {
        self.transport.queue_event(queue.into())
    }

    /// The used ring's index, and its last element: head and length.
    fn used(&self, queue: u16) -> (u16, u32, u32) {
        let at = rings(queue) + 0x2000;
        let memory = self.ram.memory();
        let index = u16::from_le(memory.read_obj(GuestAddress(at + 2)).unwrap());
        let last = at + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        let word = |at| u32::from_le(memory.read_obj(GuestAddress(at)).unwrap());
        (index, word(last), word(last + 4))
    }

    fn interrupts(&self) -> u64 {
        self.transport.resources().interrupt.read().unwrap_or(0)
    }
}

#[test]
fn what_a_driver_finds() {
    let (mut driver, _tap) = Driver::net();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 1);
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1, "VERSION_1");
    driver.write(0x14, 0);
    assert_eq!(driver.read(0x10), 1 << 5 | 1 << 16, "MAC and STATUS");
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
    for (features, accepted) in
        [(1 << 32, true), (1 << 32 | 1 << 5, true), (1 << 5, false), (1 << 32 | 1 << 1, false)]
    {
        let (mut driver, _tap) = Driver::net();
        driver.features(features);
        assert_eq!(driver.status() & 8 != 0, accepted, "{features:#x}");
    }
    // DRIVER_OK without FEATURES_OK.
    let (mut driver, _tap) = Driver::net();
    driver.write(0x70, 1);
    driver.write(0x70, 7);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn packets_go_both_ways() {
    let (driver, tap) = Driver::net();
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
    let (driver, tap) = Driver::net();
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
        let (driver, tap) = Driver::net();
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
        driver.made_available = [0; 2];
        let mut driver = driver.start(2);
        driver.offer(1, 0);
        driver.notify(1);
        assert_eq!(tap.recv(&mut [0; 100]).unwrap(), 64, "{name}");
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    for at in [RAM, RAM - 0x1000, 0xffff_f000, 0x1_0008] {
        let (mut driver, _tap) = Driver::net();
        driver.features(1 << 32);
        driver.queue(0, at);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{at:#x}");
        assert_eq!(driver.read(0x44), 0);
    }
    for size in [0, 3, 512, 0x1_0000, 0x1_0008] {
        let (mut driver, _tap) = Driver::net();
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
    let (driver, tap) = Driver::net();
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
    let (driver, _tap) = Driver::net();
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
