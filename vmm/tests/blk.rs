//! virtio-blk driven by hand over real files and a real ring: what is written is read back, wherever the driver cuts it; what is held, dirty or
//! refused; and that neither a pause nor a reset leaves anything under way. No KVM needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::driver::{Driver, NEEDS_RESET, NEXT, RAM, WRITE};
use common::host::{lay_out, memfd, overlay_of};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm::virtio::blk::{Blk, DiskError, Overlay};
use wire::disk::OverlayLayout;
use wire::ids::Digest;
use wire::space::DiskSize;
use wire::vmm::DiskSpec;

const DISK: u64 = 2 << 20;
const BLOCKS: u64 = DISK / 4096;
const FLUSH: u64 = 1 << 9;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Where requests have their header and status, and their data.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x10_0000;
const BASE: Digest = Digest([7; 32]);

fn spec(base: bool) -> DiskSpec {
    let size = DiskSize::from_bytes(DISK).unwrap();
    DiskSpec { name: "root".parse().unwrap(), size, base: base.then_some(BASE) }
}

/// A base of `bytes` whose byte `n` is made of `n`.
fn base_of(bytes: u64) -> File {
    let file = memfd("base", bytes);
    let content: Vec<u8> = (0..bytes).map(base_byte).collect();
    file.write_all_at(&content, 0).unwrap();
    file
}

fn base_byte(at: u64) -> u8 {
    u8::try_from((at / 512 * 31 + at % 7) % 251).unwrap() + 1
}

/// A disk and its driver.
struct Disk {
    driver: Driver,
    overlay: File,
    layout: OverlayLayout,
}

impl Disk {
    fn new(overlay: File, base: Option<File>) -> Self {
        let spec = spec(base.is_some());
        let layout = OverlayLayout::new(spec.size);
        let files = Overlay::open(&spec, overlay.try_clone().unwrap(), base).unwrap();
        let driver = Driver::with(BLOCKS, |memory, dirty| {
            Box::new(Blk::new("root", files, RAM / 4096, dirty.clone(), memory.clone()).unwrap())
        });
        Self { driver, overlay, layout }
    }

    fn started(base_bytes: Option<u64>) -> Self {
        let size = DiskSize::from_bytes(DISK).unwrap();
        let base = base_bytes.map(base_of);
        // On a file system, where writes are not done at once.
        let overlay = tempfile::tempfile().unwrap();
        lay_out(&overlay, size, base.is_some().then_some(BASE));
        Self::new(overlay, base).start()
    }

    fn start(mut self) -> Self {
        self.driver.features(1 << 32 | FLUSH);
        assert_eq!(self.driver.status(), 11);
        self.driver.queue(0, common::driver::rings(0));
        self.driver.write(0x70, 15);
        assert_eq!(self.driver.status(), 15);
        self
    }

    /// Makes a request available whose data lies at the given addresses.
    fn offer(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) {
        self.driver.put(HEADER, kind.to_le_bytes());
        self.driver.put(HEADER + 8, sector.to_le_bytes());
        self.driver.put(STATUS, [0xff]);
        self.driver.descriptor(0, 0, (HEADER, 16), NEXT, 1);
        let flags = if matches!(kind, IN | GET_ID) { WRITE | NEXT } else { NEXT };
        let mut next = 1;
        for &part in data {
            self.driver.descriptor(0, next, part, flags, next + 1);
            next += 1;
        }
        self.driver.descriptor(0, next, (STATUS, 1), WRITE, 0);
        self.driver.offer(0, 0);
    }

