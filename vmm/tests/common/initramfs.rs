//! An initial RAM disk of busybox, a few kernel modules and an init that is a shell on the serial port.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmm::kvm::probe::{Ability, probe};

use super::{have_kvm, skip};

/// Modules that the tests use where the kernel has them as modules.
const MODULES: [&str; 9] = [
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "virtio_mmio",
    "virtio-rng",
    "virtio_net",
    "button",
    "evdev",
    "pvpanic-mmio",
    "virtio_rng",
];

const INIT: &str = "#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in virtio_mmio virtio-rng virtio_net vmw_vsock_virtio_transport virtio_balloon button evdev pvpanic-mmio; do modprobe -q $m; done
stty -echo
export PS1= PS2=
echo READY
while :; do sh; done
";

/// A kernel with its modules, if there are any.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub image: PathBuf,
    pub modules: Option<PathBuf>,
}

/// The kernel to test with, if this machine can run it; says so if not.
pub fn runnable() -> Option<Kernel> {
    if !have_kvm() {
        return None;
    }
    if let Ability::Ring3Only(why) | Ability::None(why) = probe() {
        skip(&format!("this host's KVM cannot run Linux: {why}"));
        return None;
    }
    let kernel = kernel();
    if kernel.is_none() {
        skip("no kernel in /boot; name a bzImage in MASHINE_KERNEL");
    }
    kernel
}

/// The kernel: `MASHINE_KERNEL` (and the `lib/modules/VERSION` beside its `/boot`), or this machine's own.
fn kernel() -> Option<Kernel> {
    let named = std::env::var_os("MASHINE_KERNEL").map(PathBuf::from);
    let image = named.or_else(|| {
        let mut found: Vec<_> = std::fs::read_dir("/boot").ok()?.flatten().map(|e| e.path()).collect();
        found.retain(|path| path.to_string_lossy().contains("/vmlinuz-"));
        found.sort();
        found.pop()
    })?;
    let version = image.file_name()?.to_str()?.strip_prefix("vmlinuz-").map(str::to_owned);
    let root = image.parent().and_then(Path::parent).map(Path::to_owned);
    let modules = root.zip(version).map(|(root, version)| root.join("lib/modules").join(version));
    Some(Kernel { image, modules: modules.filter(|path| path.join("modules.dep").exists()) })
}

/// Builds it; `None` without a static busybox.
pub fn build(kernel: &Kernel) -> Option<Vec<u8>> {
    build_with(kernel, None)
}

/// As [`build`], with a program as `/bin/test-program`.
pub fn build_with(kernel: &Kernel, program: Option<&[u8]>) -> Option<Vec<u8>> {
    let busybox = std::fs::read("/usr/bin/busybox").or_else(|_| std::fs::read("/bin/busybox")).ok()?;
    let mut archive = Archive::default();
    for directory in ["bin", "proc", "sys", "dev", "lib", "lib/modules"] {
        archive.add(directory, 0o040_755, &[]);
    }
    archive.add("bin/busybox", 0o100_755, &busybox);
    archive.add("bin/sh", 0o120_777, b"busybox");
    if let Some(program) = program {
        archive.add("bin/test-program", 0o100_755, program);
    }
    archive.add("init", 0o100_755, INIT.as_bytes());
    if let Some(modules) = &kernel.modules {
        add_modules(&mut archive, modules);
    }
    Some(archive.finish())
}

fn add_modules(archive: &mut Archive, modules: &Path) {
    let version = modules.file_name().unwrap().to_str().unwrap();
    let index = std::fs::read_to_string(modules.join("modules.dep")).unwrap();
    let mut wanted = BTreeSet::new();
    for line in index.lines() {
        let Some((module, needs)) = line.split_once(':') else { continue };
        let name = Path::new(module).file_name().unwrap().to_str().unwrap();
        if MODULES.iter().any(|m| name.split('.').next() == Some(m)) {
            wanted.insert(module);
            wanted.extend(needs.split_ascii_whitespace());
        }
    }
    let top = format!("lib/modules/{version}");
    archive.add(&top, 0o040_755, &[]);
    // Busybox reads no compressed modules.
    archive.add(&format!("{top}/modules.dep"), 0o100_644, index.replace(".ko.xz", ".ko").as_bytes());
    let mut directories = BTreeSet::new();
    for module in &wanted {
        let parents: Vec<_> = Path::new(module).ancestors().skip(1).collect();
        directories.extend(parents.iter().map(|p| p.to_str().unwrap().to_owned()).filter(|p| !p.is_empty()));
    }
    for directory in directories {
        archive.add(&format!("{top}/{directory}"), 0o040_755, &[]);
    }
    for module in wanted {
        let path = modules.join(module);
        let bytes = match module.strip_suffix(".xz") {
            None => std::fs::read(path).unwrap(),
            Some(_) => Command::new("xz").arg("-dc").arg(path).output().unwrap().stdout,
        };
        archive.add(&format!("{top}/{}", module.trim_end_matches(".xz")), 0o100_644, &bytes);
    }
}

/// A cpio archive in the format that Linux unpacks ("newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: usize,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.files,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
