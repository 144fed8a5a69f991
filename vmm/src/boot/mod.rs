//! Loading a kernel: an ELF file with a PVH note or a Linux bzImage, its command line, optionally an initial RAM disk.
//!
//! ```text
//!  0x0500 segment descriptors   0x6000 hvm_start_info   0x7000 memory map   0x8000 boot_params   0x20000 command line
//!  0x9fc00..1 MiB reserved: ACPI tables   1 MiB.. kernel   ..end of low RAM initrd
//! ```
//!
//! Which protocol a file is booted by is seen from its first bytes, never from its name. Both enter the kernel in flat 32-bit
//! protected mode without paging; the long way through `startup_32` costs a bzImage nothing that can be measured, and saves the VMM page tables
//! and a second vCPU state of its own.
//!
//! Kernel files are a user's and checked before linux-loader sees them: everything must lie within the file and
//! within RAM. A file that cannot be booted is refused with what to do about it; RAM may then hold part of it, but no vCPU will run.

mod bzimage;
mod elf;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek};

use linux_loader::loader::Error as LoaderError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use wire::units::MMIO_HOLE_START;
use wire::vmm::CMDLINE_BYTES_MAX;

use crate::memory::GuestMemory;
use crate::vcpu::Entry;

const CMDLINE: u64 = 0x2_0000;
/// End of the RAM that a PC has below its BIOS area.
const LOW_RAM_END: u64 = 0x9_fc00;
/// Where RAM goes on above the BIOS area; kernels lie from here on.
const HIGH_RAM_START: u64 = 0x10_0000;

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
    /// It is neither an ELF file nor a bzImage.
    #[error(
        "the kernel is neither a Linux bzImage (`vmlinuz`) nor a 64-bit x86 ELF file with a PVH entry (`vmlinux`)"
    )]
    NotKernel,
    /// It is an ELF file without PVH entry.
    #[error("the kernel has no PVH entry; build it with CONFIG_PVH=y, or take one that was, or its bzImage")]
    NoPvh,
    /// It is a bzImage that cannot be booted here.
    #[error("the bzImage {0}; take one of a 64-bit kernel of version 3.8 or later")]
    Unsupported(&'static str),
    /// It is damaged.
    #[error("the kernel's headers are damaged: {0}")]
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

/// What is booted, and with what.
#[derive(Debug)]
pub struct Load<'a> {
    /// The kernel.
    pub kernel: &'a mut File,
    /// The initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// The user's command line.
    pub cmdline: &'a str,
    /// Words that describe the devices, for kernels that do not read ACPI tables.
    pub device_words: &'a str,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
}

/// A piece of the guest's memory, as both protocols describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    usable: bool,
}

/// An initial RAM disk in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    start: u64,
    bytes: u64,
}

/// Loads kernel, initial RAM disk and command line into `memory`, and says where vCPU 0 begins.
///
/// # Errors
/// [`BootError`] with the remedy.
pub fn load(memory: &GuestMemory, load: Load<'_>) -> Result<Entry, BootError> {
    let Load { kernel, initrd, cmdline, device_words, rsdp } = load;
    let mut magic = [0; 4];
    kernel.rewind().map_err(kernel_read)?;
    kernel.read_exact(&mut magic).map_err(|_| BootError::NotKernel)?;
    if magic != *b"\x7fELF" {
        let image = bzimage::load(memory, kernel)?;
        let initrd = load_initrd(memory, initrd, image.end, image.initrd_end_max)?;
        let cmdline = with_devices(cmdline, device_words, true);
        write_cmdline(memory, &cmdline, image.cmdline_bytes_max)?;
        return bzimage::finish(memory, image, initrd, rsdp);
    }
    let image = elf::load(memory, kernel)?;
    let initrd = load_initrd(memory, initrd, image.end, MMIO_HOLE_START)?;
    let cmdline = with_devices(cmdline, device_words, image.linux);
    write_cmdline(memory, &cmdline, CMDLINE_BYTES_MAX)?;
    pvh::finish(memory, image.entry, initrd, rsdp)
}

const fn kernel_read(source: std::io::Error) -> BootError {
    BootError::Read { what: "kernel", source }
}

/// A kernel that finds its devices in the ACPI tables must not be told about them twice: Linux only gets the words if its
/// command line says that it will not look there.
fn with_devices(cmdline: &str, words: &str, reads_acpi: bool) -> String {
    let acpi = reads_acpi && !cmdline.split_ascii_whitespace().any(|word| word == "acpi=off");
    if acpi { cmdline.trim().to_owned() } else { format!("{cmdline} {words}").trim().to_owned() }
}

/// Puts the initial RAM disk as high as it may lie: at the end of low RAM, or below `end_max`.
fn load_initrd(
    memory: &GuestMemory,
    file: Option<&mut File>,
    kernel_end: u64,
    end_max: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(file) = file else { return Ok(None) };
    let read = |source| BootError::Read { what: "initial RAM disk", source };
    let too_large = || BootError::TooLarge { what: "initial RAM disk" };
    let bytes = file.metadata().map_err(read)?.len();
    file.rewind().map_err(read)?;
    let end = low_ram_end(memory).min(end_max);
    let start = end.checked_sub(bytes).map(|start| start & !0xfff).ok_or_else(too_large)?;
    if start < kernel_end.max(HIGH_RAM_START) {
        return Err(too_large());
    }
    let count = usize::try_from(bytes).map_err(|_| too_large())?;
    memory.read_exact_volatile_from(GuestAddress(start), file, count)?;
    Ok(Some(Initrd { start, bytes }))
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    GuestMemoryBackend::iter(memory).next().map_or(0, |region| region.len()).min(MMIO_HOLE_START)
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, bytes_max: usize) -> Result<(), BootError> {
    if cmdline.len() > CMDLINE_BYTES_MAX.min(bytes_max) || cmdline.bytes().any(|b| b == 0) {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    let end = CMDLINE + u64::try_from(cmdline.len()).unwrap_or(0);
    memory.write_obj(0u8, GuestAddress(end))?;
    Ok(())
}

/// The memory map: RAM as it is, with the PC's BIOS area, where the ACPI tables are, left out.
fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let ram = |start, end| Range { start, end, usable: true };
    let mut map = vec![
        ram(0, LOW_RAM_END),
        Range { usable: false, ..ram(LOW_RAM_END, HIGH_RAM_START) },
        ram(HIGH_RAM_START, low_ram_end(memory)),
    ];
    for region in GuestMemoryBackend::iter(memory).skip(1) {
        let start = region.start_addr().0;
        map.push(ram(start, start + region.len()));
    }
    map
}

#[cfg(test)]
mod tests;
