//! Unmodified Linux in a real `mashine-vmm`. Skipped, loudly, where KVM cannot run it or there is no kernel to run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::initramfs::{self, Kernel};
use common::linux::Linux;
use common::{have_kvm, skip};
use wire::vmm::{GuestEnd, Notice};

const RAM: u64 = 256 << 20;

fn kernel() -> Option<Kernel> {
    if !have_kvm() {
        return None;
    }
    let kernel = initramfs::kernel();
    if kernel.is_none() {
        skip("no kernel in /boot; name a bzImage in MASHINE_KERNEL");
    }
    kernel
}

#[test]
fn linux_reaches_user_space_on_every_vcpu_and_powers_off() {
    let Some(kernel) = kernel() else { return };
    for vcpus in [1, 2, 4] {
        let mut linux = Linux::boot(&kernel, vcpus, RAM, "");
        eprintln!("{}", linux.sh("dmesg; cat /proc/interrupts /proc/iomem; cat /proc/cpuinfo | tail -30"));
        assert_eq!(linux.sh("nproc"), vcpus.to_string());
        assert_eq!(linux.bad_lines(), Vec::<String>::new());
        linux.type_line("poweroff -f");
        assert_eq!(linux.vmm.notice(), Notice::GuestEnded(GuestEnd::PowerOff));
    }
}
