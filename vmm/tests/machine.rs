//! A real VM in a real `mashine-vmm`: boot, pause, save, restore, end. Skipped, loudly, without `/dev/kvm`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::elf::{self, COUNTER};
use common::have_kvm;
use common::host::{Parts, Vmm, spec, wait_until};
use wire::ids::Epoch;
use wire::vmm::{Code, GuestEnd, Notice, Phase, Reply, Request};

const RAM: u64 = 64 << 20;

#[test]
fn a_kernel_boots_and_writes_to_the_console() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    wait_until("first serial byte", || parts.console_from(0) == b"M");
    wait_until("the guest counts", || parts.word(COUNTER) > 1000);
    vmm.must(Request::Quit);
    assert!(vmm.wait_for_exit().success());
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(1, RAM));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    wait_until("the guest counts", || parts.word(COUNTER) > 0);
    for _ in 0..50 {
        vmm.pause(false);
        let (one, _) = (parts.word(COUNTER), std::thread::sleep(std::time::Duration::from_millis(1)));
        assert_eq!(parts.word(COUNTER), one, "the guest ran while paused");
        vmm.run(1);
        wait_until("the guest goes on", || parts.word(COUNTER) > one);
    }
}

#[test]
fn a_saved_guest_goes_on_in_another_process() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(2, RAM));
    let mut source = Vmm::running(&parts, &elf::counter());
    wait_until("the guest counts", || parts.word(COUNTER) > 1000);
    source.pause(true);
    let state = source.save();
    let stopped_at = parts.word(COUNTER);

    let there = parts.again();
    let mut target = Vmm::start();
    assert_eq!(target.create(&there), Reply::Done);
    target.must(Request::Restore(state.clone()));
    assert_eq!(parts.word(COUNTER), stopped_at, "nothing runs before Run");
    target.run(2);
    wait_until("the guest goes on", || parts.word(COUNTER) > stopped_at + 1000);
    target.pause(false);
    // It goes on from the very instruction: the console shows no second boot, and the guest has checked its registers.
    assert_eq!(there.console_from(1), b"");
    let again = target.save();
    assert!(again.len().abs_diff(state.len()) < 512);
}

#[test]
fn guests_end_in_all_documented_ways() {
    if !have_kvm() {
        return;
    }
    let cases = [
        (elf::outb(0x501, 0x31), GuestEnd::PowerOff),
        (elf::outb(0x501, 0x32), GuestEnd::Panic),
        (elf::outb(0x64, 0xfe), GuestEnd::Reset),
    ];
    for (kernel, how) in cases {
        let parts = Parts::new(spec(1, RAM));
        let mut vmm = Vmm::running(&parts, &kernel);
        assert_eq!(vmm.notice(), Notice::GuestEnded(how.clone()));
        match vmm.ask(Request::Describe) {
            Reply::Description { phase: Phase::Ended, ended: Some(end), .. } => assert_eq!(end, how),
            other => panic!("{other:?}"),
        }
        let refused = vmm.ask(Request::Run { epoch: Epoch(2) });
        assert!(matches!(refused, Reply::Refused { code: Code::WrongPhase, .. }), "{refused:?}");
    }
}

#[test]
fn no_thread_holds_a_privilege() {
    if !have_kvm() {
        return;
    }
    let parts = Parts::new(spec(2, RAM));
    let vmm = Vmm::running(&parts, &elf::counter());
    let process = format!("/proc/{}", vmm.child.id());
    let mut threads = 0;
    for task in std::fs::read_dir(format!("{process}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().to_owned()
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        threads += 1;
    }
    // An event loop, two vCPUs, and what KVM itself adds.
    assert!(threads >= 3, "{threads} threads");
}
