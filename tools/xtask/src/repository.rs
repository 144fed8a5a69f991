//! Where things are: the work tree, the target directory, the binaries.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, setup};

/// What the agent is compiled for; glibc links statically, and nothing of it that needs NSS is used.
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";
/// The agent's program.
const AGENT: &str = "mashine-agent";

/// Programs that a fleet runs.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The host daemon.
    pub mashined: PathBuf,
    /// The process that runs one machine.
    pub mashine_vmm: PathBuf,
    /// The control plane.
    pub mashines_control: PathBuf,
    /// The command line.
    pub mashines: PathBuf,
    /// The bare-metal test guest, an ELF file.
    pub guest: PathBuf,
    /// The guest's init and agent, linked statically.
    pub agent: PathBuf,
}

/// Root of the work tree this program was compiled from.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

/// `cargo`, the one that runs us if one does.
///
/// What that one said about this package is not passed on: build scripts that look at it (ring's does) would run again, and all above
/// them be built anew, whenever somebody builds by hand in between.
pub fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root());
    let about_us = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(about_us) {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what it builds for the workspace.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Target directory of the test guest, which is a workspace of its own with other compiler flags.
pub fn guest_target_dir() -> PathBuf {
    target_dir().join("guest")
}

/// Target directory of the agent, which is linked statically.
pub fn agent_target_dir() -> PathBuf {
    target_dir().join("agent")
}

/// Builds the agent: static, so that it runs in any image, and small, because it stays in the guest's memory.
///
/// # Errors
/// When cargo fails; what it said is on stderr.
fn build_agent() -> Result<()> {
    let small = ["OPT_LEVEL=z", "LTO=true", "CODEGEN_UNITS=1", "PANIC=abort", "STRIP=true", "DEBUG=false"];
    let profile = small.iter().filter_map(|setting| setting.split_once('='));
    command::watch(
        cargo()
            .args(["build", "--quiet", "--release", "--package", "agent", "--bins"])
            .args(["--target", AGENT_TARGET])
            .envs(profile.map(|(name, value)| (format!("CARGO_PROFILE_RELEASE_{name}"), value)))
            // With a target named, build scripts and macros are not linked this way, which they could not be.
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_TARGET_DIR", agent_target_dir()),
    )
    .context("building the agent")
}

/// Builds everything a fleet runs, optimised. Quiet when nothing has changed.
///
/// # Errors
/// When cargo fails; what it said is on stderr.
pub fn build() -> Result<Binaries> {
    if setup::is_under_sudo() {
        return built();
    }
    let packages =
        ["--package", "vmm", "--package", "dataplane", "--package", "controlplane", "--package", "tools"];
    command::watch(cargo().args(["build", "--quiet", "--release", "--bins"]).args(packages))
        .context("building the programs of a fleet")?;
    command::watch(
        cargo()
            .args(["build", "--quiet", "--release", "--manifest-path", "tests/guest/Cargo.toml"])
            // Its build script names its own linker script; flags meant for the host programs would break the link.
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", guest_target_dir()),
    )
    .context("building the test guest")?;
    build_agent()?;
    let binaries = built()?;
    put_beside(&binaries.agent, &binaries.mashines)?;
    Ok(binaries)
}

/// Where `mashines image build` looks for the agent: beside itself, as it is installed.
fn put_beside(agent: &Path, mashines: &Path) -> Result<()> {
    let place = mashines.with_file_name(AGENT);
    let new = place.with_extension("new");
    let put = || -> std::io::Result<()> {
        let size_and_time = |path: &Path| -> std::io::Result<_> {
            let data = path.metadata()?;
            Ok((data.len(), data.modified()?))
        };
        if size_and_time(&place).ok() == Some(size_and_time(agent)?) {
            return Ok(());
        }
        let _ = std::fs::remove_file(&new);
        // The same file, or on another file system a copy: with its time, by which it is known to be the same.
        if std::fs::hard_link(agent, &new).is_err() {
            std::fs::copy(agent, &new)?;
            std::fs::File::options().write(true).open(&new)?.set_modified(agent.metadata()?.modified()?)?;
        }
        std::fs::rename(&new, &place)
    };
    put().with_context(|| format!("putting the agent at {}", place.display()))
}

/// Paths of what [`build`] made.
///
/// # Errors
/// When a program is missing, by name.
pub fn built() -> Result<Binaries> {
    let release = target_dir().join("release");
    let at = |path: PathBuf| -> Result<PathBuf> {
        path.canonicalize().with_context(|| format!("{} has not been built", path.display()))
    };
    Ok(Binaries {
        mashined: at(release.join("mashined"))?,
        mashine_vmm: at(release.join("mashine-vmm"))?,
        mashines_control: at(release.join("mashines-control"))?,
        mashines: at(release.join("mashines"))?,
        guest: at(guest_target_dir().join("release/mashine-guest"))?,
        agent: at(agent_target_dir().join(AGENT_TARGET).join("release").join(AGENT))?,
    })
}
