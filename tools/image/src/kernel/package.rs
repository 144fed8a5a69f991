//! Kernels of Debian's packages: downloaded and checked by apt, unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Kernel, KernelError, index, io_error, release};
use crate::progress::Progress;
use crate::tool::{Tool, ToolError};

/// How many packages may depend on each other until one has a kernel.
const STEPS_MAX: usize = 4;

/// Downloads a package and unpacks it into `directory`.
pub(super) fn fetch(
    package: &str,
    directory: &Path,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<Kernel, KernelError> {
    let package = concrete(package)?;
    progress.step(&format!("downloading {package}"));
    let file = download(&package, cache)?;
    progress.step(&format!("unpacking {package}"));
    let lacks = |source| KernelError::Package { package: package.clone(), source };
    Tool::new("dpkg-deb", "dpkg").arg("-x").arg(&file).arg(directory).run().map_err(lacks)?;
    let empty = |what| KernelError::Empty { package: package.clone(), what };
    let boot = directory.join("boot");
    let kernel = only(&boot, "vmlinuz-")?.ok_or_else(|| empty("kernel"))?;
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

/// The package that has the kernel: `linux-image-cloud-amd64` has none but depends on the current one.
fn concrete(package: &str) -> Result<String, KernelError> {
    let mut name = package.to_owned();
    for _ in 0..STEPS_MAX {
        let fitting = |byte: u8| byte.is_ascii_alphanumeric() || b".+-~".contains(&byte);
        if !name.starts_with("linux-image-") || !name.bytes().all(fitting) {
            return Err(KernelError::PackageName(name));
        }
        let text = Tool::new("apt-cache", "apt")
            .args(["show", "--no-all-versions", &name])
            .run()
            .map_err(|source| KernelError::Package { package: name.clone(), source })?;
        match depends_on_kernel(&String::from_utf8_lossy(&text)) {
            Some(next) if next != name => name = next,
            _ => return Ok(name),
        }
    }
    Err(KernelError::Empty { package: package.to_owned(), what: "kernel" })
}

/// The first kernel's package among what a package depends on.
fn depends_on_kernel(record: &str) -> Option<String> {
    let line = record.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    let names = line.split([',', '|']).filter_map(|item| item.split_whitespace().next());
    names.map(str::to_owned).find(|name| name.starts_with("linux-image-"))
}

/// Downloads a package into the cache; apt checks it against its signed index, also when it is there already.
fn download(package: &str, cache: &Path) -> Result<PathBuf, KernelError> {
    let directory = cache.join(package);
    fs::create_dir_all(&directory).map_err(io_error(&directory))?;
    let lacks = |source: ToolError| KernelError::Package { package: package.to_owned(), source };
    Tool::new("apt-get", "apt")
        // The download's own user cannot write here.
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(&directory)
        .run()
        .map_err(lacks)?;
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

fn only(directory: &Path, prefix: &str) -> Result<Option<PathBuf>, KernelError> {
    if !directory.is_dir() {
        return Ok(None);
    }
    Ok(entries(directory)?
        .into_iter()
        .find(|path| name_of(path).is_some_and(|name| name.starts_with(prefix))))
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
    fn the_kernel_of_a_meta_package_is_found() {
        let record = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)\nSize: 1\n";
        assert_eq!(depends_on_kernel(record).as_deref(), Some("linux-image-6.1.0-50-cloud-amd64"));
        let own = "Package: x\nDepends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb11u2) | linux-initramfs-tool\n";
        assert_eq!(depends_on_kernel(own), None);
    }

    #[test]
    fn what_is_no_kernel_package_is_refused_before_anything_runs() {
        for bad in ["bash", "", "linux-image-x;reboot", "linux-image-a b", "../linux-image-1"] {
            assert!(matches!(concrete(bad), Err(KernelError::PackageName(_))), "{bad}");
        }
    }
}
