//! The initramfs of lab hosts: busybox, the two programs that set a host up, and the modules they need on the way.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::command;

/// Modules without which a host has no root, disk, network or KVM; dependencies come by themselves.
const MODULES: [&str; 8] =
    ["virtio_pci", "9pnet_virtio", "9p", "virtio_blk", "ext4", "crc32c_generic", "virtio_net", "tun"];
/// The module behind `/dev/kvm`, last, because it is the slowest to come up.
const KVM: &str = "kvm_amd";
/// What `/dev/kvm` does without: the parts of AMD-V that serve guests with guests of their own, where emulation is least exercised.
const KVM_OPTIONS: &str = "nested=0 vgif=0 vls=0";
/// First program: up to the machine's files.
const INIT: &str = include_str!("init.sh");
/// Second program: network, disk, ssh.
const STAGE2: &str = include_str!("stage2.sh");

/// Names of the modules in the order in which they are asked for.
fn wanted() -> Vec<&'static str> {
    MODULES.into_iter().chain([KVM]).collect()
}

/// Writes the initramfs for `kernel` to `file`.
pub(super) fn write(kernel: &Kernel, file: &Path) -> Result<()> {
    let busybox =
        command::locate("busybox").ok_or_else(|| anyhow!("there is no busybox: install busybox-static"))?;
    let busybox = std::fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;
    if is_dynamic(&busybox) {
        bail!("the busybox of this machine needs libraries: install busybox-static instead of it");
    }
    let output = File::create(file).with_context(|| format!("making {}", file.display()))?;
    let mut archive = Archive::new(BufWriter::new(output));
    let modules = modules(kernel)?;
    fill(&mut archive, &busybox, &modules).with_context(|| format!("writing {}", file.display()))?;
    archive.finish().with_context(|| format!("writing {}", file.display()))?;
    Ok(())
}

fn fill(
    archive: &mut Archive<impl std::io::Write>,
    busybox: &[u8],
    modules: &[(String, Vec<u8>)],
) -> std::io::Result<()> {
    for directory in ["bin", "modules"] {
        archive.directory(directory)?;
    }
    archive.file("bin/busybox", busybox)?;
    archive.file("init", INIT.as_bytes())?;
    archive.file("stage2.sh", STAGE2.as_bytes())?;
    let order: String = modules.iter().map(|(name, _)| format!("{name}{}\n", options(name))).collect();
    archive.file("modules/order", order.as_bytes())?;
    modules.iter().try_for_each(|(name, content)| archive.file(&format!("modules/{name}"), content))
}

fn options(file: &str) -> String {
    let is_kvm = file.strip_suffix(".ko").is_some_and(|name| name.replace('-', "_") == KVM);
    if is_kvm { format!(" {KVM_OPTIONS}") } else { String::new() }
}

/// File name and content of each module, in the order of loading.
fn modules(kernel: &Kernel) -> Result<Vec<(String, Vec<u8>)>> {
    let files = kernel.load_order(&wanted())?;
    files.iter().map(|file| module(&kernel.module(file))).collect()
}

fn module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // Later releases of Debian compress modules, and busybox loads plain ones only.
    if let Some(plain) = name.strip_suffix(".xz") {
        let output = command::finish(Command::new("xz").arg("-dc").arg(path))?;
        if !output.status.success() {
            bail!("xz cannot read {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        return Ok((plain.to_owned(), output.stdout));
    }
    let content = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok((name, content))
}

/// Whether an ELF file names a loader of shared libraries.
fn is_dynamic(program: &[u8]) -> bool {
    const LOADER: &[u8] = b"/ld-linux-x86-64.so.2\0";
    program
        .get(..4096.min(program.len()))
        .is_some_and(|head| head.windows(LOADER.len()).any(|part| part == LOADER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_the_order_of_modules_are_in_it() {
        let modules = [("b.ko".to_owned(), b"BB".to_vec()), ("kvm-amd.ko".to_owned(), b"AA".to_vec())];
        let mut archive = Archive::new(Vec::new());
        fill(&mut archive, b"the busybox", &modules).unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let order = format!("b.ko\nkvm-amd.ko {KVM_OPTIONS}\n");
        for part in ["bin/busybox\0", "the busybox", "init\0", "stage2.sh\0", &order, "modules/kvm-amd.ko\0"]
        {
            assert!(text.contains(part), "{part}");
        }
        assert!(
            text.contains(super::super::boot::READY),
            "the second stage says the word that `up` waits for"
        );
    }

    #[test]
    fn a_dynamic_busybox_is_told_from_a_static_one() {
        assert!(is_dynamic(b"\x7fELF....../lib64/ld-linux-x86-64.so.2\0...."));
        assert!(!is_dynamic(b"\x7fELF static"));
    }

    #[test]
    fn kvm_is_loaded_last() {
        assert_eq!(wanted().last(), Some(&"kvm_amd"));
    }
}
