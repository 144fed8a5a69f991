//! Loading a kernel by the PVH boot protocol: an ELF file with a PVH note, its command line, optionally an initial RAM disk.
//!
//! ```text
//!  0x6000 hvm_start_info, module list   0x7000 memory map   0x20000 command line   0x100000.. kernel   ..end of low RAM initrd
//! ```
//!
//! The kernel file is a user's and checked before linux-loader sees it: every segment must lie within the file and
//! within RAM. A file that cannot be booted is refused with what to do about it; RAM may then hold part of it, but no vCPU will run.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use wire::units::MMIO_HOLE_START;
use wire::vmm::CMDLINE_BYTES_MAX;

use crate::memory::GuestMemory;
use crate::vcpu::Entry;

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// End of the RAM that a PC has below its BIOS area.
const LOW_RAM_END: u64 = 0x9_fc00;
/// Where RAM goes on above the BIOS area; kernels lie from here on.
const HIGH_RAM_START: u64 = 0x10_0000;
const START_MAGIC: u32 = 0x336e_c578;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
/// More segments than any kernel has; what an attacker's count is held against.
const PROGRAM_HEADERS_MAX: u64 = 64;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("the {what} file cannot be read")]
    Read {
        /// Which file.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// It is no ELF file.
    #[error(
        "the kernel is no 64-bit x86 ELF file; give an uncompressed kernel with a PVH entry, as `vmlinux` is (not `bzImage`)"
    )]
    NotElf,
    /// It is an ELF file without PVH entry.
    #[error("the kernel has no PVH entry; build it with CONFIG_PVH=y, or take one that was")]
    NoPvh,
    /// It is damaged.
    #[error("the kernel's ELF headers are damaged: {0}")]
    Damaged(&'static str),
    /// linux-loader refused it.
    #[error("the kernel cannot be loaded")]
    Loader(#[source] LoaderError),
    /// It does not fit.
    #[error("the {what} does not fit into the machine's RAM; give it more")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
    },
    /// The command line is too long or not printable.
    #[error(
        "the kernel command line has {0} bytes, or a zero byte; {CMDLINE_BYTES_MAX} printable bytes are possible"
    )]
    Cmdline(usize),
    /// Guest memory refused a write.
    #[error("the boot parameters cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Loads kernel, initial RAM disk and command line into `memory`, and says where vCPU 0 begins.
