//! Root disks: a raw ext4 file system without a partition table, made of a tree by `mke2fs -d`.
//!
//! The same tree gives the same bytes, as far as e2fsprogs lets: identifiers come from the image's name, times from the tree or from
//! `SOURCE_DATE_EPOCH`. The file is sparse; its length is a multiple of 2 MiB, because machines' disks are.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::digest::digest_of;
use crate::tool::{Tool, ToolError};

/// The file system's block size.
pub const BLOCK_BYTES: u64 = 4096;
/// Root disks are a multiple of this long.
pub const STEP_BYTES: u64 = 2 << 20;
/// The smallest disk that is made without being asked for.
const SMALLEST_BYTES: u64 = 64 << 20;
/// The largest disk that is made.
const LARGEST_BYTES: u64 = 1 << 40;
/// Bytes of an inode.
const INODE_BYTES: u64 = 256;

/// Why there is no root disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file cannot be read or made.
    #[error("cannot read {}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `mke2fs` said no.
    #[error("the root disk cannot be made")]
    Make(#[from] ToolError),
    /// The wanted size is none.
    #[error("a root disk cannot have {bytes} bytes: its size is a multiple of 2 MiB, from 8 MiB to 1 TiB")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// What is in it does not fit.
    #[error("the files need about {needed} bytes, more than the {bytes} asked for")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
        /// What is needed.
        needed: u64,
    },
    /// A file that is no root disk.
    #[error("{} is no root disk: {why}", .path.display())]
    None {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        why: &'static str,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { path, source }
}

/// What a tree needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Contents {
    bytes: u64,
    inodes: u64,
}

/// Makes the root disk `file` of the tree in `tree`. `seed` decides its identifiers.
///
/// # Errors
/// [`DiskError`].
pub fn make(tree: &Path, file: &Path, size_bytes: Option<u64>, seed: &str) -> Result<(), DiskError> {
    let contents = measure(tree)?;
    let inodes = contents.inodes + contents.inodes / 4 + 1024;
    let bytes = size(contents, inodes, size_bytes)?;
    let inodes = inodes.max(bytes / 16_384);
    let disk = File::create(file).map_err(io_error(file))?;
    disk.set_len(bytes).map_err(io_error(file))?;
    let identifier = uuid(seed);
    // No discarding and no lazy work: the file is zeros already, and the machine's kernel has nothing to finish at first boot.
    let extended = format!(
        "hash_seed={identifier},root_owner=0:0,nodiscard,assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1"
    );
    let journal_mib = if bytes < 512 << 20 { 4 } else { 32 };
    Tool::new("mke2fs", "e2fsprogs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-I", "256"])
        .args(["-N", &inodes.to_string(), "-J", &format!("size={journal_mib}")])
        .args(["-U", &identifier, "-E", &extended, "-d"])
        .arg(tree)
        .arg(file)
        .env("E2FSPROGS_FAKE_TIME", epoch().to_string())
        .run()?;
    settle_inodes(file)?;
    check(file)
}

/// Sets the times that a tree cannot be given, of changes to inodes and of reading, to one that is always the same: `mke2fs` copies
/// them from the tree, where they are those of this job.
fn settle_inodes(file: &Path) -> Result<(), DiskError> {
    let text = Tool::new("dumpe2fs", "e2fsprogs").arg(file).run()?;
    let script = file.with_extension("inodes");
    let epoch = epoch();
    let mut lines = String::new();
    for inode in used_inodes(&String::from_utf8_lossy(&text)) {
        lines.push_str(&format!("sif <{inode}> ctime @{epoch}\nsif <{inode}> atime @{epoch}\n"));
    }
    fs::write(&script, lines).map_err(io_error(&script))?;
    Tool::new("debugfs", "e2fsprogs")
        .args(["-w", "-f"])
        .args([&script, file])
        .env("E2FSPROGS_FAKE_TIME", epoch.to_string())
        .run()?;
    fs::remove_file(&script).map_err(io_error(&script))
}

