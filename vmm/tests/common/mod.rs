//! What the tests of `mashine-vmm` share: a host that plays `mashined`, and kernels of a few instructions.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod elf;
pub mod host;

/// Says that a test cannot run on this machine. `cargo xtask test` counts these lines.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    println!("SKIPPED: {why}");
}

/// Whether real VMs can be made; says so if not.
pub fn have_kvm() -> bool {
    let ok = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !ok {
        skip("/dev/kvm cannot be opened");
    }
    ok
}
