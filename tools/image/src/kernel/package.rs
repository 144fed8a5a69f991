//! Kernels of Debian's packages: downloaded and checked by apt, unpacked, not installed.
//!
//! Until Linux 6.16 a package has a kernel and its modules. Later it is empty and depends on others that have them.

use std::fs;
use std::path::{Path, PathBuf};

use super::apt::{Apt, Archive};
use super::{KernelError, index, io_error, release};
use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::tool::{Tool, ToolError};

/// How many packages may depend on each other until one has a kernel.
const STEPS_MAX: usize = 4;
/// How the names of the packages begin that have a newer kernel: itself, and its modules.
const PARTS: [&str; 2] = ["linux-binary-", "linux-modules-"];
/// How the name of a package begins that can have what both need: the list of what is built in.
const COMMON: &str = "linux-base-";

/// Downloads a package and unpacks it into `directory`.
pub(super) fn fetch(
    package: &str,
    archive: Option<&Archive>,
    directory: &Path,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<Kernel, KernelError> {
    let begin = Begin::parse(package)?;
    let (apt, cache) = match archive {
        Some(archive) => {
            let cache = cache.join(archive.suite.as_str());
            (Apt::of(archive, &cache.join("apt"), progress)?, cache)
        }
        None => (Apt::default(), cache.to_owned()),
    };
    let packages = concrete(&apt, begin)?;
    for package in &packages {
        progress.step(&format!("downloading {package}"));
        let file = download(&apt, package, &cache)?;
        progress.step(&format!("unpacking {package}"));
        let lacks = |source| KernelError::Package { package: package.clone(), source };
        Tool::new("dpkg-deb", "dpkg").arg("-x").arg(&file).arg(directory).run().map_err(lacks)?;
    }
    let empty = |what| KernelError::Empty { package: package.to_owned(), what };
    let kernel = unpacked_kernel(directory)?.ok_or_else(|| empty("kernel"))?;
    let release = release(&kernel)?.ok_or_else(|| KernelError::Release { path: kernel.clone() })?;
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|path| directory.join(path).join(&release))
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| empty("modules"))?;
    // depmod looks in BASE/lib/modules only.
    let base = directory.join("lib/modules");
    if !modules.starts_with(&base) {
        fs::create_dir_all(directory.join("lib")).map_err(io_error(&base))?;
        std::os::unix::fs::symlink("../usr/lib/modules", &base).map_err(io_error(&base))?;
    }
    index(directory, &release)?;
    Ok(Kernel { file: kernel, release, modules: Some(modules) })
}

/// The name of a package that can have a kernel.
struct Begin(String);

impl Begin {
    fn parse(name: &str) -> Result<Self, KernelError> {
        let fitting = |byte: u8| byte.is_ascii_alphanumeric() || b".+-~".contains(&byte);
        if name.starts_with("linux-image-") && name.bytes().all(fitting) {
            Ok(Self(name.to_owned()))
        } else {
            Err(KernelError::PackageName(name.to_owned()))
        }
    }
}

/// The packages that have the kernel: `linux-image-cloud-amd64` has none but depends on the current one.
fn concrete(apt: &Apt, begin: Begin) -> Result<Vec<String>, KernelError> {
    let Begin(mut name) = begin;
    for _ in 0..STEPS_MAX {
        let record =
            apt.record(&name).map_err(|source| KernelError::Package { package: name.clone(), source })?;
        let depends = dependencies(&record);
        let of_kind = |kind: &str| depends.iter().find(|other| other.starts_with(kind)).cloned();
        let parts: Option<Vec<String>> = PARTS.into_iter().map(of_kind).collect();
        // A package that names both a kernel's package and its modules' stands for the former.
        match (of_kind("linux-image-"), parts) {
            (Some(next), _) if next != name => Begin::parse(&next)?.0.clone_into(&mut name),
            (_, Some(parts)) => return Ok(parts.into_iter().chain(of_kind(COMMON)).collect()),
            _ => return Ok(vec![name]),
        }
    }
    Err(KernelError::Empty { package: name, what: "kernel" })
}

/// What a package depends on, without versions and with all alternatives.
fn dependencies(record: &str) -> Vec<String> {
    let line = record.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    let names = line.split([',', '|']).filter_map(|item| item.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// Downloads a package into the cache; apt checks it against its signed index, also when it is there already.
fn download(apt: &Apt, package: &str, cache: &Path) -> Result<PathBuf, KernelError> {
    let directory = cache.join(package);
    fs::create_dir_all(&directory).map_err(io_error(&directory))?;
    let lacks = |source: ToolError| KernelError::Package { package: package.to_owned(), source };
    apt.download(package, &directory).map_err(lacks)?;
    newest(&directory, package)?
        .ok_or_else(|| KernelError::Empty { package: package.to_owned(), what: "downloaded file" })
}

fn newest(directory: &Path, package: &str) -> Result<Option<PathBuf>, KernelError> {
    let prefix = format!("{package}_");
    let mut files: Vec<_> = entries(directory)?
        .into_iter()
        .filter(|path| name_of(path).is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".deb")))
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .collect();
    files.sort();
    let found = files.pop().map(|(_, path)| path);
    // Those of older versions are of no more use.
    for (_, old) in files {
        fs::remove_file(&old).map_err(io_error(&old))?;
    }
    Ok(found)
}

/// The kernel in what was unpacked: newer packages have it beside its modules.
fn unpacked_kernel(directory: &Path) -> Result<Option<PathBuf>, KernelError> {
    let (boot, modules) = (directory.join("boot"), directory.join("usr/lib/modules"));
    let mut places = if boot.is_dir() { entries(&boot)? } else { Vec::new() };
    places.retain(|path| name_of(path).is_some_and(|name| name.starts_with("vmlinuz-")));
    if modules.is_dir() {
        places.extend(entries(&modules)?.into_iter().map(|release| release.join("vmlinuz")));
    }
    Ok(places.into_iter().find(|path| path.is_file()))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let entries = fs::read_dir(directory).map_err(io_error(directory))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_package_depends_on_is_read_without_versions() {
        let record = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)\nSize: 1\n";
        assert_eq!(dependencies(record), ["linux-image-6.1.0-50-cloud-amd64"]);
        let own = "Package: x\nDepends: kmod, initramfs-tools (>= 0.120+deb11u2) | linux-initramfs-tool\n";
        assert_eq!(dependencies(own), ["kmod", "initramfs-tools", "linux-initramfs-tool"]);
        assert!(dependencies("Package: x\n").is_empty());
    }

    #[test]
    fn what_is_no_kernel_package_is_refused_before_anything_runs() {
        for bad in ["bash", "", "linux-image-x;reboot", "linux-image-a b", "../linux-image-1"] {
            assert!(matches!(Begin::parse(bad), Err(KernelError::PackageName(_))), "{bad}");
        }
    }
}
