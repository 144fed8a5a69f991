//! The checks that other tools do: rustfmt, clippy, cargo-deny.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;

use crate::report::Outcome;
use crate::{command, extras, repository};

/// A cold clippy of the workspace took 3 minutes on two cores; this is for slower machines.
const CLIPPY_LIMIT: Duration = Duration::from_secs(20 * 60);
/// cargo-deny reads metadata only.
const DENY_LIMIT: Duration = Duration::from_secs(120);

/// Files that rustfmt would change.
pub fn formatting() -> Result<Vec<String>> {
    // The fuzz targets' packages name crates of the workspace, which are then looked at twice.
    let mut differing = BTreeSet::new();
    for manifest in ["Cargo.toml", "tests/guest/Cargo.toml", "wire/fuzz/Cargo.toml", "vmm/fuzz/Cargo.toml"] {
        let mut cargo = repository::cargo();
        cargo.args(["fmt", "--all", "--manifest-path", manifest, "--", "--check", "--files-with-diff"]);
        let output = command::finish(&mut cargo)?;
        let (files, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        differing.extend(files.lines().map(|file| format!("{file}: run cargo fmt")));
        if !output.status.success() && files.trim().is_empty() {
            differing.insert(format!("`{}` failed: {}", command::shown(&cargo), said.trim()));
        }
    }
    Ok(differing.into_iter().collect())
}

/// Clippy with warnings as errors, on the workspace or on the package of `manifest`.
pub fn clippy(manifest: Option<&str>) -> Result<Outcome> {
    let mut cargo = repository::cargo();
    cargo.args(["clippy", "--quiet"]);
    match manifest {
        // The guest is linked by its own script and has a test for its library only.
        Some(manifest) => {
            let target = repository::guest_target_dir();
            cargo.args(["--manifest-path", manifest]).env("CARGO_TARGET_DIR", target).env_remove("RUSTFLAGS")
        }
        None => cargo.args(["--workspace", "--all-targets"]),
    };
    let watched = command::stream(cargo.args(["--", "-D", "warnings"]), CLIPPY_LIMIT)?;
    Ok(match watched {
        command::Watched { timed_out: true, .. } => {
            Outcome::failed(format!("not done within {CLIPPY_LIMIT:?}"))
        }
        command::Watched { succeeded: true, .. } => Outcome::passed(""),
        _ => Outcome::failed("see above"),
    })
}

/// cargo-deny by deny.toml.
pub fn dependencies() -> Result<Outcome> {
    if !extras::present("cargo-deny") {
        return Ok(Outcome::skipped("cargo-deny is not installed: cargo install --locked cargo-deny"));
    }
    let mut cargo = repository::cargo();
    cargo.env("PATH", extras::search_path()?);
    cargo.args(["deny", "--offline", "check", "licenses", "bans", "sources"]);
    let watched = command::stream(&mut cargo, DENY_LIMIT)?;
    Ok(if watched.succeeded { Outcome::passed("") } else { Outcome::failed("see above") })
}
