//! Linux bzImages, by the x86 boot protocol: the setup header from the file, the zero page (`boot_params`) around it.
//!
//! A distribution's kernel is a bzImage and stays one: nothing of it is unpacked on the host, so a new compression method is no matter of ours.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{BootError, CMDLINE, HIGH_RAM_START, Initrd, kernel_read, memory_map};
use crate::memory::GuestMemory;
use crate::vcpu::{Entry, LINUX_GDT, Protocol};

const BOOT_PARAMS: u64 = 0x8000;
/// Where the setup header is, in the file as in the zero page.
const SETUP_HEADER: u64 = 0x1f1;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const SECTOR_BYTES: u64 = 512;
/// First protocol whose header says what a 64-bit kernel needs (Linux 3.8).
const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// The loader has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Two unused descriptors, flat code, flat data. Kernels before 5.7 load their segment registers before a table of their own.
const SEGMENTS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// A loaded bzImage.
#[derive(Debug)]
pub struct Image {
    header: setup_header,
    entry: u64,
    /// First address that the unpacked kernel leaves free.
    pub end: u64,
    /// The initial RAM disk must end here or below.
    pub initrd_end_max: u64,
    /// Longest command line that the kernel takes.
    pub cmdline_bytes_max: usize,
}

/// Checks the file and loads its protected-mode part.
///
/// # Errors
/// [`BootError`] when it is no bzImage, one that cannot be booted, or too large.
pub fn load(memory: &GuestMemory, kernel: &mut File) -> Result<Image, BootError> {
    check(kernel)?;
    let start = GuestAddress(HIGH_RAM_START);
    let loaded = BzImage::load(memory, Some(start), kernel, Some(start)).map_err(BootError::Loader)?;
    let header = loaded.setup_header.ok_or(BootError::NotKernel)?;
    // Copied out: the fields of the packed header are not aligned.
    let (preferred, init_bytes) = (header.pref_address, header.init_size);
    let too_large = || BootError::TooLarge { what: "kernel" };
    let first = preferred.max(HIGH_RAM_START);
    let end = first.checked_add(u64::from(init_bytes)).ok_or_else(too_large)?.max(loaded.kernel_end);
    let bytes = usize::try_from(end - HIGH_RAM_START).map_err(|_| too_large())?;
    if !GuestMemoryBackend::check_range(memory, start, bytes) {
        return Err(too_large());
    }
    let (initrd_max, cmdline_max) = (header.initrd_addr_max, header.cmdline_size);
    Ok(Image {
        header,
        entry: HIGH_RAM_START,
        end,
        initrd_end_max: u64::from(initrd_max) + 1,
        cmdline_bytes_max: usize::try_from(cmdline_max).unwrap_or(usize::MAX),
    })
}

/// Everything that can be said of the header before anything is loaded.
fn check(kernel: &mut File) -> Result<(), BootError> {
    let file_bytes = kernel.metadata().map_err(kernel_read)?.len();
    if file_bytes < 2 * SECTOR_BYTES {
        return Err(BootError::NotKernel);
    }
    let mut raw = [0; 0x280 - 0x1f1];
    kernel.seek(SeekFrom::Start(SETUP_HEADER)).map_err(kernel_read)?;
    kernel.read_exact(&mut raw).map_err(kernel_read)?;
    let byte = |at: usize| raw[at - 0x1f1];
    let half = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    if word(0x202) != HEADER_MAGIC {
        return Err(BootError::NotKernel);
    }
    if half(0x206) < VERSION_MIN || half(0x236) & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("holds no 64-bit kernel, or one that is too old"));
    }
    if byte(0x234) == 0 {
        return Err(BootError::Unsupported("is not relocatable"));
    }
    // Zero stands for four, from the days when it was not in the header.
    let setup_sectors = if byte(0x1f1) == 0 { 4 } else { u64::from(byte(0x1f1)) };
    if file_bytes <= (setup_sectors + 1) * SECTOR_BYTES {
        return Err(BootError::Damaged("the file ends before the kernel begins"));
    }
    Ok(())
}

/// Writes the zero page.
///
/// # Errors
/// [`BootError`] when the parameters do not fit.
pub fn finish(
    memory: &GuestMemory,
    image: Image,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let too_large = |_| BootError::TooLarge { what: "initial RAM disk" };
    let narrow = |value: u64| u32::try_from(value).map_err(too_large);
    let mut params = boot_params { hdr: image.header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = narrow(CMDLINE)?;
    // Chained data is the boot loader's to give, and we have none.
    params.hdr.setup_data = 0;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = narrow(initrd.start)?;
        params.hdr.ramdisk_size = narrow(initrd.bytes)?;
    }
    let map = memory_map(memory);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        let kind = if range.usable { E820_RAM } else { E820_RESERVED };
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    memory.write_obj(params, GuestAddress(BOOT_PARAMS))?;
    for (at, descriptor) in (LINUX_GDT..).step_by(8).zip(SEGMENTS) {
        memory.write_slice(&descriptor.to_le_bytes(), GuestAddress(at))?;
    }
    Ok(Entry { address: image.entry, parameters: BOOT_PARAMS, protocol: Protocol::Linux })
}