    /// Does a request and waits for its status, with the length the device gave.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        let before = self.driver.used(0).0;
        self.offer(kind, sector, data);
        self.driver.notify(0);
        while self.driver.used(0).0 == before {
            assert_eq!(self.driver.status(), 15);
            self.wait();
            self.driver.transport.host_event();
        }
        let (index, head, bytes) = self.driver.used(0);
        assert_eq!((index, head), (before.wrapping_add(1), 0));
        (self.driver.ram.memory().read_obj(GuestAddress(STATUS)).unwrap(), bytes)
    }

    /// Waits for the device's event.
    fn wait(&self) {
        let fd = self.driver.transport.host_fd().unwrap();
        let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)), Ok(1), "no event");
    }

    fn write(&mut self, sector: u64, content: &[u8]) -> u8 {
        self.driver.ram.memory().write_slice(content, GuestAddress(DATA)).unwrap();
        self.request(OUT, sector, &[(DATA, content.len().try_into().unwrap())]).0
    }

    fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        self.driver.ram.memory().write_slice(&vec![0xaa; bytes], GuestAddress(DATA)).unwrap();
        let length = u32::try_from(bytes).unwrap();
        assert_eq!(self.request(IN, sector, &[(DATA, length)]), (OK, length + 1));
        self.memory(DATA, bytes)
    }

    fn memory(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        self.driver.ram.memory().read_slice(&mut content, GuestAddress(at)).unwrap();
        content
    }

    fn zeroes(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.driver.put(DATA, sector.to_le_bytes());
        self.driver.put(DATA + 8, sectors.to_le_bytes());
        self.driver.put(DATA + 12, flags.to_le_bytes());
        self.request(kind, 0, &[(DATA, 16)]).0
    }

    /// Blocks that the overlay's file says it holds.
    fn held(&self) -> Vec<u64> {
        let mut bits = vec![0; usize::try_from(self.layout.bitmap_bytes()).unwrap()];
        self.overlay.read_exact_at(&mut bits, wire::disk::HEADER_BYTES).unwrap();
        let bit = |block: &u64| bits[usize::try_from(block / 8).unwrap()] >> (block % 8) & 1 == 1;
        (0..BLOCKS).filter(bit).collect()
    }

    /// Dirty blocks; they are clean afterwards.
    fn dirty(&self) -> Vec<u64> {
        let dirty = &self.driver.dirty;
        let word = |block: u64| usize::try_from((RAM / 4096 + block) / 64).unwrap();
        let blocks = (0..BLOCKS).filter(|&block| dirty.word(word(block)) >> (block % 64) & 1 == 1).collect();
        dirty.clear();
        blocks
    }
}

#[test]
fn what_a_driver_finds() {
    let mut disk = Disk::started(None);
    let mut config = [0xff; 60];
    disk.driver.transport.read(0x100, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), DISK / 512);
    assert_eq!((word(8), word(12), word(20)), (16 << 10, 254, 4096));
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 1, 8), "discard");
    assert_eq!((word(48), word(52), config[56]), (1 << 21, 1, 1), "zeroes");
    disk.driver.transport.read(0x100 + 59, &mut config);
    assert_eq!(config, [0; 60], "nothing beyond");

    assert_eq!(disk.request(GET_ID, 0, &[(DATA, 20)]), (OK, 21));
    assert_eq!(disk.memory(DATA, 20), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(disk.request(77, 0, &[(DATA, 512)]), (UNSUPP, 1));
    assert_eq!(disk.request(SYNC, 0, &[]), (OK, 1));
}

#[test]
fn blocks_come_from_the_overlay_or_the_base_or_are_zero() {
    // The base ends within a block.
    let mut disk = Disk::started(Some(40 * 4096 + 512));
    assert_eq!(disk.write(8 * 3, &[0x33; 4096]), OK);
    assert_eq!(disk.write(8 * 5, &[0x55; 8192]), OK);
    assert_eq!(disk.held(), [3, 5, 6]);
    let got = disk.read(0, 50 * 4096);
    for (at, byte) in (0u64..).zip(got) {
        let want = match at / 4096 {
            3 => 0x33,
            5 | 6 => 0x55,
            _ if at < 40 * 4096 + 512 => base_byte(at),
            _ => 0,
        };
        assert_eq!(byte, want, "byte {at}");
    }
}

