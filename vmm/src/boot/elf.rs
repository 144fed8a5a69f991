//! ELF kernels: every program header is held against the file and against RAM before linux-loader loads the segments.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{BootError, HIGH_RAM_START, kernel_read};
use crate::memory::GuestMemory;

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
/// More segments than any kernel has; what an attacker's count is held against.
const PROGRAM_HEADERS_MAX: u64 = 64;
/// More bytes than the notes of any kernel have; likewise.
const NOTES_BYTES_MAX: u64 = 64 << 10;

/// A loaded kernel.
#[derive(Debug)]
pub struct Image {
    /// Its PVH entry.
    pub entry: u64,
    /// First address after it.
    pub end: u64,
    /// Whether it is Linux, by the notes that Linux puts into its file.
    pub linux: bool,
}

/// What the checks found out.
#[derive(Debug, Default)]
struct Checked {
    linux: bool,
}

/// Checks the file and loads it.
///
/// # Errors
/// [`BootError`] when it is no PVH kernel, damaged, or too large.
pub fn load(memory: &GuestMemory, kernel: &mut File) -> Result<Image, BootError> {
    let checked = check(memory, kernel)?;
    let loaded = Elf::load(memory, None, kernel, None).map_err(BootError::Loader)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh);
    };
    Ok(Image { entry: entry.0, end: loaded.kernel_end, linux: checked.linux })
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
fn check(memory: &GuestMemory, kernel: &mut File) -> Result<Checked, BootError> {
    let file_bytes = kernel.metadata().map_err(kernel_read)?.len();
    let mut header = [0; 64];
    kernel.rewind().map_err(kernel_read)?;
    if file_bytes < HEADER_BYTES {
        return Err(BootError::NotKernel);
    }
    kernel.read_exact(&mut header).map_err(kernel_read)?;
    const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
    const MACHINE_X86_64: u64 = 62;
    if header[4..6] != CLASS_64_LITTLE_ENDIAN || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(BootError::NotKernel);
    }
    let (table, entry_bytes, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if entry_bytes != PROGRAM_HEADER_BYTES || count > PROGRAM_HEADERS_MAX {
        return Err(BootError::Damaged("program header size or count"));
    }
    let within = |start: u64, bytes: u64| start.checked_add(bytes).is_some_and(|end| end <= file_bytes);
    if !within(table, count * PROGRAM_HEADER_BYTES) {
        return Err(BootError::Damaged("program headers beyond the end of the file"));
    }
    let mut checked = Checked::default();
    for at in (table..).step_by(56).take(usize::try_from(count).unwrap_or(0)) {
        let mut segment = [0; 56];
        kernel.seek(SeekFrom::Start(at)).map_err(kernel_read)?;
        kernel.read_exact(&mut segment).map_err(kernel_read)?;
        checked.linux |= check_segment(memory, kernel, &segment, within)?;
    }
    Ok(checked)
}

/// True when the segment has notes of Linux.
fn check_segment(
    memory: &GuestMemory,
    kernel: &mut File,
    segment: &[u8; 56],
    within_file: impl Fn(u64, u64) -> bool,
) -> Result<bool, BootError> {
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    let kind = u16_at(segment, 0) | u16_at(segment, 2) << 16;
    if !matches!(kind, PT_LOAD | PT_NOTE) {
        return Ok(false);
    }
    let (offset, address) = (u64_at(segment, 8), u64_at(segment, 24));
    let (in_file, in_memory) = (u64_at(segment, 32), u64_at(segment, 40));
    if !within_file(offset, in_file) {
        return Err(BootError::Damaged("segment beyond the end of the file"));
    }
    if kind == PT_NOTE {
        return has_linux_note(kernel, offset, in_file);
    }
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
    Ok(false)
}

/// Whether one of the notes has the name that Linux gives its own (`.note.Linux`, in every build since 2007).
fn has_linux_note(kernel: &mut File, offset: u64, bytes: u64) -> Result<bool, BootError> {
    let mut notes = Vec::new();
    kernel.seek(SeekFrom::Start(offset)).map_err(kernel_read)?;
    kernel.by_ref().take(bytes.min(NOTES_BYTES_MAX)).read_to_end(&mut notes).map_err(kernel_read)?;
    let mut rest = notes.as_slice();
    let aligned = |bytes: u32| usize::try_from(bytes).ok().and_then(|b| b.checked_next_multiple_of(4));
    while let Some((head, body)) = rest.split_first_chunk::<12>() {
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(0) == 6 && body.starts_with(b"Linux\0") {
            return Ok(true);
        }
        let (Some(name), Some(value)) = (aligned(word(0)), aligned(word(4))) else { break };
        rest = name.checked_add(value).and_then(|skip| body.get(skip..)).unwrap_or_default();
    }
    Ok(false)
}
