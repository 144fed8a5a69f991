//! What must be there before a lab comes up: packages, our programs, the kernel, rights. No `/dev/kvm`.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};

use super::kernel::{self, Kernel};
use super::qemu;
use crate::repository::{self, Binaries};
use crate::{command, setup};

/// Programs a lab calls, and Debian's packages that have them. `dropbear-bin` has the ssh server only, and starts none.
const NEEDED: [(&str, &str); 7] = [
    (qemu::PROGRAM, "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("mkfs.ext4", "e2fsprogs"),
    ("dropbear", "dropbear-bin"),
    ("ssh", "openssh-client"),
    ("xz", "xz-utils"),
];

/// All that a lab is made of.
#[derive(Debug, Clone)]
pub struct Ready {
    /// What runs on the hosts and beside them.
    pub binaries: Binaries,
    pub(super) kernel: Kernel,
    pub(super) dropbear: PathBuf,
}

/// Installs what is missing, builds as the user, then goes on as root.
///
/// # Errors
/// When something is missing and cannot be had, with the remedy.
pub fn prepare() -> Result<Ready> {
    setup::packages()?;
    setup::install(&NEEDED)?;
    let binaries = repository::build()?;
    let kernel = kernel::provide()?;
    setup::become_root()?;
    setup::tun()?;
    setup::limits()?;
    Ok(Ready { binaries, kernel, dropbear: located("dropbear")? })
}

/// Whether a lab can come up here without installing anything; else what is missing. For tests, which install nothing.
///
/// # Errors
/// The first that is missing.
pub fn missing() -> Option<String> {
    let program = NEEDED.iter().find(|(program, _)| command::locate(program).is_none());
    program.map(|(program, package)| format!("there is no {program} (package {package})"))
}

fn located(program: &str) -> Result<PathBuf> {
    let path = command::locate(program).ok_or_else(|| anyhow!("there is no {program}"))?;
    path.canonicalize().with_context(|| format!("finding {}", path.display()))
}