#[test]
fn a_part_of_a_block_is_written_over_a_copy_of_the_rest() {
    let mut disk = Disk::started(Some(10 * 4096 + 1024));
    disk.driver.dirty.set_active(true);
    // Ends in the middle of two blocks, one of them past the base's end.
    assert_eq!(disk.write(8 * 8 + 3, &[0x77; 512 * 15]), OK);
    assert_eq!(disk.held(), [8, 9, 10]);
    assert_eq!(disk.dirty(), [8, 9, 10]);
    let (from, to) = (8 * 4096 + 3 * 512, 8 * 4096 + 18 * 512);
    for (at, byte) in (8 * 4096u64..).zip(disk.read(8 * 8, 3 * 4096)) {
        let want = match at {
            _ if (from..to).contains(&at) => 0x77,
            _ if at < 10 * 4096 + 1024 => base_byte(at),
            _ => 0,
        };
        assert_eq!(byte, want, "byte {at}");
    }
}

#[test]
fn blocks_are_marked_only_while_the_log_is_on_and_ram_that_was_read_into_too() {
    let mut disk = Disk::started(None);
    assert_eq!(disk.write(0, &[1; 4096]), OK);
    assert_eq!(disk.dirty(), [0u64; 0]);
    disk.driver.dirty.set_active(true);
    assert_eq!(disk.write(8 * 70, &[1; 3 * 4096]), OK);
    assert_eq!(disk.dirty(), [70, 71, 72]);
    disk.read(8 * 70, 8192);
    let page = usize::try_from(DATA / 4096).unwrap();
    assert_eq!(disk.driver.dirty.word(page / 64) >> (page % 64), 0b11);
    assert_eq!(disk.dirty(), [0u64; 0]);
}

