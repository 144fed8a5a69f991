//! Unmodified Linux in a real `mashine-vmm`. Skipped, loudly, where KVM cannot run it or there is no kernel to run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::{SystemTime, UNIX_EPOCH};

use common::host::{Parts, spec};
use common::initramfs;
use common::linux::Linux;
use wire::cpu::Profile;
use wire::vmm::{GuestEnd, Request};

const RAM: u64 = 256 << 20;

#[test]
fn linux_reaches_user_space_on_every_vcpu_and_powers_off() {
    let Some(kernel) = initramfs::runnable() else { return };
    for vcpus in [1, 2, 4] {
        let mut linux = Linux::boot(&kernel, vcpus, RAM, "");
        if std::env::var_os("MASHINE_VERBOSE").is_some() {
            eprintln!("{}", linux.sh("dmesg; cat /proc/interrupts; cat /proc/cpuinfo"));
        }
        assert_eq!(linux.sh("nproc"), vcpus.to_string());
        assert_eq!(linux.bad_lines(), Vec::<String>::new());
        linux.type_line("poweroff -f");
        assert_eq!(linux.ended(), GuestEnd::PowerOff);
    }
}

#[test]
fn reboot_and_panic_are_told_apart() {
    let Some(kernel) = initramfs::runnable() else { return };
    for (command, end) in [("reboot -f", GuestEnd::Reset), ("echo c > /proc/sysrq-trigger", GuestEnd::Panic)]
    {
        let mut linux = Linux::boot(&kernel, 2, RAM, "");
        linux.type_line("echo 8 > /proc/sys/kernel/printk");
        linux.type_line(command);
        assert_eq!(linux.ended(), end);
    }
}

#[test]
fn the_power_button_reaches_user_space() {
    let Some(kernel) = initramfs::runnable() else { return };
    let mut linux = Linux::boot(&kernel, 1, RAM, "");
    // As systemd-logind does, but with what a shell has: an event from the button's input device powers off.
    linux.type_line("head -c 24 /dev/input/event0 > /dev/null && poweroff -f &");
    linux.sh("sleep 1");
    linux.vmm.must(Request::PowerButton);
    assert_eq!(linux.ended(), GuestEnd::PowerOff);
}

fn wall_s() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

#[test]
fn linux_is_saved_and_restored_and_notices_nothing() {
    let Some(kernel) = initramfs::runnable() else { return };
    for vcpus in [1, 4] {
        let mut linux = Linux::boot(&kernel, vcpus, RAM, "");
        let boot_id = linux.sh("cat /proc/sys/kernel/random/boot_id");
        linux.type_line("i=0; while :; do i=$((i+1)); echo $i > /tmp_count; done &");
        linux.type_line("while :; do sleep 0.01; cut -d' ' -f1 /proc/uptime > /up2; mv /up2 /up; done &");
        let mut uptime: f64 = 0.0;
        for _ in 0..6 {
            linux.sh("sleep 0.3");
            linux.move_to_a_fresh_vmm();
            let now: f64 = linux.sh("cut -d' ' -f1 /proc/uptime").parse().unwrap();
            assert!(now >= uptime && now < uptime + 120.0, "{uptime} {now}");
            uptime = now;
            // A busy guest under emulation takes its time to answer.
            let before = wall_s();
            let wall: i64 = linux.sh("date +%s").parse().unwrap();
            let after = wall_s();
            eprintln!("uptime {now}, wall clock {} to {} s ahead", wall - after, wall - before);
            assert!(wall >= before - 3 && wall <= after + 3, "guest {wall}, host {before} to {after}");
        }
        assert_eq!(linux.sh("cat /proc/sys/kernel/random/boot_id"), boot_id);
        assert_eq!(linux.sh("nproc"), vcpus.to_string());
        assert_eq!(linux.bad_lines(), Vec::<String>::new());
        linux.type_line("poweroff -f");
        assert_eq!(linux.ended(), GuestEnd::PowerOff);
    }
}

#[test]
fn a_baseline_hides_what_is_above_it() {
    let Some(kernel) = initramfs::runnable() else { return };
    for profile in [Profile::V2, Profile::V3] {
        let mut parts = Parts::new(spec(2, RAM));
        parts.spec.cpu.name = profile.name().to_owned();
        let mut linux = Linux::boot_parts(&kernel, parts, "");
        let flags = linux.sh("grep -m1 ^flags /proc/cpuinfo");
        let has = |feature: &str| flags.split_ascii_whitespace().any(|flag| flag == feature);
        for feature in Profile::V3.features() {
            assert_eq!(has(feature), profile.features().contains(&feature), "{feature} in {flags}");
        }
        assert!(has("nx") && !has("aes") && !has("svm") && !has("smep"), "{flags}");
        assert_eq!(linux.bad_lines(), Vec::<String>::new());
        linux.move_to_a_fresh_vmm();
        assert_eq!(linux.sh("grep -m1 ^flags /proc/cpuinfo"), flags);
        linux.type_line("poweroff -f");
        assert_eq!(linux.ended(), GuestEnd::PowerOff);
    }
}
