//! The kernel of lab hosts: a stock one from the distribution's packages, unpacked beside what cargo builds and never installed.
//!
//! The cloud flavour has no 9p, so it is the general one. The package is fetched once; a later one of the distribution is fetched
//! when apt's lists name it. Without a network, one that was unpacked before is used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::{command, packages, repository, setup};

/// Package that always depends on the newest kernel.
const NEWEST: &str = "linux-image-amd64";
/// Start of the name of a package with a kernel; its release follows.
const PREFIX: &str = "linux-image-";

/// A kernel with its modules.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    /// `6.1.0-56-amd64`, as `uname -r` says.
    pub(super) release: String,
    /// A bzImage.
    pub(super) image: PathBuf,
    /// Directory that looks like `/lib/modules`.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// Content of a file that depmod or the package made.
    fn list(&self, file: &str) -> Result<String> {
        let path = self.module(file);
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Path of a module, from its name in `modules.dep`.
    pub(super) fn module(&self, file: &str) -> PathBuf {
        self.modules.join(&self.release).join(file)
    }

    /// Files of the modules that are to be loaded to have all of `wanted`, in the order of loading.
    pub(super) fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        load_order(&self.list("modules.dep")?, &self.list("modules.builtin")?, wanted)
    }
}

/// Where unpacked kernels are, a directory a package.
fn cache() -> PathBuf {
    repository::target_dir().join("lab/kernel")
}

/// Finds or fetches the kernel.
pub(super) fn provide() -> Result<Kernel> {
    let cache = cache();
    std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let found = newest_package().and_then(|package| {
        let directory = cache.join(&package);
        packages::unpack(&package, &directory, |root| index_modules(release(&package), root))?;
        unpacked(&package, &directory)
    });
    found.or_else(|error| any_unpacked(&cache).ok_or(error))
}

fn newest_package() -> Result<String> {
    let listed = || command::read(Command::new("apt-cache").args(["depends", "--important", NEWEST]));
    match listed().ok().as_deref().and_then(dependency) {
        Some(package) => Ok(package),
        None => {
            setup::update_lists()?;
            dependency(&listed()?).ok_or_else(|| {
                anyhow!(
                    "apt knows no {NEWEST}: the kernel of lab hosts is Debian's, so this must be a Debian"
                )
            })
        }
    }
}

/// The package with the kernel, in the output of `apt-cache depends`.
fn dependency(text: &str) -> Option<String> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.map(str::trim).find(|name| name.starts_with(PREFIX)).map(str::to_owned)
}

/// Makes an unpacked kernel's modules loadable.
fn index_modules(release: &str, root: &Path) -> Result<()> {
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("linking lib")?;
    }
    let depmod = command::locate("depmod").ok_or_else(|| anyhow!("there is no depmod: install kmod"))?;
    command::read(Command::new(depmod).arg("-b").arg(root).arg(release)).map(drop)
}

fn release(package: &str) -> &str {
    package.strip_prefix(PREFIX).unwrap_or(package)
}

fn unpacked(package: &str, directory: &Path) -> Result<Kernel> {
    let release = release(package).to_owned();
    let image = directory.join(format!("boot/vmlinuz-{release}"));
    let modules = directory.join("lib/modules");
    if !image.is_file() || !modules.join(&release).join("modules.dep").is_file() {
        bail!("{} has no kernel with modules: remove it and try again", directory.display());
    }
    Ok(Kernel { release, image, modules })
}

/// The last by name of those that were unpacked before.
fn any_unpacked(cache: &Path) -> Option<Kernel> {
    let entries = std::fs::read_dir(cache).ok()?.flatten();
    let names: BTreeSet<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.iter().rev().find_map(|package| unpacked(package, &cache.join(package)).ok())
}

/// Resolves module names by `modules.dep`; what is built in needs no loading.
fn load_order(dependencies: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order = Vec::new();
    for name in wanted {
        let line = dependencies.lines().find(|line| {
            line.split(':').next().is_some_and(|file| module_name(file) == name.replace('-', "_"))
        });
        match line.and_then(|line| line.split(':').next()) {
            Some(file) => load(dependencies, file, &mut order),
            None if builtin.lines().any(|file| module_name(file) == name.replace('-', "_")) => {}
            None => bail!("the kernel has no module `{name}`"),
        }
    }
    Ok(order)
}

/// Puts `file` after all it depends on. Its line lists indirect dependencies too, each of which has a line of its own.
fn load(dependencies: &str, file: &str, order: &mut Vec<String>) {
    if order.iter().any(|loaded| loaded == file) {
        return;
    }
    let own = |line: &&str| line.split(':').next() == Some(file);
    let needed = dependencies.lines().find(own).and_then(|line| line.split_once(':'));
    for dependency in needed.map_or("", |(_, needed)| needed).split_whitespace() {
        // depmod refuses circles, so this ends.
        load(dependencies, dependency, order);
    }
    order.push(file.to_owned());
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/arch/x86/kvm/kvm-amd.ko: kernel/crypto/ccp.ko kernel/arch/x86/kvm/kvm.ko kernel/virt/irqbypass.ko\n\
        kernel/arch/x86/kvm/kvm.ko: kernel/virt/irqbypass.ko\n\
        kernel/crypto/ccp.ko:\nkernel/virt/irqbypass.ko:\nkernel/drivers/tun.ko.xz:\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let order =
            load_order(DEPENDENCIES, "kernel/fs/ext4/ext4.ko\n", &["kvm", "kvm_amd", "ext4", "tun"]).unwrap();
        let names: Vec<_> = order.iter().map(|file| module_name(file)).collect();
        assert_eq!(names, ["irqbypass", "kvm", "ccp", "kvm_amd", "tun"]);
        let missing = load_order(DEPENDENCIES, "", &["ext4"]).unwrap_err();
        assert!(missing.to_string().contains("ext4"), "{missing}");
    }

    #[test]
    fn the_kernel_is_what_the_newest_depends_on() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n";
        assert_eq!(dependency(text).unwrap(), "linux-image-6.1.0-56-amd64");
        assert_eq!(release("linux-image-6.1.0-56-amd64"), "6.1.0-56-amd64");
        assert_eq!(dependency("linux-image-amd64\n"), None);
    }
}
