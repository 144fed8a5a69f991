//! What the VMM tells at boot: RAM and the command line (`hvm_start_info` of the PVH boot protocol).
//!
//! Everything is copied out at once, as the memory it lies in is handed out later. A start info that is not one,
//! or RAM without the image in it, ends the guest with a message.

use super::window::Window;
use guest_core::page::PAGE_BYTES;
use guest_core::text::Text;

/// Most RAM ranges that are used.
pub const MAX_RANGES: usize = 8;
/// RAM below this is left to firmware, boot data and the start of further vCPUs.
const LOW_END: u64 = 1 << 20;
/// RAM above this is left alone.
const HIGH_END: u64 = 64 << 30;
const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const ENTRY_BYTES: u64 = 24;
const MAX_ENTRIES: u32 = 128;
const LINE_BYTES: u64 = 4096;

/// A range of RAM in bytes, whole pages.
#[derive(Clone, Copy, Default)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
}

/// What the VMM told.
pub struct BootInfo {
    /// Usable RAM above 1 MiB; unused entries are empty.
    pub ranges: [Range; MAX_RANGES],
    /// All RAM, in bytes.
    pub ram_bytes: u64,
    /// The command line, at most 4096 bytes of it.
    pub command_line: Text<4096>,
}

impl BootInfo {
    /// Reads the `hvm_start_info` at this address.
    #[must_use]
    pub fn read(at: u32) -> Self {
        let at = u64::from(at);
        // SAFETY: the boot protocol puts the structure there; if the magic is wrong nothing else of it is used.
        let info = unsafe { Window::new(at, 56) };
        assert!(info.read::<u32>(0) == MAGIC, "no hvm_start_info at {at:#x}");
        let (line, map, entries) = (info.read(24), info.read(40), info.read(48));
        let (ranges, ram_bytes) = read_map(map, entries);
        Self { ranges, ram_bytes, command_line: read_line(line) }
    }
}

fn read_map(map: u64, entries: u32) -> ([Range; MAX_RANGES], u64) {
    let mut ranges = [Range::default(); MAX_RANGES];
    let mut used = 0;
    let mut ram_bytes = 0;
    let entries = u64::from(entries.min(MAX_ENTRIES));
    // SAFETY: by the boot protocol, the memory map.
    let map = unsafe { Window::new(map, entries * ENTRY_BYTES) };
    for entry in (0..entries).map(|i| map.part(i * ENTRY_BYTES, ENTRY_BYTES)) {
        let (start, size): (u64, u64) = (entry.read(0), entry.read(8));
        if entry.read::<u32>(16) != TYPE_RAM {
            continue;
        }
        ram_bytes += size;
        let end = start.saturating_add(size).min(HIGH_END) / PAGE_BYTES * PAGE_BYTES;
        let start = start.max(LOW_END).next_multiple_of(PAGE_BYTES);
        if start < end && used < MAX_RANGES {
            ranges[used] = Range { start, end };
            used += 1;
        }
    }
    (ranges, ram_bytes)
}

fn read_line(at: u64) -> Text<4096> {
    let mut line = Text::new();
    if at == 0 {
        return line;
    }
    // SAFETY: the boot protocol puts a zero-terminated text there, and reading stops at the zero.
    let text = unsafe { Window::new(at, LINE_BYTES) };
    for i in 0..LINE_BYTES {
        let byte: u8 = text.read(i);
        if byte == 0 {
            break;
        }
        // A Text never fails; what is not ASCII means nothing to us.
        let byte = if byte.is_ascii() { char::from(byte) } else { '?' };
        let _ = core::fmt::Write::write_char(&mut line, byte);
    }
    line
}
