//! Which of a kernel's modules the initial RAM disk carries, and the order in which they are loaded.
//!
//! Everything else is loaded from the root disk, once that is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::tool::{Tool, ToolError};

/// Without these there is no root disk.
const NEEDED: [&str; 3] = ["virtio_mmio", "virtio_blk", "ext4"];

/// What a machine wants early: its network and agent's socket, entropy, memory, a root of layers, power button, clock.
const WANTED: [&str; 14] = [
    "virtio_pci",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "virtio_rng",
    "crc32c_intel",
    "crc32c_generic",
    "overlay",
    "button",
    "evdev",
    "ptp_kvm",
    "vmgenid",
    "rtc_cmos",
    "af_packet",
];

/// Largest `modules.dep` and module that are read.
const BYTES_MAX: u64 = 64 << 20;

/// Why the modules do not do.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot reach a root disk.
    #[error("the kernel has no `{0}`, neither built in nor as a module: it cannot reach its root disk")]
    Needed(&'static str),
    /// The index is wrong.
    #[error("{}: `{line}` is no line of a modules' index", .path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// The line.
        line: String,
    },
    /// A module in a form that is not known.
    #[error("module {} is compressed in a way that is not known", .0.display())]
    Compression(PathBuf),
    /// A module cannot be unpacked.
    #[error("a module cannot be unpacked")]
    Unpack(#[from] ToolError),
}

/// What to load.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Paths below the modules' directory, each after those that it needs.
    pub order: Vec<String>,
    /// What is wanted but not there.
    pub absent: Vec<&'static str>,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> ModulesError {
    let path = path.to_owned();
    move |source| ModulesError::Io { path, source }
}

/// Plans by the index in a modules' directory.
pub(super) fn plan(directory: &Path) -> Result<Plan, ModulesError> {
    let index = directory.join("modules.dep");
    let text = fs::read_to_string(&index).map_err(io_error(&index))?;
    let builtin = directory.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin).map_err(io_error(&builtin))?;
    let needs = parse(&text).map_err(|line| ModulesError::Index { path: index, line })?;
    let inside: BTreeSet<String> = builtin.lines().map(name_of).collect();
    choose(&needs, &inside)
}

/// The index: a path, and the paths that it needs.
fn parse(text: &str) -> Result<BTreeMap<&str, Vec<&str>>, String> {
    let mut needs = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let wrong = || line.chars().take(100).collect::<String>();
        let (path, rest) = line.split_once(':').ok_or_else(wrong)?;
        let paths: Vec<&str> = rest.split_whitespace().collect();
        // Paths of the index become paths of ours.
        if paths
            .iter()
            .chain([&path])
            .any(|path| path.starts_with('/') || path.split('/').any(|part| part == ".."))
        {
            return Err(wrong());
        }
        needs.insert(path, paths);
    }
    Ok(needs)
}

/// A module's name: its file's, with `_` for `-`, as the kernel has it.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn choose(needs: &BTreeMap<&str, Vec<&str>>, builtin: &BTreeSet<String>) -> Result<Plan, ModulesError> {
    let paths: BTreeMap<String, &str> = needs.keys().map(|&path| (name_of(path), path)).collect();
    let mut plan = Plan { order: Vec::new(), absent: Vec::new() };
    let mut seen = BTreeSet::new();
    for (name, needed) in NEEDED.map(|name| (name, true)).into_iter().chain(WANTED.map(|name| (name, false)))
    {
        match paths.get(name) {
            Some(path) => visit(path, needs, &mut seen, &mut plan.order),
            None if builtin.contains(name) => {}
            None if needed => return Err(ModulesError::Needed(name)),
            None => plan.absent.push(name),
        }
    }
    Ok(plan)
}

/// Puts a module after those that it needs, in their order. The index is closed: it names the needs of needs too, the deepest last;
/// walking it anyway keeps the order right for any index. A circle ends where it began.
fn visit<'a>(
    path: &'a str,
    needs: &BTreeMap<&'a str, Vec<&'a str>>,
    seen: &mut BTreeSet<&'a str>,
    order: &mut Vec<String>,
) {
    let mut stack = vec![(path, false)];
    while let Some((path, done)) = stack.pop() {
        if done {
            order.push(path.to_owned());
        } else if seen.insert(path) {
            stack.push((path, true));
            for &need in needs.get(path).into_iter().flatten() {
                stack.push((need, false));
            }
        }
    }
}

/// A module's bytes as the kernel loads them without help, and the path that they then have.
pub(super) fn read(directory: &Path, path: &str) -> Result<(String, Vec<u8>), ModulesError> {
    let file = directory.join(path);
    if fs::metadata(&file).map_err(io_error(&file))?.len() > BYTES_MAX {
        return Err(ModulesError::Compression(file));
    }
    let bytes = || fs::read(&file).map_err(io_error(&file));
    if path.ends_with(".ko") {
        return Ok((path.to_owned(), bytes()?));
    }
    let (plain, kind) = path.rsplit_once('.').unwrap_or((path, ""));
    let unpacked = match kind {
        "xz" => Tool::new("xz", "xz-utils").arg("-dc").arg(&file).run()?,
        "zst" => zstd::decode_all(&*bytes()?).map_err(io_error(&file))?,
        "gz" => {
            let mut unpacked = Vec::new();
            io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&*bytes()?), &mut unpacked)
                .map_err(io_error(&file))?;
            unpacked
        }
        _ => return Err(ModulesError::Compression(file)),
    };
    Ok((plain.to_owned(), unpacked))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/drivers/virtio/virtio.ko
";

    #[test]
    fn each_module_comes_after_what_it_needs() {
        let builtin: BTreeSet<String> = ["ext4".to_owned()].into();
        let plan = choose(&parse(INDEX).unwrap(), &builtin).unwrap();
        let names: Vec<String> = plan.order.iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_rng"]);
        assert!(plan.absent.contains(&"overlay") && !plan.absent.contains(&"virtio_rng"));
    }

    #[test]
    fn a_kernel_that_cannot_reach_its_disk_is_refused() {
        let error = choose(&parse(INDEX).unwrap(), &BTreeSet::new()).unwrap_err();
        assert!(matches!(error, ModulesError::Needed("ext4")));
    }

    #[test]
    fn circles_end_and_climbing_paths_are_refused() {
        let circle =
            parse("virtio_mmio.ko: virtio_blk.ko\nvirtio_blk.ko: virtio_mmio.ko\next4.ko:\n").unwrap();
        assert_eq!(choose(&circle, &BTreeSet::new()).unwrap().order.len(), 3);
        for bad in ["../x.ko:\n", "a.ko: /etc/passwd\n", "no colon\n"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