#[test]
fn a_read_that_was_under_way_when_the_log_was_switched_on_is_marked() {
    let mut disk = Disk::started(None);
    let (page, mut seen) = (usize::try_from(DATA / 4096).unwrap(), false);
    for round in 0..100u64 {
        disk.driver.dirty.set_active(false);
        let block = round % BLOCKS;
        assert_eq!(disk.write(8 * block, &[1; 4096]), OK);
        assert_eq!(disk.request(SYNC, 0, &[]), (OK, 1));
        // Out of the page cache, so that the read takes a while.
        rustix::fs::fadvise(&disk.overlay, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let before = disk.driver.used(0).0;
        disk.offer(IN, 8 * block, &[(DATA, 4096)]);
        disk.driver.notify(0);
        disk.driver.dirty.clear();
        disk.driver.dirty.set_active(true);
        let under_way = disk.driver.used(0).0 == before;
        disk.driver.transport.quiesce();
        assert_eq!(disk.driver.used(0).0, before.wrapping_add(1));
        assert_eq!(disk.driver.dirty.word(page / 64) >> (page % 64) & 1 == 1, under_way);
        seen |= under_way;
    }
    if !seen {
        common::skip("every read was done at once here");
    }
}

/// A file on a file system of `kib` KiB, and the process that keeps that mounted; `None` where that is not allowed.
fn small_file(kib: u32) -> Option<(std::process::Child, File)> {
    use std::io::BufRead as _;
    let script = format!("mount -t tmpfs -o size={kib}k none /mnt && : > /mnt/disk && echo ok && read x");
    let mut child = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .ok()?;
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line != "ok\n" {
        child.wait().unwrap();
        return None;
    }
    let path = format!("/proc/{}/root/mnt/disk", child.id());
    Some((child, File::options().read(true).write(true).open(path).unwrap()))
}

#[test]
fn a_full_disk_is_an_error_for_the_request_and_nothing_else() {
    let Some((mut child, file)) = small_file(256) else {
        common::skip("mounting a small file system needs root");
        return;
    };
    let size = DiskSize::from_bytes(DISK).unwrap();
    lay_out(&file, size, Some(BASE));
    let mut disk = Disk::new(file, Some(base_of(DISK))).start();
    disk.driver.dirty.set_active(true);
    assert_eq!(disk.write(8 * 2, &[1; 4096]), OK);
    assert_eq!(disk.dirty(), [2]);
    assert_eq!(disk.write(0, &[2; 1 << 20]), IOERR);
    assert_eq!(disk.held(), [2], "what was not written whole is not held");
    assert_eq!(disk.dirty(), [2], "what was held may have changed");
    assert_eq!(disk.read(8 * 200, 4096), (200 * 4096..201 * 4096).map(base_byte).collect::<Vec<_>>());
    // What can be freed can be written again.
    assert_eq!(disk.zeroes(DISCARD, 0, 8 * 256, 0), OK);
    assert_eq!(disk.write(8 * 9, &[3; 4096]), OK);
    assert_eq!(disk.read(8 * 9, 4096), [3; 4096]);
    drop(disk);
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn zeroes_hide_the_base_and_discards_do_not() {
    let mut disk = Disk::started(Some(DISK));
    disk.driver.dirty.set_active(true);
    assert_eq!(disk.write(8, &[9; 3 * 4096]), OK);
    disk.dirty();
    assert_eq!(disk.zeroes(WRITE_ZEROES, 8 * 3, 16, 1), OK);
    assert_eq!(disk.held(), [1, 2, 3, 4]);
    assert_eq!(disk.dirty(), [3, 4]);
    assert_eq!(disk.read(8 * 3, 8192), vec![0; 8192]);
    assert_eq!(disk.zeroes(DISCARD, 0, 24, 0), OK);
    assert_eq!(disk.dirty(), [1, 2], "what is not held has not changed");
    assert_eq!(disk.held(), [1, 2, 3, 4]);
    assert_eq!(disk.read(8, 8192), vec![0; 8192]);
    assert_eq!(disk.read(0, 4096), (0..4096).map(base_byte).collect::<Vec<_>>());
    for (kind, sector, sectors, flags, status) in [
        (WRITE_ZEROES, 1, 8, 1, UNSUPP),
        (WRITE_ZEROES, 8, 7, 1, UNSUPP),
        (WRITE_ZEROES, 8, 8, 2, UNSUPP),
        (DISCARD, 8, 8, 1, UNSUPP),
        (DISCARD, DISK / 512, 8, 0, IOERR),
        (WRITE_ZEROES, u64::MAX - 7, 8, 1, IOERR),
        (WRITE_ZEROES, 0, u32::MAX - 7, 1, UNSUPP),
    ] {
        assert_eq!(disk.zeroes(kind, sector, sectors, flags), status, "{sector}+{sectors}, {flags}");
    }
}

#[test]
fn what_the_disk_does_not_have_is_an_error_and_nothing_else() {
    let mut disk = Disk::started(None);
    for (sector, bytes) in
        [(DISK / 512, 512), (DISK / 512 - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 100), (0, 4095)]
    {
        assert_eq!(disk.request(IN, sector, &[(DATA, bytes)]), (IOERR, 1), "{sector}+{bytes}");
        assert_eq!(disk.request(OUT, sector, &[(DATA, bytes)]), (IOERR, 1), "{sector}+{bytes}");
    }
    assert_eq!(disk.held(), [0u64; 0]);
    assert_eq!(disk.write(0, &[1; 512]), OK);
}

#[test]
fn chains_that_cannot_be_requests_stop_the_device() {
    type Crime = fn(&mut Disk);
    let crimes: [(&str, Crime); 6] = [
        ("no header", |d| d.driver.descriptor(0, 0, (STATUS, 1), WRITE, 0)),
        ("half a header", |d| {
            d.driver.descriptor(0, 0, (HEADER, 15), NEXT, 1);
            d.driver.descriptor(0, 1, (STATUS, 1), WRITE, 0);
        }),
        ("no status", |d| d.driver.descriptor(0, 0, (HEADER, 16), 0, 0)),
        ("a buffer beyond RAM", |d| {
            d.driver.descriptor(0, 0, (HEADER, 16), NEXT, 1);
            d.driver.descriptor(0, 1, (RAM - 512, 1024), WRITE, 0);
        }),
        ("more than a request may have", |d| {
            d.driver.descriptor(0, 0, (HEADER, 16), NEXT, 1);
            d.driver.descriptor(0, 1, (DATA, 5 << 20), WRITE, 0);
        }),
        ("what is read after what is written", |d| {
            d.driver.descriptor(0, 0, (STATUS, 1), WRITE | NEXT, 1);
            d.driver.descriptor(0, 1, (HEADER, 16), 0, 0);
        }),
    ];
    for (name, crime) in crimes {
        let mut disk = Disk::started(None);
        disk.driver.put(HEADER, [0; 16]);
        crime(&mut disk);
        disk.driver.offer(0, 0);
        disk.driver.notify(0);
        assert_eq!(disk.driver.status(), 15 | NEEDS_RESET, "{name}");
        assert_eq!(disk.driver.used(0).0, 0, "{name}");
        disk.driver.set_index(0, 0);
        disk.driver.made_available = [0; 5];
        let mut disk = disk.start();
        assert_eq!(disk.request(SYNC, 0, &[]), (OK, 1), "{name}");
    }
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let mut disk = Disk::started(Some(DISK));
    // Header in two parts with data at its end; data and status in one.
    disk.driver.put(HEADER, OUT.to_le_bytes());
    disk.driver.put(HEADER + 8, 8u64.to_le_bytes());
    disk.driver.ram.memory().write_slice(&[0x5c; 4096], GuestAddress(HEADER + 16)).unwrap();
    disk.driver.descriptor(0, 0, (HEADER, 5), NEXT, 1);
    disk.driver.descriptor(0, 1, (HEADER + 5, 11 + 100), NEXT, 2);
    disk.driver.descriptor(0, 2, (HEADER + 116, 3996), NEXT, 3);
    disk.driver.descriptor(0, 3, (0xb000, 1), WRITE, 0);
    disk.driver.offer(0, 0);
    disk.driver.notify(0);
    disk.driver.transport.quiesce();
    assert_eq!(disk.driver.used(0).0, 1);
    assert_eq!(disk.read(8, 4096), [0x5c; 4096]);

    disk.driver.put(HEADER, IN.to_le_bytes());
    disk.driver.descriptor(0, 0, (HEADER, 16), NEXT, 1);
    disk.driver.descriptor(0, 1, (DATA + 1, 4096 + 1), WRITE, 0);
    disk.driver.put(DATA + 4097, [0xff]);
    disk.driver.offer(0, 0);
    disk.driver.notify(0);
    disk.driver.transport.quiesce();
    assert_eq!(disk.driver.used(0), (3, 0, 4097));
    assert_eq!(disk.memory(DATA + 1, 4096), [0x5c; 4096]);
    assert_eq!(disk.memory(DATA + 4097, 1), [OK]);
}

#[test]
fn neither_a_pause_nor_a_reset_leaves_anything_under_way() {
    let mut disk = Disk::started(Some(DISK));
    disk.driver.dirty.set_active(true);
    disk.driver.ram.memory().write_slice(&[0x21; 1 << 20], GuestAddress(DATA)).unwrap();
    disk.offer(OUT, 0, &[(DATA, 1 << 20)]);
    disk.driver.notify(0);
    disk.driver.transport.quiesce();
    assert_eq!(disk.driver.used(0).0, 1);
    assert_eq!(disk.driver.interrupts(), 1);
    assert_eq!(disk.dirty().len(), 256);
    let saved = disk.driver.transport.save();
    assert_eq!((saved.transport.queues[0].next_avail, saved.transport.queues[0].next_used), (1, 1));

    // A reset tells nobody, but what has changed is marked.
    disk.offer(OUT, 8, &[(DATA, 1 << 20)]);
    disk.driver.notify(0);
    disk.driver.write(0x70, 0);
    assert_eq!(disk.dirty().last(), Some(&256));
    assert_eq!(disk.held().len(), 257);
}

#[test]
fn a_driver_that_does_not_flush_has_its_writes_synced() {
    let mut disk = Disk::started(None);
    disk.driver.write(0x70, 0);
    disk.driver.made_available = [0; 5];
    disk.driver.set_index(0, 0);
    disk.driver.put(common::driver::rings(0) + 0x2000, [0; 4]);
    let mut disk = Disk { driver: disk.driver.start(1), ..disk };
    assert_eq!(disk.write(0, &[4; 4096]), OK);
    assert_eq!(disk.held(), [0]);
    assert_eq!(disk.read(0, 4096), [4; 4096]);
}

#[test]
fn files_that_are_not_the_disks_are_refused_by_name() {
    let size = DiskSize::from_bytes(DISK).unwrap();
    let open = |spec: &DiskSpec, overlay: File| Overlay::open(spec, overlay, None).unwrap_err();
    let cut = overlay_of(size, None);
    cut.set_len(OverlayLayout::new(size).file_bytes() - 1).unwrap();
    assert!(matches!(open(&spec(false), cut), DiskError::Short { .. }));
    assert!(matches!(open(&spec(true), overlay_of(size, None)), DiskError::Overlay { .. }));
    assert!(matches!(open(&spec(false), memfd("zeroes", DISK * 2)), DiskError::Overlay { .. }));
    assert!(matches!(open(&spec(false), memfd("nothing", 0)), DiskError::Io { .. }));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Read(u64, u64),
    Zeroes(bool, u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let extent = || (0..400u64, 1..200u64);
    let step = prop_oneof![
        (extent(), 1..255u8).prop_map(|((at, count), byte)| Step::Write(at, count, byte)),
        extent().prop_map(|(at, count)| Step::Read(at, count)),
        (any::<bool>(), 0..50u64, 1..20u64).prop_map(|(hide, at, count)| Step::Zeroes(hide, at, count)),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Against a plain array of bytes.
    #[test]
    fn a_disk_is_an_array_of_bytes(base in proptest::option::of(1..700u64), steps in steps()) {
        let base_bytes = base.map(|sectors| sectors * 512 + 100);
        let mut disk = Disk::started(base_bytes);
        disk.driver.dirty.set_active(true);
        let mut model: Vec<u8> = (0..DISK)
            .map(|at| if base_bytes.is_some_and(|bytes| at < bytes) { base_byte(at) } else { 0 })
            .collect();
        let mut before = model.clone();
        for step in steps {
            match step {
                Step::Write(at, count, byte) => {
                    let bytes = usize::try_from(count * 512).unwrap();
                    prop_assert_eq!(disk.write(at, &vec![byte; bytes]), OK);
                    model[usize::try_from(at * 512).unwrap()..][..bytes].fill(byte);
                }
                Step::Read(at, count) => {
                    let bytes = usize::try_from(count * 512).unwrap();
                    let got = disk.read(at, bytes);
                    prop_assert!(got == model[usize::try_from(at * 512).unwrap()..][..bytes]);
                }
                Step::Zeroes(true, at, count) => {
                    prop_assert_eq!(disk.zeroes(WRITE_ZEROES, at * 8, u32::try_from(count * 8).unwrap(), 1), OK);
                    model[usize::try_from(at * 4096).unwrap()..][..usize::try_from(count * 4096).unwrap()].fill(0);
                }
                Step::Zeroes(false, at, count) => {
                    prop_assert_eq!(disk.zeroes(DISCARD, at * 8, u32::try_from(count * 8).unwrap(), 0), OK);
                    let held = disk.held();
                    for block in (at..at + count).filter(|block| held.contains(block)) {
                        model[usize::try_from(block * 4096).unwrap()..][..4096].fill(0);
                    }
                }
            }
            // Every block that is another one now has been marked.
            let dirty = disk.dirty();
            for block in 0..BLOCKS {
                let at = usize::try_from(block * 4096).unwrap();
                if model[at..at + 4096] != before[at..at + 4096] {
                    prop_assert!(dirty.contains(&block), "block {} changed and is not marked", block);
                }
            }
            before.clone_from(&model);
        }
        let got = disk.read(0, usize::try_from(DISK).unwrap());
        prop_assert!(got == model);
    }
}
