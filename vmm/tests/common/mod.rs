//! What the tests of `mashine-vmm` share: a host that plays `mashined`, and kernels of a few instructions.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod driver;
pub mod elf;
pub mod host;
pub mod initramfs;
pub mod linux;
pub mod net;
pub mod session;
pub mod vsock;

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

/// The bare-metal test guest's ELF file, if it has been built; says so if not.
pub fn test_guest() -> Option<Vec<u8>> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/guest/target/release/mashine-guest");
    let path = std::env::var("MASHINE_GUEST").unwrap_or_else(|_| default.to_owned());
    let read = std::fs::read(&path);
    if read.is_err() {
        skip("the test guest is not built: cd tests/guest && cargo build --release (or set MASHINE_GUEST)");
    }
    read.ok()
}
