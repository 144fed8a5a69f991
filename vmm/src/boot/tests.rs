//! What a kernel finds in memory, by both protocols, and the files that are refused.

use std::io::Write;
use std::sync::Arc;

use wire::units::RamSize;

use super::*;
use crate::dirty::DirtyBitmap;
use crate::memory::Ram;
use crate::vcpu::Protocol;

const RSDP: u64 = 0xe_0000;

fn ram(bytes: u64) -> Ram {
    let size = RamSize::from_bytes(bytes).unwrap();
    let (ram, map) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    ram.set_len(size.bytes()).unwrap();
    map.set_len(size.pages().div_ceil(64) * 8).unwrap();
    let dirty = Arc::new(DirtyBitmap::new(&map, size.pages()).unwrap());
    Ram::new(&ram, size, &dirty).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage without a kernel: two setup sectors, protocol 2.15, 64-bit, relocatable, 16 MiB once unpacked.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 8192];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &[1, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x100_0000_u32.to_le_bytes());
    put(3 * 512, b"KERNEL");
    image
}

fn boot(ram: &Ram, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Entry, BootError> {
    let (mut kernel, mut initrd) = (file(kernel), initrd.map(file));
    let load =
        Load { kernel: &mut kernel, initrd: initrd.as_mut(), cmdline, device_words: "device=1", rsdp: RSDP };
    super::load(ram.memory(), load)
}

fn bytes<const N: usize>(ram: &Ram, at: u64) -> [u8; N] {
    let mut out = [0; N];
    ram.memory().read_slice(&mut out, GuestAddress(at)).unwrap();
    out
}

fn text(ram: &Ram) -> String {
    let raw: [u8; 64] = bytes(ram, CMDLINE);
    String::from_utf8_lossy(raw.split(|b| *b == 0).next().unwrap()).into_owned()
}

#[test]
fn a_bzimage_finds_its_parameters_in_the_zero_page() {
    let ram = ram(5 << 30);
    let entry = boot(&ram, &bzimage(), Some(&[7; 5000]), "quiet ").unwrap();
    assert_eq!((entry.address, entry.protocol), (0x10_0000, Protocol::Linux));
    assert_eq!(&bytes::<6>(&ram, 0x10_0000), b"KERNEL");
    let zero = entry.parameters;
    let word = |at: u64| u32::from_le_bytes(bytes(&ram, zero + at));
    assert_eq!(u64::from_le_bytes(bytes(&ram, zero + 0x70)), RSDP);
    assert_eq!((bytes::<1>(&ram, zero + 0x210), word(0x228)), ([0xff], 0x2_0000));
    // As high as the kernel allows, on a page of its own.
    let (start, length) = (word(0x218), word(0x21c));
    assert_eq!((start, length), (0x7fff_e000, 5000));
    assert_eq!(bytes::<5000>(&ram, start.into()), [7; 5000]);
    assert_eq!(text(&ram), "quiet", "no device words: it reads ACPI");

    assert_eq!(bytes::<1>(&ram, zero + 0x1e8), [4]);
    let entry = |number: u64| {
        let raw: [u8; 20] = bytes(&ram, zero + 0x2d0 + 20 * number);
        let long = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap());
        (long(0), long(8), raw[16])
    };
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x6_0400, 2),
        (0x10_0000, MMIO_HOLE_START - 0x10_0000, 1),
        (1 << 32, (5 << 30) - MMIO_HOLE_START, 1),
    ];
    assert_eq!([0, 1, 2, 3].map(entry), expected);
    // Flat code and data, where kernels before 5.7 look for them.
    assert_eq!(u64::from_le_bytes(bytes(&ram, 0x510)), 0x00cf_9b00_0000_ffff);
    assert_eq!(u64::from_le_bytes(bytes(&ram, 0x518)), 0x00cf_9300_0000_ffff);
}

#[test]
fn a_kernel_is_told_of_its_devices_once() {
    assert_eq!(with_devices("a", "d", true), "a");
    assert_eq!(with_devices("a acpi=off", "d", true), "a acpi=off d");
    assert_eq!(with_devices("a", "d", false), "a d");
    assert_eq!(with_devices("", "", false), "");
}

#[test]
fn what_cannot_be_booted_is_refused_with_the_reason() {
    let ram = ram(64 << 20);
    let says = |kernel: &[u8], initrd: Option<&[u8]>| boot(&ram, kernel, initrd, "").unwrap_err().to_string();
    assert!(says(b"", None).contains("neither a Linux bzImage"));
    assert!(says(&[0; 4096], None).contains("neither a Linux bzImage"));
    assert!(says(b"\x7fELF", None).contains("neither a Linux bzImage"));
    let changed = |at: usize, value: u8| {
        let mut image = bzimage();
        image[at] = value;
        image
    };
    assert!(says(&changed(0x236, 0), None).contains("64-bit"));
    assert!(says(&changed(0x206, 5), None).contains("too old"));
    assert!(says(&changed(0x234, 0), None).contains("relocatable"));
    assert!(says(&changed(0x1f1, 60), None).contains("ends before"));
    // 1 GiB once unpacked, or an address beyond the end of the world.
    assert!(says(&changed(0x263, 0x40), None).contains("does not fit"));
    assert!(says(&changed(0x25f, 0xff), None).contains("does not fit"));
    assert!(says(&bzimage(), Some(&vec![0; 40 << 20])).contains("initial RAM disk does not fit"));
    assert!(boot(&ram, &bzimage(), None, &"x".repeat(2048)).is_err());
    assert!(boot(&ram, &bzimage(), None, "a\0b").is_err());
}
