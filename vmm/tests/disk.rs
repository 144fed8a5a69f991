//! Disks on real KVM, with the test guest: what it wrote is there, also after it was moved while it wrote. Skipped, loudly, where that is
//! not possible.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use common::have_kvm;
use common::host::{Parts, Vmm, memfd, spec};
use common::net::GUEST_IP4;
use common::session::{RAM, Session, migrate, with_guest_of};
use wire::ids::Digest;
use wire::space::DiskSize;
use wire::units::PageIndex;
use wire::vmm::{Code, Reply, Request};

const DISK: u64 = 32 << 20;
const BASE: Digest = Digest([3; 32]);

/// A machine with a disk over a base of all ones, and one over nothing.
fn parts() -> Parts {
    let base = memfd("base", 8 << 20);
    base.write_all_at(&[0xff; 8 << 20], 0).unwrap();
    Parts::new(spec(1, RAM)).with_disk("root", DISK, Some((base, BASE))).with_disk("data", 2 << 20, None)
}

fn number(reply: &str, field: &str) -> u64 {
    let rest = reply.split(&format!("\"{field}\":")).nth(1).unwrap_or_else(|| panic!("{field}: {reply}"));
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn verify(control: &mut Session, written: u64) {
    let reply = control.command("blk verify");
    assert_eq!((number(&reply, "wrong"), number(&reply, "errors")), (0, 0), "{reply}");
    assert!(number(&reply, "blocks") >= written, "{reply}");
}

/// Blocks that the first disk's overlay holds.
fn held(parts: &Parts) -> Vec<u64> {
    let mut bits = vec![0; usize::try_from(DISK / 4096 / 8).unwrap()];
    parts.disks[0].0.read_exact_at(&mut bits, wire::disk::HEADER_BYTES).unwrap();
    let bit = |block: &u64| bits[usize::try_from(block / 8).unwrap()] >> (block % 8) & 1 == 1;
    (0..DISK / 4096).filter(bit).collect()
}

#[test]
fn what_the_guest_wrote_is_there_in_another_process() {
    with_guest_of(parts, |parts, mut vmm| {
        let mut control = Session::open(GUEST_IP4, 9);
        let status = control.command("status");
        assert_eq!(number(&status, "blk_blocks"), DISK / 4096, "the first disk is the guest's: {status}");
        control.command("blk fill blocks=300");
        control.command("blk flush");
        verify(&mut control, 300);
        assert_eq!(held(&parts), (0..300).collect::<Vec<_>>());

        control.command("blk dirty rate=3000 ws=1000");
        vmm.pause(true);
        let state = vmm.save();
        let there = parts.again();
        let mut target = Vmm::start();
        assert_eq!(target.create(&there), Reply::Done);
        target.must(Request::Restore(state));
        drop(vmm);
        target.run(2);
        control.command("blk dirty rate=0");
        verify(&mut control, 300);
        drop(target);
    });
}

#[test]
fn blocks_that_are_written_while_the_log_is_on_are_dirty() {
    with_guest_of(parts, |parts, mut vmm| {
        let mut control = Session::open(GUEST_IP4, 9);
        let first_block = RAM / 4096;
        let blocks = |parts: &Parts| -> Vec<u64> {
            parts.take_bitmap().iter().filter_map(|page| page.checked_sub(first_block)).collect()
        };
        control.command("blk fill blocks=40");
        vmm.must(Request::DirtyLog { on: true });
        assert_eq!(vmm.ask(Request::DirtySync), Reply::Dirty { pages: RAM / 4096 + 40 });
        assert_eq!(blocks(&parts), (0..40).collect::<Vec<_>>(), "what the overlay holds");
        control.command("blk fill blocks=7");
        assert_eq!(blocks(&parts), (0..7).collect::<Vec<_>>(), "at once");
        let of_disk = Request::DirtyTake { first: PageIndex(first_block), count: DISK / 4096 };
        assert_eq!(vmm.ask(of_disk), Reply::Dirty { pages: 0 });
        let beyond = Request::DirtyTake { first: PageIndex(parts.spec.space().pages()), count: 64 };
        assert!(matches!(vmm.ask(beyond), Reply::Refused { code: Code::BadArgument, .. }));
        vmm.must(Request::DirtyLog { on: false });
        control.command("blk fill blocks=9");
        assert_eq!(blocks(&parts), [0u64; 0]);
    });
}

#[test]
fn a_migration_by_copying_loses_no_block() {
    with_guest_of(parts, |mut parts, mut vmm| {
        let mut control = Session::open(GUEST_IP4, 9);
        control.command("blk fill blocks=2000");
        control.command("blk dirty rate=5000");
        for epoch in 2..6 {
            (parts, vmm) = migrate(&parts, &mut vmm, epoch);
            control.command("ping");
        }
        control.command("blk dirty rate=0");
        let status = control.command("status");
        assert!(number(&status, "blk_written") > 2000, "{status}");
        verify(&mut control, 2000);
        drop((parts, vmm));
    });
}

#[test]
fn descriptors_of_disks_are_counted_and_come_back() {
    if !have_kvm() {
        return;
    }
    let refusal = |parts: &Parts| match Vmm::start().create(parts) {
        Reply::Refused { code, detail } => (code, detail),
        other => panic!("{other:?}"),
    };
    let mut few = parts();
    few.disks.pop();
    // One too few looks like none for the tap; two too few cannot be.
    few.disks[0].1 = None;
    let (code, detail) = refusal(&few);
    assert!(code == Code::BadArgument && detail.contains("3 for disks"), "{detail}");
    let mut many = parts();
    many.disks.extend(parts().disks);
    assert_eq!(refusal(&many).0, Code::BadArgument);
    let mut swapped = parts();
    swapped.disks.swap(0, 1);
    let (_, detail) = refusal(&swapped);
    assert!(detail.contains("root") || detail.contains("data"), "{detail}");
    let mut nine = Parts::new(spec(1, RAM));
    for index in 0..9 {
        nine = nine.with_disk(&format!("d{index}"), 2 << 20, None);
    }
    let (code, detail) = refusal(&nine);
    assert!(code == Code::BadArgument && detail.contains("at most 8"), "{detail}");

    let parts = parts();
    let mut vmm = Vmm::start();
    assert_eq!(vmm.create(&parts), Reply::Done);
    let (_, descriptors) = vmm.ask_with(Request::Describe, &[]);
    let inode = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).unwrap().st_ino;
    let got: Vec<_> = descriptors.iter().map(|fd| inode(fd)).collect();
    let memory = [&parts.ram, &parts.dirty, &parts.console];
    let want: Vec<_> = memory.into_iter().chain(parts.files()).map(|file| inode(file)).collect();
    assert_eq!(got, want);
}

#[test]
fn a_state_of_a_machine_with_other_disks_is_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let source = parts();
    let mut vmm = Vmm::running(&source, &common::elf::counter());
    vmm.pause(false);
    let state = vmm.save();
    let mut other = source.elsewhere();
    let size = DiskSize::from_bytes(2 * DISK).unwrap();
    other.spec.disks[0].size = size;
    let base = other.disks[0].1.take();
    other.disks[0] = (common::host::overlay_of(size, Some(BASE)), base);
    other.dirty = memfd("dirty", other.spec.space().pages() / 8);
    let mut target = Vmm::start();
    assert_eq!(target.create(&other), Reply::Done);
    match target.ask(Request::Restore(state)) {
        Reply::Refused { code: Code::BadState, detail } => {
            assert!(detail.contains("disks root (33554432 bytes), data"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
}
