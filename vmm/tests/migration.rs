//! What a migration needs of the VMM, on real KVM: the dirty log loses no page, a machine that was given away never runs, and the
//! control connection may come and go. Skipped, loudly, without `/dev/kvm`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::os::fd::AsFd;

use common::elf::{self, COUNTER, PAGES};
use common::have_kvm;
use common::host::{Parts, Vmm, spec, wait_until};
use wire::ids::{Epoch, MigrationId};
use wire::units::PageIndex;
use wire::vmm::{Code, Disowned, Phase, Reply, Request};

const RAM: u64 = 64 << 20;
const FIRST_PAGE: u64 = PAGES as u64 / 4096;

fn pages(reply: Reply) -> u64 {
    match reply {
        Reply::Dirty { pages } => pages,
        other => panic!("{other:?}"),
    }
}

fn code(reply: Reply) -> Code {
    match reply {
        Reply::Refused { code, .. } => code,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

/// A guest that writes the pages it is told to.
struct Poked {
    parts: Parts,
    vmm: Vmm,
    echoed: usize,
}

impl Poked {
    fn start() -> Self {
        let parts = Parts::new(spec(1, RAM));
        let vmm = Vmm::running(&parts, &elf::poke());
        wait_until("first serial byte", || parts.console_from(0) == b"M");
        Self { parts, vmm, echoed: 1 }
    }

    /// Makes the guest write these pages, and waits until it has.
    fn write(&mut self, pages: &[u8]) {
        self.vmm.must(Request::SerialInput(pages.to_vec()));
        self.echoed += pages.len();
        wait_until("the guest writes", || self.parts.console_from(0).len() == self.echoed);
    }

    fn sync(&mut self) -> u64 {
        pages(self.vmm.ask(Request::DirtySync))
    }

    fn take(&mut self, first: u64, count: u64) -> u64 {
        pages(self.vmm.ask(Request::DirtyTake { first: PageIndex(first), count }))
    }

    fn take_all(&mut self) -> u64 {
        self.take(0, RAM / 4096)
    }
}

#[test]
fn the_dirty_log_has_exactly_what_the_guest_wrote() {
    if !have_kvm() {
        return;
    }
    let mut guest = Poked::start();
    guest.vmm.must(Request::DirtyLog { on: true });
    assert_eq!(guest.sync(), RAM / 4096, "at first, all pages are dirty");
    assert_eq!(guest.take_all(), RAM / 4096);
    assert_eq!(guest.parts.take_bitmap().len() as u64, RAM / 4096);

    // Clean now, but for nothing the guest does by itself.
    assert_eq!(guest.sync(), 0);
    guest.write(&[3, 70, 200]);
    let written: Vec<u64> = [3, 70, 200].map(|page| FIRST_PAGE + page).to_vec();
    assert_eq!(guest.sync(), 3);
    assert_eq!(guest.parts.take_bitmap(), [0u64; 0], "a sync publishes nothing");

    // Taken chunk by chunk: only the chunk's pages are published.
    assert_eq!(guest.take(FIRST_PAGE, 64), 1);
    assert_eq!(guest.parts.take_bitmap(), written[..1]);
    assert_eq!(guest.take(FIRST_PAGE, 64), 0, "taken once");
    // Written again after it was taken: dirty again.
    guest.write(&[3]);
    assert_eq!(guest.take_all(), 2);
    assert_eq!(guest.parts.take_bitmap(), written[1..]);
    assert_eq!(guest.sync(), 1);
    assert_eq!(guest.take_all(), 1);
    assert_eq!(guest.parts.take_bitmap(), written[..1]);

    // Written between sync and take: not lost either.
    guest.write(&[9]);
    assert_eq!(guest.sync(), 1);
    guest.write(&[9, 10]);
    assert_eq!(guest.take_all(), 1);
    assert_eq!(guest.parts.take_bitmap(), [FIRST_PAGE + 9]);
    guest.sync();
    guest.take_all();
    let rest = guest.parts.take_bitmap();
    assert!(rest.contains(&(FIRST_PAGE + 10)), "{rest:?}");
}

#[test]
fn a_pause_publishes_all_that_is_left() {
    if !have_kvm() {
        return;
    }
    let mut guest = Poked::start();
    guest.vmm.must(Request::DirtyLog { on: true });
    guest.sync();
    guest.take_all();
    guest.parts.take_bitmap();
    guest.write(&[1]);
    guest.sync();
    guest.write(&[2]);
    match guest.vmm.pause(true) {
        Reply::Paused { dirty_pages: 2, .. } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.parts.take_bitmap(), [FIRST_PAGE + 1, FIRST_PAGE + 2]);

    // The attempt fails, the guest runs on here: whatever it writes from now on is found again.
    guest.vmm.run(1);
    guest.write(&[2, 5]);
    guest.sync();
    guest.take_all();
    let found = guest.parts.take_bitmap();
    assert!(found.contains(&(FIRST_PAGE + 2)) && found.contains(&(FIRST_PAGE + 5)), "{found:?}");

    // Off and on again: everything is dirty once more.
    guest.vmm.must(Request::DirtyLog { on: false });
    assert_eq!(code(guest.vmm.ask(Request::DirtySync)), Code::BadArgument);
    guest.vmm.must(Request::DirtyLog { on: true });
    assert_eq!(guest.sync(), RAM / 4096);
}

#[test]
fn wrong_ranges_are_refused() {
    if !have_kvm() {
        return;
    }
    let mut guest = Poked::start();
    let all = RAM / 4096;
    let ask = |guest: &mut Poked, first, count| {
        guest.vmm.ask(Request::DirtyTake { first: PageIndex(first), count })
    };
    assert_eq!(code(ask(&mut guest, 0, 64)), Code::BadArgument, "the log is off");
    guest.vmm.must(Request::DirtyLog { on: true });
    for (first, count) in
        [(1, 64), (0, 63), (0, all + 64), (all, 64), (u64::MAX - 63, 64), (64, u64::MAX), (0, u64::MAX)]
    {
        assert_eq!(code(ask(&mut guest, first, count)), Code::BadArgument, "{first}+{count}");
    }
    assert_eq!(pages(ask(&mut guest, all, 0)), 0);
}

#[test]
fn a_machine_that_was_given_away_never_runs() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    wait_until("the guest counts", || parts.word(COUNTER) > 0);
    vmm.pause(true);
    let record =
        Disowned { epoch: Epoch(2), migration: MigrationId::from_u64(9), target: "host-b".parse().unwrap() };
    vmm.must(Request::Disown(record.clone()));
    let stopped_at = parts.word(COUNTER);
    for epoch in [1, 2, 3] {
        assert_eq!(code(vmm.ask(Request::Run { epoch: Epoch(epoch) })), Code::Disowned);
    }
    // A restarted mashined finds the record.
    vmm.reconnect();
    vmm.must(Request::Disown(record.clone()));
    match vmm.ask(Request::Describe) {
        Reply::Description { phase: Phase::Disowned, epoch: Epoch(2), disowned, .. } => {
            assert_eq!(disowned, Some(record));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(code(vmm.ask(Request::Reclaim { epoch: Epoch(2) })), Code::StaleEpoch);
    assert_eq!(parts.word(COUNTER), stopped_at);
    vmm.must(Request::Reclaim { epoch: Epoch(3) });
    assert_eq!(code(vmm.ask(Request::Run { epoch: Epoch(2) })), Code::StaleEpoch);
    vmm.run(3);
    wait_until("the guest goes on", || parts.word(COUNTER) > stopped_at);
}

#[test]
fn the_guest_does_not_notice_what_happens_to_the_connection() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    wait_until("the guest counts", || parts.word(COUNTER) > 0);

    // Garbage, half a frame, too many descriptors: each costs the connection and nothing else.
    let hello = wire::frame::encode(
        wire::vmm::VERSION,
        &wire::vmm::ToVmm { seq: 1, request: Request::Hello { version: 1 } },
        0,
    )
    .unwrap();
    vmm.send_raw(&[0x5a; 64], &[]);
    assert!(vmm.receive().is_none());
    vmm.reconnect();
    vmm.send_raw(&hello[..20], &[]);
    vmm.reconnect();
    let many = vec![parts.ram.as_fd(); 22];
    vmm.send_raw(&hello, &many);
    assert!(vmm.receive().is_none());

    // Nothing is answered before Hello.
    let mut silent = std::os::unix::net::UnixStream::connect(&vmm.path).unwrap();
    std::mem::swap(&mut silent, &mut vmm.connection);
    drop(silent);
    assert_eq!(code(vmm.ask(Request::Describe)), Code::WrongPhase);

    // The descriptors come back, and are the same files.
    assert!(matches!(vmm.reconnect(), Reply::Hello { phase: Phase::Running, .. }));
    let (reply, descriptors) = vmm.ask_with(Request::Describe, &[]);
    match reply {
        Reply::Description { spec: Some(spec), phase: Phase::Running, dirty_log: false, .. } => {
            assert_eq!(spec, parts.spec);
        }
        other => panic!("{other:?}"),
    }
    let inode = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).unwrap().st_ino;
    let got: Vec<_> = descriptors.iter().map(|fd| inode(fd)).collect();
    assert_eq!(got, [inode(&parts.ram), inode(&parts.dirty), inode(&parts.console)]);

    // A second connection waits until the first has gone.
    let second = std::os::unix::net::UnixStream::connect(&vmm.path).unwrap();
    assert!(matches!(vmm.ask(Request::Describe), Reply::Description { .. }));
    vmm.connection = second;
    assert!(matches!(vmm.hello(), Reply::Hello { phase: Phase::Running, .. }));

    let before = parts.word(COUNTER);
    wait_until("the guest still counts", || parts.word(COUNTER) > before);
}

#[test]
fn requests_out_of_place_are_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let mut vmm = Vmm::start();
    for request in
        [Request::Run { epoch: Epoch(1) }, Request::Save, Request::DirtySync, Request::Restore(vec![])]
    {
        assert_eq!(code(vmm.ask(request)), Code::WrongPhase);
    }
    assert_eq!(code(vmm.ask(Request::Create(spec(1, RAM)))), Code::BadArgument, "no descriptors");
    let mut parts = Parts::new(spec(1, RAM));
    parts.spec.vcpus = 65;
    assert_eq!(code(vmm.create(&parts)), Code::BadArgument);
    parts.spec.vcpus = 1;
    parts.ram.set_len(RAM - 4096).unwrap();
    match vmm.create(&parts) {
        Reply::Refused { code: Code::Host, detail } => assert!(detail.contains("RAM memfd has"), "{detail}"),
        other => panic!("{other:?}"),
    }
    parts.ram.set_len(RAM).unwrap();
    assert_eq!(vmm.create(&parts), Reply::Done);
    for (file, says) in [
        (b"#!/bin/sh\nexit 0\n".to_vec(), "neither a Linux bzImage"),
        (vec![0; 4096], "neither a Linux bzImage"),
        (Vec::new(), "neither a Linux bzImage"),
        (std::fs::read("/proc/self/exe").unwrap(), ""),
    ] {
        match vmm.boot(&file, "") {
            Reply::Refused { code: Code::BadKernel, detail } => assert!(detail.contains(says), "{detail}"),
            other => panic!("{other:?}"),
        }
    }
    match vmm.boot(&elf::counter(), &"x".repeat(3000)) {
        Reply::Refused { code: Code::BadKernel, detail } => {
            assert!(detail.contains("command line"), "{detail}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(code(vmm.ask(Request::Restore(vec![1, 2, 3]))), Code::BadState);
    // After all of that, it still boots.
    assert_eq!(vmm.boot(&elf::counter(), ""), Reply::Done);
    vmm.run(1);
    wait_until("the guest counts", || parts.word(COUNTER) > 0);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut source = Vmm::running(&parts, &elf::counter());
    wait_until("the guest counts", || parts.word(COUNTER) > 0);
    source.pause(false);
    let state = source.save();
    let refusal = |other: Parts| {
        let mut target = Vmm::start();
        assert_eq!(target.create(&other), Reply::Done);
        match target.ask(Request::Restore(state.clone())) {
            Reply::Refused { code: Code::BadState, detail } => detail,
            other => panic!("{other:?}"),
        }
    };
    assert!(refusal(Parts::new(spec(2, RAM))).contains("vCPUs 1, this one has 2"));
    assert!(refusal(Parts::new(spec(1, 2 * RAM))).contains("bytes of RAM"));
    let mut other = spec(1, RAM);
    other.id = wire::ids::MachineId::from_u64(77);
    assert!(refusal(Parts::new(other)).contains("m-000000000000004d"));
}

#[test]
fn sigterm_ends_the_process() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    let pid = rustix::process::Pid::from_child(&vmm.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    vmm.wait_for_exit();
}
