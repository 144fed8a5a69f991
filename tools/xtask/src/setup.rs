//! What this machine must have before anything runs: packages, limits, devices, privileges.
//!
//! Idempotent, and silent when nothing is missing. What cannot be put right from here is explained with its remedy.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::command;

/// A program we call, and the Debian package that has it.
const NEEDED: [(&str, &str); 4] = [("ip", "iproute2"), ("cc", "gcc"), ("make", "make"), ("ld", "binutils")];

/// Locked memory each child gets, and the least it can do with: glommio registers io_uring buffers, some MiB per shard.
const MEMLOCK_BYTES: (u64, u64) = (512 << 20, 8 << 20);

/// Open files each child gets, and the least it can do with: sockets, memfds and devices of some hundred machines.
const OPEN_FILES: (u64, u64) = (65_536, 1024);

/// Whether the machine can run virtual machines, and if not, why and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// `/dev/kvm` and `/dev/net/tun` can be opened.
    Usable,
    /// They cannot; the text says which, why, and the remedy.
    Missing(String),
}

/// Installs what is missing. Asks for nothing when all is there.
///
/// # Errors
/// When a package is missing and cannot be installed.
pub fn packages() -> Result<()> {
    install(&NEEDED)
}

/// Installs the packages of those programs that are not there.
///
/// # Errors
/// When a package is missing and cannot be installed.
pub fn install(needed: &[(&str, &'static str)]) -> Result<()> {
    let missing: Vec<&str> = needed
        .iter()
        .filter(|(program, _)| command::locate(program).is_none())
        .map(|&(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if command::locate("apt-get").is_none() {
        bail!(
            "missing: {}. This is not a Debian or Ubuntu: install them with its package tool",
            missing.join(", ")
        );
    }
    eprintln!("setup: installing {}", missing.join(", "));
    update_lists()?;
    let mut apt = as_root("apt-get")?;
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    command::watch(apt.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing))
        .with_context(|| format!("installing {}", missing.join(", ")))
}

/// Brings apt's lists up to date.
///
/// # Errors
/// When they cannot be fetched.
pub fn update_lists() -> Result<()> {
    command::watch(as_root("apt-get")?.args(["update", "-qq"]))
        .context("apt-get update: is the network there?")
}

/// `program` with root's rights: itself, or through sudo.
///
/// # Errors
/// When we are not root and there is no sudo.
pub fn as_root(program: &str) -> Result<Command> {
    if rustix::process::geteuid().is_root() {
        return Ok(Command::new(program));
    }
    if command::locate("sudo").is_none() {
        bail!("this needs root and there is no sudo here: become root and run it again");
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

/// Goes on as root: returns if we are, else replaces this process by itself under sudo.
///
/// Call it after everything has been built, so that no file in the target directory belongs to root.
///
/// # Errors
/// When we are not root and cannot become it.
pub fn become_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    if is_under_sudo() {
        bail!("sudo did not make this process root: become root and run it again");
    }
    let program = std::env::current_exe().context("finding this program's own file")?;
    let mut sudo = as_root("env")?;
    sudo.arg(format!("{REEXECUTED}=1"));
    // sudo resets the environment; these decide where the binaries are.
    for name in [
        "PATH",
        "CARGO",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "CARGO_TARGET_DIR",
        "MASHINES_IMAGES",
        "MASHINES_LOG",
        "NO_COLOR",
    ] {
        if let Some(value) = std::env::var_os(name) {
            sudo.arg(format!("{name}={}", value.to_string_lossy()));
        }
    }
    eprintln!("namespaces and /dev/kvm need root: going on through sudo");
    let failed = sudo.arg(program).args(std::env::args_os().skip(1)).exec();
    Err(failed).context("running sudo")
}

/// Whether this process was started by [`become_root`]; then everything has been built already.
pub fn is_under_sudo() -> bool {
    std::env::var_os(REEXECUTED).is_some()
}

/// Who called sudo, if this process runs under it.
pub fn user_behind_sudo() -> Option<u32> {
    std::env::var("SUDO_UID").ok()?.parse().ok()
}

/// Set when we run under our own sudo.
const REEXECUTED: &str = "MASHINES_XTASK_UNDER_SUDO";

/// Raises the limits that children inherit, as far as this machine lets us.
///
/// # Errors
/// When a limit is below what the programs can do with and may not be raised.
pub fn limits() -> Result<()> {
    raise(Resource::Memlock, MEMLOCK_BYTES, "locked memory (memlock)")?;
    raise(Resource::Nofile, OPEN_FILES, "open files (nofile)")
}

fn raise(resource: Resource, (wanted, least): (u64, u64), name: &str) -> Result<()> {
    let now = getrlimit(resource);
    // `None` is "no limit".
    let reaches = |limit: Option<u64>, number: u64| limit.is_none_or(|limit| limit >= number);
    if reaches(now.current, wanted) {
        return Ok(());
    }
    let maximum = if reaches(now.maximum, wanted) { now.maximum } else { Some(wanted) };
    if setrlimit(resource, Rlimit { current: Some(wanted), maximum }).is_ok() {
        return Ok(());
    }
    // Containers often keep even root below the hard limit: take all there is.
    if !reaches(now.maximum, least) {
        bail!(
            "the limit of {name} is {:?} and {least} are needed: raise it in /etc/security/limits.conf, or in the container's settings",
            now.maximum
        );
    }
    setrlimit(resource, Rlimit { current: now.maximum, maximum: now.maximum })
        .with_context(|| format!("raising the limit of {name} to {:?}", now.maximum))
}

/// Looks for the devices a VMM needs.
pub fn kvm() -> Kvm {
    for (path, remedy) in [
        (
            "/dev/kvm",
            "load the module (`modprobe kvm_intel` or `kvm_amd`), switch virtualisation on in the firmware, or, in a virtual machine, allow nested virtualisation; in a container, pass --device /dev/kvm",
        ),
        ("/dev/net/tun", "load the module (`modprobe tun`); in a container, pass --device /dev/net/tun"),
    ] {
        let opened = std::fs::OpenOptions::new().read(true).write(true).open(Path::new(path));
        if let Err(error) = opened {
            return Kvm::Missing(format!("{path}: {error}; {remedy}"));
        }
    }
    Kvm::Usable
}

/// Looks for the device behind taps.
///
/// # Errors
/// When it cannot be opened, with the remedy.
pub fn tun() -> Result<()> {
    let path = "/dev/net/tun";
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).with_context(|| {
        format!("{path}: load the module (`modprobe tun`); in a container, pass --device {path}")
    })
}

/// As [`kvm`], for commands that cannot do without.
///
/// # Errors
/// The reason and remedy when a device is missing.
pub fn require_kvm() -> Result<()> {
    match kvm() {
        Kvm::Usable => Ok(()),
        Kvm::Missing(why) => bail!("this machine cannot run virtual machines: {why}"),
    }
}
