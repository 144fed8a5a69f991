//! Memory of a process besides the guest's RAM, from `/proc/PID/smaps`.

use anyhow::{Context, Result};
use serde::Serialize;

/// Guest RAM, as `/proc` shows it.
const RAM: &str = "/memfd:mashine-ram";

/// What is resident and not guest RAM, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Resident {
    /// Nobody else maps it: what one more VMM costs.
    pub private_kib: u64,
    /// Shared pages divided among those who map them.
    pub proportional_kib: u64,
    /// All, the program's own pages included, which all VMMs share.
    pub resident_kib: u64,
}

/// Of a running process.
///
/// # Errors
/// When it cannot be looked at.
pub fn of(pid: i32) -> Result<Resident> {
    let path = format!("/proc/{pid}/smaps");
    Ok(parse(&std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?))
}

/// Adds up the mappings, of which each begins with a line that has an address range and, at its end, what is mapped.
fn parse(smaps: &str) -> Resident {
    let mut sum = Resident::default();
    let mut counts = true;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if !name.ends_with(':') {
            counts = !line.contains(RAM);
            continue;
        }
        let kib: u64 = if counts { value.parse().unwrap_or(0) } else { 0 };
        match name {
            "Rss:" => sum.resident_kib += kib,
            "Pss:" => sum.proportional_kib += kib,
            "Private_Clean:" | "Private_Dirty:" => sum.private_kib += kib,
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "\
7f00-7f10 rw-s 00000000 00:01 5 /memfd:mashine-ram (deleted)
Rss: 4096 kB
Pss: 2048 kB
Private_Dirty: 4096 kB
7f20-7f30 rw-p 00000000 00:00 0 [heap]
Rss: 40 kB
Pss: 40 kB
Private_Clean: 8 kB
Private_Dirty: 32 kB
VmFlags: rd wr
7f40-7f50 r-xp 00000000 08:01 77 /usr/bin/mashine-vmm
Rss: 100 kB
Pss: 50 kB
Shared_Clean: 100 kB
";
        assert_eq!(parse(smaps), Resident { private_kib: 40, proportional_kib: 90, resident_kib: 140 });
    }
}
