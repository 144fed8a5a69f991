//! Running the fuzz targets for a while: hostile frames, state archives and virtqueues must not panic or allocate without bound.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::report::Outcome;
use crate::{command, extras, repository, sources};

/// Crates that have a `fuzz` directory of their own (workspaces of their own: they need a nightly compiler).
const CRATES: [&str; 2] = ["wire", "vmm"];
/// Building one crate's targets from nothing. A machine that is slower does not fuzz; that is no defect, so it counts as skipped.
const BUILD_LIMIT: Duration = Duration::from_secs(6 * 60);
/// What starting and ending a target takes besides.
const RUN_SLACK: Duration = Duration::from_secs(60);
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
/// When there are no targets, or cargo cannot be started.
pub fn run(seconds: u32) -> Result<Outcome> {
    let missing = missing();
    let mut outcome = Outcome { note: format!("{seconds} s each"), ..Outcome::default() };
    for name in CRATES {
        let targets = targets(name);
        let count = u64::try_from(targets.len())?;
        if targets.is_empty() {
            anyhow::bail!("there are no fuzz targets in {name}/fuzz");
        }
        if let Some(why) = &missing {
            outcome.skipped += count;
            outcome.note.clone_from(why);
            continue;
        }
        let directory = repository::root().join(name);
        let built = command::stream(fuzz(&directory)?.args(["build"]), BUILD_LIMIT)?;
        if built.timed_out {
            outcome.skipped += count;
            outcome.note = format!("{name}: its targets were not built within {BUILD_LIMIT:?}");
            continue;
        }
        for target in targets {
            // A build that fails fails here again, with its reason shown last.
            let mut run = fuzz(&directory)?;
            run.args(["run", &target, "--", &format!("-max_total_time={seconds}")]);
            run.arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"));
            let ran = command::stream(&mut run, Duration::from_secs(u64::from(seconds)) + RUN_SLACK)?;
            if ran.succeeded {
                outcome.passed += 1;
            } else {
                outcome.failed += 1;
                outcome.note = format!("{target} failed, see above");
            }
        }
    }
    Ok(outcome)
}

/// cargo-fuzz in the crate's directory, under the nightly compiler.
fn fuzz(directory: &Path) -> Result<Command> {
    let mut command = Command::new("rustup");
    command.current_dir(directory).env("PATH", extras::search_path()?).env_remove("CARGO");
    command.env("CARGO_TARGET_DIR", repository::target_dir().join("fuzz"));
    command.args(["run", "nightly", "cargo", "fuzz"]);
    Ok(command)
}

/// Names of a crate's targets.
fn targets(name: &str) -> Vec<String> {
    let files = std::fs::read_dir(sources::absolute(name).join("fuzz/fuzz_targets"));
    let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
    let mut found: Vec<String> =
        files.into_iter().flatten().flatten().filter_map(|file| stem(file.path())).collect();
    found.sort();
    found
}
