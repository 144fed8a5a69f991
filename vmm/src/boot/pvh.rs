//! The PVH boot protocol: `hvm_start_info` with memory map, module list, command line and ACPI root pointer.

use linux_loader::loader::elf::start_info::{hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, CMDLINE, Initrd, memory_map};
use crate::memory::GuestMemory;
use crate::vcpu::{Entry, Protocol};

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;
const START_MAGIC: u32 = 0x336e_c578;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// Writes the structures for a kernel that is entered at `entry`.
///
/// # Errors
/// [`BootError::Memory`].
pub fn finish(
    memory: &GuestMemory,
    entry: u64,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let map = memory_map(memory);
    for (at, range) in (MEMORY_MAP..).step_by(24).zip(&map) {
        let kind = if range.usable { MAP_RAM } else { MAP_RESERVED };
        write_words(memory, at, &[range.start, range.end - range.start, u64::from(kind)])?;
    }
    let module = initrd.map(|i| hvm_modlist_entry { paddr: i.start, size: i.bytes, ..Default::default() });
    if let Some(m) = &module {
        write_words(memory, MODULE_LIST, &[m.paddr, m.size, m.cmdline_paddr, m.reserved])?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { MODULE_LIST } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
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
    write_words(memory, START_INFO, &words)?;
    Ok(Entry { address: entry, parameters: START_INFO, protocol: Protocol::Pvh })
}

fn write_words(memory: &GuestMemory, at: u64, words: &[u64]) -> Result<(), BootError> {
    for (address, word) in (at..).step_by(8).zip(words) {
        memory.write_slice(&word.to_le_bytes(), GuestAddress(address))?;
    }
    Ok(())
}
