//! Cargo subcommands that not everybody has: found on the search path, or built once into the target directory.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{command, repository};

/// Building a small subcommand took two and a half minutes on two busy cores.
const INSTALL_LIMIT: Duration = Duration::from_secs(6 * 60);

/// Where our own copies are; `cargo clean` removes them.
fn own() -> PathBuf {
    repository::target_dir().join("tools")
}

/// The search path with our own copies behind what the user has.
pub fn search_path() -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).chain([own().join("bin")]);
    Ok(std::env::join_paths(all)?)
}

/// Whether `program` can be found.
pub fn present(program: &str) -> bool {
    command::locate(program).is_some() || own().join("bin").join(program).is_file()
}

/// Builds `package`, which has a program of the same name, unless it is there.
///
/// # Errors
/// When it cannot be built in time; the user's own cargo directory is not touched in any case.
pub fn install(package: &str) -> Result<()> {
    if present(package) {
        return Ok(());
    }
    eprintln!("   building {package}, once");
    let mut cargo: Command = repository::cargo();
    cargo.args(["install", "--quiet", "--locked", package, "--root"]).arg(own());
    let watched = command::stream(&mut cargo, INSTALL_LIMIT)?;
    if !watched.succeeded {
        bail!("{package} could not be built within {INSTALL_LIMIT:?}: cargo install --locked {package}");
    }
    Ok(())
}
