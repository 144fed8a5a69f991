//! What must be known of an ELF file: whether it is one for this machine, and whether it needs a loader.

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elf {
    /// Runs by itself.
    Static,
    /// Needs a dynamic loader.
    Dynamic,
}

/// The length of the file header.
const HEADER: usize = 64;
/// The program header that names a loader.
const PT_INTERP: u32 = 3;
/// x86-64.
const EM_X86_64: u16 = 62;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// What a file is by its first bytes, `None` when it is no x86-64 ELF file. Program headers past `bytes` are taken for absent.
pub fn kind(bytes: &[u8]) -> Option<Elf> {
    let little_64 = bytes.len() >= HEADER && bytes.starts_with(b"\x7fELF\x02\x01");
    if !little_64 || u16_at(bytes, 18)? != EM_X86_64 {
        return None;
    }
    let table = u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?);
    let (size, count) = (usize::from(u16_at(bytes, 54)?), usize::from(u16_at(bytes, 56)?));
    let header = |index: usize| {
        let at = usize::try_from(table).ok()?.checked_add(index.checked_mul(size)?)?;
        u32_at(bytes, at)
    };
    let loader = (0..count).filter_map(header).any(|kind| kind == PT_INTERP);
    Some(if loader { Elf::Dynamic } else { Elf::Static })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 52]);
        }
        bytes
    }

    #[test]
    fn loaders_are_seen() {
        assert_eq!(kind(&elf(&[1, 1])), Some(Elf::Static));
        assert_eq!(kind(&elf(&[6, 3, 1])), Some(Elf::Dynamic));
    }

    #[test]
    fn hostile_headers_are_no_elf_and_no_panic() {
        let mut far = elf(&[1]);
        far[32..40].fill(0xff);
        assert_eq!(kind(&far), Some(Elf::Static));
        let mut other = elf(&[1]);
        other[18] = 40;
        for bytes in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &other] {
            assert_eq!(kind(bytes), None);
        }
        let whole = elf(&[3]);
        for length in 0..whole.len() {
            let _ = kind(&whole[..length]);
        }
    }
}