/// The inodes that `dumpe2fs` does not list as free: the root's, and those after the reserved ones.
fn used_inodes(text: &str) -> Vec<u64> {
    let count = text.lines().find_map(|line| line.strip_prefix("Inode count:"));
    let count: u64 = count.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
    let mut used = vec![2];
    let mut next = 11;
    // The first such line is the sum; those of groups are indented.
    for line in text.lines().filter_map(|line| line.trim_end().strip_prefix("  Free inodes:")) {
        for range in line.split(',').map(str::trim).filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
            used.extend(next..first);
            next = next.max(last.saturating_add(1));
        }
    }
    used.extend(next..=count);
    used
}

/// `SOURCE_DATE_EPOCH`, or a time of no meaning: the superblock says when a disk was made, and that must not differ.
pub fn epoch() -> u64 {
    let set = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    // A file system of 1970 is taken for a broken clock by fsck.
    set.unwrap_or(1_700_000_000)
}

fn size(contents: Contents, inodes: u64, wanted: Option<u64>) -> Result<u64, DiskError> {
    let fixed = inodes.saturating_mul(INODE_BYTES).saturating_add(8 << 20);
    let needed = contents.bytes.saturating_add(fixed);
    let roomy =
        contents.bytes.saturating_add(contents.bytes / 4).saturating_add(fixed).saturating_add(32 << 20);
    let bytes = match wanted {
        Some(bytes) if bytes % STEP_BYTES != 0 || bytes < 8 << 20 => return Err(DiskError::Size { bytes }),
        Some(bytes) if bytes < needed => return Err(DiskError::TooSmall { bytes, needed }),
        Some(bytes) => bytes,
        None => roomy.checked_next_multiple_of(STEP_BYTES).unwrap_or(u64::MAX).max(SMALLEST_BYTES),
    };
    if bytes > LARGEST_BYTES { Err(DiskError::Size { bytes }) } else { Ok(bytes) }
}

