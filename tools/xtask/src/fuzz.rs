//! Running the fuzz targets for a while: hostile frames, state archives and virtqueues must not panic or allocate without bound.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::report::Outcome;
use crate::{command, extras, repository, sources};

/// Crates that have a `fuzz` directory of their own (workspaces of their own: they need a nightly compiler).
const CRATES: [&str; 2] = ["wire", "vmm"];
/// Building one crate's targets, from nothing, on two slow cores.
const BUILD_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Memory that a target may use, in MiB: an allocation by an attacker's length is found by this.
const MEMORY_MIB_MAX: u32 = 1024;

/// Makes what is needed, or says why fuzzing cannot be done here.
fn missing() -> Option<String> {
    let nightly = command::finish(Command::new("rustup").args(["run", "nightly", "rustc", "--version"]));
    if !nightly.is_ok_and(|output| output.status.success()) {
        return Some("no nightly compiler: rustup toolchain install nightly --profile minimal".to_owned());
    }
    if command::locate("c++").is_none() {
        return Some("no C++ compiler, which libFuzzer needs: apt-get install g++".to_owned());
    }
    extras::install("cargo-fuzz").err().map(|error| format!("{error:#}"))
}

/// Runs each target for `seconds`.
///
/// # Errors
/// When cargo cannot be started.
pub fn run(seconds: u32) -> Result<Outcome> {
    let targets = targets();
    if targets.is_empty() {
        anyhow::bail!("there are no fuzz targets under wire/fuzz and vmm/fuzz");
    }
    if let Some(why) = missing() {
        let skipped = u64::try_from(targets.len()).unwrap_or(u64::MAX);
        return Ok(Outcome { skipped, note: why, ..Outcome::default() });
    }
    let mut outcome = Outcome::default();
    let mut failures = Vec::new();
    for (directory, target) in targets {
        let mut fuzz = Command::new("rustup");
        fuzz.current_dir(directory).env("PATH", extras::search_path()?).env_remove("CARGO");
        fuzz.env("CARGO_TARGET_DIR", repository::target_dir().join("fuzz"));
        fuzz.args(["run", "nightly", "cargo", "fuzz", "run", &target, "--"]);
        fuzz.args([format!("-max_total_time={seconds}"), format!("-rss_limit_mb={MEMORY_MIB_MAX}")]);
        let watched = command::stream(&mut fuzz, BUILD_LIMIT + Duration::from_secs(u64::from(seconds)))?;
        if watched.succeeded {
            outcome.passed += 1;
        } else {
            outcome.failed += 1;
            failures.push(target);
        }
    }
    outcome.note = if failures.is_empty() {
        format!("{seconds} s each")
    } else {
        format!("{}: the input that fails is named above", failures.join(", "))
    };
    Ok(outcome)
}

/// Crate directory and name of each target.
pub fn targets() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for name in CRATES {
        let Ok(files) = std::fs::read_dir(sources::absolute(name).join("fuzz/fuzz_targets")) else {
            continue;
        };
        for file in files.flatten() {
            if let Some(stem) = file.path().file_stem() {
                found.push((repository::root().join(name), stem.to_string_lossy().into_owned()));
            }
        }
    }
    found.sort();
    found
}