///
/// # Errors
/// [`BootError`] with the remedy.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    check_elf(memory, kernel)?;
    let loaded = Elf::load(memory, None, kernel, None).map_err(BootError::Loader)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh);
    };
    let kernel_end = loaded.kernel_end;
    let module = match initrd {
        Some(file) => Some(load_initrd(memory, file, kernel_end)?),
        None => None,
    };
    write_cmdline(memory, cmdline)?;
    write_start_info(memory, module)?;
    Ok(Entry { address: entry.0, start_info: START_INFO })
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Holds every program header against the file and against RAM.
fn check_elf(memory: &GuestMemory, kernel: &mut File) -> Result<(), BootError> {
    let read = |source| BootError::Read { what: "kernel", source };
    let file_bytes = kernel.metadata().map_err(read)?.len();
    let mut header = [0; 64];
    kernel.rewind().map_err(read)?;
    if file_bytes < ELF_HEADER_BYTES {
        return Err(BootError::NotElf);
    }
    kernel.read_exact(&mut header).map_err(read)?;
    const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
    const MACHINE_X86_64: u64 = 62;
    if !header.starts_with(b"\x7fELF")
        || header[4..6] != CLASS_64_LITTLE_ENDIAN
        || u16_at(&header, 18) != MACHINE_X86_64
    {
        return Err(BootError::NotElf);
    }
    let (table, entry_bytes, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if entry_bytes != PROGRAM_HEADER_BYTES || count > PROGRAM_HEADERS_MAX {
        return Err(BootError::Damaged("program header size or count"));
    }
    let within = |start: u64, bytes: u64| start.checked_add(bytes).is_some_and(|end| end <= file_bytes);
    if !within(table, count * PROGRAM_HEADER_BYTES) {
        return Err(BootError::Damaged("program headers beyond the end of the file"));
    }
    kernel.seek(SeekFrom::Start(table)).map_err(read)?;
    for _ in 0..count {
        let mut segment = [0; 56];
        kernel.read_exact(&mut segment).map_err(read)?;
        check_segment(memory, &segment, within)?;
    }
    Ok(())
}

fn check_segment(
    memory: &GuestMemory,
    segment: &[u8; 56],
    within_file: impl Fn(u64, u64) -> bool,
) -> Result<(), BootError> {
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    let kind = u16_at(segment, 0) | u16_at(segment, 2) << 16;
    if !matches!(kind, PT_LOAD | PT_NOTE) {
        return Ok(());
    }
    let (offset, address) = (u64_at(segment, 8), u64_at(segment, 24));
    let (in_file, in_memory) = (u64_at(segment, 32), u64_at(segment, 40));
    if !within_file(offset, in_file) {
        return Err(BootError::Damaged("segment beyond the end of the file"));
    }
    if kind == PT_LOAD {
        if in_memory < in_file {
            return Err(BootError::Damaged("segment larger in the file than in memory"));
        }
        if address < HIGH_RAM_START && in_memory > 0 {
            return Err(BootError::Damaged("segment below 1 MiB, where the boot parameters are"));
        }
        let bytes = usize::try_from(in_memory).map_err(|_| BootError::TooLarge { what: "kernel" })?;
        if !GuestMemoryBackend::check_range(memory, GuestAddress(address), bytes) {
            return Err(BootError::TooLarge { what: "kernel" });
        }
    }
    Ok(())
}

/// Puts the initial RAM disk at the end of low RAM, and gives its address and size.
fn load_initrd(memory: &GuestMemory, file: &mut File, kernel_end: u64) -> Result<(u64, u64), BootError> {
    let read = |source| BootError::Read { what: "initial RAM disk", source };
    let too_large = BootError::TooLarge { what: "initial RAM disk" };
    let bytes = file.metadata().map_err(read)?.len();
    file.rewind().map_err(read)?;
    let low_end = low_ram_end(memory);
    let Some(start) = low_end.checked_sub(bytes).map(|start| start & !0xfff) else { return Err(too_large) };
    if start < kernel_end.max(HIGH_RAM_START) {
        return Err(too_large);
    }
    let count = usize::try_from(bytes).map_err(|_| BootError::TooLarge { what: "initial RAM disk" })?;
    memory.read_exact_volatile_from(GuestAddress(start), file, count)?;
    Ok((start, bytes))
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    GuestMemoryBackend::iter(memory).next().map_or(0, |region| region.len()).min(MMIO_HOLE_START)
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() > CMDLINE_BYTES_MAX || cmdline.bytes().any(|b| b == 0) {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    let end = CMDLINE + u64::try_from(cmdline.len()).unwrap_or(0);
    memory.write_obj(0u8, GuestAddress(end))?;
    Ok(())
}

/// The memory map: RAM as it is, with the PC's BIOS area left out.
fn memory_map(memory: &GuestMemory) -> Vec<hvm_memmap_table_entry> {
    let entry =
        |addr: u64, end: u64, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
    let mut map = vec![
        entry(0, LOW_RAM_END, MAP_RAM),
        entry(LOW_RAM_END, HIGH_RAM_START, MAP_RESERVED),
        entry(HIGH_RAM_START, low_ram_end(memory), MAP_RAM),
    ];
    for region in GuestMemoryBackend::iter(memory).skip(1) {
        let start = region.start_addr().0;
        map.push(entry(start, start + region.len(), MAP_RAM));
    }
    map
}

fn write_start_info(memory: &GuestMemory, module: Option<(u64, u64)>) -> Result<(), BootError> {
    let map = memory_map(memory);
    let mut at = MEMORY_MAP;
    for entry in &map {
        write_words(memory, at, &[entry.addr, entry.size, u64::from(entry.type_)])?;
        at += 24;
    }
    let module = module.map(|(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() });
    if let Some(m) = &module {
        write_words(memory, MODULE_LIST, &[m.paddr, m.size, m.cmdline_paddr, m.reserved])?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { MODULE_LIST } else { 0 },
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let words = [
        pair(info.magic, info.version),
        pair(info.flags, info.nr_modules),
        info.modlist_paddr,
        info.cmdline_paddr,
        info.rsdp_paddr,
        info.memmap_paddr,
        pair(info.memmap_entries, info.reserved),
    ];
    write_words(memory, START_INFO, &words)
}

fn write_words(memory: &GuestMemory, at: u64, words: &[u64]) -> Result<(), BootError> {
    for (address, word) in (at..).step_by(8).zip(words) {
        memory.write_slice(&word.to_le_bytes(), GuestAddress(address))?;
    }
    Ok(())
}