fn measure(tree: &Path) -> Result<Contents, DiskError> {
    let mut contents = Contents::default();
    let mut pending = vec![tree.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).map_err(io_error(&directory))? {
            let entry = entry.map_err(io_error(&directory))?;
            let metadata = entry.metadata().map_err(io_error(&entry.path()))?;
            contents.inodes += 1;
            // Holes take no place.
            let taken = metadata.len().min(metadata.blocks().saturating_mul(512));
            let taken = taken.next_multiple_of(BLOCK_BYTES);
            contents.bytes =
                contents.bytes.saturating_add(taken.max(if metadata.is_dir() { BLOCK_BYTES } else { 0 }));
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(contents)
}

/// An identifier made of a name, in the form of a UUID of version 8.
fn uuid(seed: &str) -> String {
    let mut bytes = digest_of(seed.as_bytes()).0;
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    [hex.get(..8), hex.get(8..12), hex.get(12..16), hex.get(16..20), hex.get(20..)]
        .map(Option::unwrap_or_default)
        .join("-")
}

/// Checks that a file is a root disk: a raw ext4 file system of our block size, whole, and of a length that disks have.
///
/// # Errors
/// [`DiskError::None`] says what it is instead.
pub fn check(file: &Path) -> Result<(), DiskError> {
    let none = |why| DiskError::None { path: file.to_owned(), why };
    let opened = File::open(file).map_err(io_error(file))?;
    let metadata = opened.metadata().map_err(io_error(file))?;
    if !metadata.is_file() {
        return Err(none("it is not a regular file"));
    }
    let mut start = Vec::new();
    opened.take(2048).read_to_end(&mut start).map_err(io_error(file))?;
    judge(&start, metadata.len()).map_err(none)
}

/// Whether a file that begins like this is an ext file system at all.
pub fn looks_like(start: &[u8]) -> bool {
    start.get(1080..1082) == Some(&[0x53, 0xef])
}

fn judge(start: &[u8], bytes: u64) -> Result<(), &'static str> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(start.get(at..at + 4)?.try_into().ok()?));
    if !looks_like(start) {
        return Err(match start.get(510..512) {
            Some([0x55, 0xaa]) => "it has a partition table; give the file system of one partition",
            _ if start.starts_with(b"QFI\xfb") => "it is a qcow2 file; convert it: qemu-img convert -O raw",
            _ => "there is no ext4 file system in it",
        });
    }
    // The superblock is 1024 bytes at 1024.
    if start.len() < 2048 {
        return Err("it is cut short");
    }
    if u32_at(1024 + 24) != Some(2) {
        return Err("its block size is not 4096 bytes");
    }
    // Without extents it is ext2 or ext3.
    if u32_at(1024 + 96).is_none_or(|incompatible| incompatible & 0x40 == 0) {
        return Err("it is an ext2 or ext3 file system, not ext4");
    }
    let blocks = u32_at(1024 + 4).map_or(0, u64::from);
    let blocks = blocks | u32_at(1024 + 0x150).map_or(0, u64::from) << 32;
    if blocks.checked_mul(BLOCK_BYTES).is_none_or(|whole| whole > bytes || whole == 0) {
        return Err("it is cut short: the file system is longer than the file");
    }
    if !bytes.is_multiple_of(STEP_BYTES) {
        return Err("its length is not a multiple of 2 MiB; lengthen it: truncate -s %2M");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(edit: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut start = vec![0; 2048];
        start[1080..1082].copy_from_slice(&[0x53, 0xef]);
        start[1048] = 2;
        start[1024 + 96] = 0x40;
        start[1024 + 4..1024 + 8].copy_from_slice(&512_u32.to_le_bytes());
        edit(&mut start);
        start
    }

    #[test]
    fn root_disks_and_others_are_told_apart() {
        assert_eq!(judge(&superblock(|_| {}), 2 << 20), Ok(()));
        assert!(judge(&superblock(|_| {}), (2 << 20) - 1).unwrap_err().contains("cut short"));
        assert!(judge(&superblock(|_| {}), (2 << 20) + 4096).unwrap_err().contains("multiple"));
        assert!(judge(&superblock(|start| start[1048] = 0), 2 << 20).unwrap_err().contains("block size"));
        assert!(judge(&superblock(|start| start[1024 + 96] = 0), 2 << 20).unwrap_err().contains("ext2"));
        let mut partitions = vec![0; 2048];
        partitions[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(judge(&partitions, 2 << 20).unwrap_err().contains("partition"));
        for length in [0, 100, 1081, 1100, 1300] {
            assert!(judge(&superblock(|_| {})[..length], 2 << 20).is_err());
        }
        // More blocks than 64 bits of bytes.
        assert!(judge(&superblock(|start| start[1024 + 0x150..][..4].fill(0xff)), 2 << 20).is_err());
    }

    #[test]
    fn sizes_have_room_and_steps() {
        let small = Contents { bytes: 1000, inodes: 10 };
        assert_eq!(size(small, 1024, None).unwrap(), 64 << 20);
        let large = Contents { bytes: 1 << 30, inodes: 10 };
        let bytes = size(large, 1024, None).unwrap();
        assert!(bytes >= (1 << 30) / 4 * 5 && bytes.is_multiple_of(STEP_BYTES));
        assert!(matches!(size(large, 1024, Some(64 << 20)), Err(DiskError::TooSmall { .. })));
        assert!(matches!(size(small, 1024, Some((64 << 20) + 1)), Err(DiskError::Size { .. })));
        assert!(matches!(size(small, 1024, Some(2 << 40)), Err(DiskError::Size { .. })));
        assert!(matches!(
            size(Contents { bytes: u64::MAX, inodes: 1 }, 1, None),
            Err(DiskError::Size { .. })
        ));
    }

    #[test]
    fn used_inodes_are_those_that_are_not_free() {
        let text = "Inode count:              30\nFree inodes:              13\n  Free inodes: 13-14, 17\n  Free inodes: \n  Free inodes: 21-30\n";
        assert_eq!(used_inodes(text), [2, 11, 12, 15, 16, 18, 19, 20]);
        assert_eq!(used_inodes("Inode count: 12\n"), [2, 11, 12]);
        assert_eq!(used_inodes(""), [2]);
    }

    #[test]
    fn identifiers_are_uuids() {
        assert_eq!(uuid("a").len(), 36);
        assert_eq!(uuid("a").as_bytes()[14], b'8');
        assert_ne!(uuid("a"), uuid("b"));
    }
}
