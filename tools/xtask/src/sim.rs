//! `cargo xtask sim`: the protocol simulator, built optimised.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::report::Outcome;
use crate::{command, repository};

/// Building it and running the campaign of the test command.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// The last line that the simulator prints with `--json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SimResult {
    /// Whether no invariant was violated.
    pub ok: bool,
    /// Seeds that were run.
    pub seeds: u64,
    /// Events that were delivered in all.
    pub events: u64,
    /// One line for each violation, with the seed that shows it.
    pub violations: Vec<serde_json::Value>,
}

/// The command that runs the simulator with `arguments`.
pub fn simulator(arguments: &[String]) -> Command {
    let mut cargo = repository::cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "sim", "--"]).args(arguments);
    cargo
}

/// Runs a campaign as a step of the test command.
///
/// # Errors
/// When the simulator cannot be run or prints no result.
pub fn outcome(seeds: u64) -> Result<Outcome> {
    let mut cargo = simulator(&["--seeds".to_owned(), seeds.to_string(), "--json".to_owned()]);
    let watched = command::stream(&mut cargo, LIMIT)?;
    let last = watched.lines.iter().rev().find(|line| line.starts_with('{'));
    let result: SimResult = serde_json::from_str(last.context("the simulator printed no result")?)
        .context("reading the simulator's result")?;
    let note =
        format!("{} seeds, {} events, {} violations", result.seeds, result.events, result.violations.len());
    let good = result.ok && watched.succeeded && result.seeds >= seeds;
    Ok(if good { Outcome::passed(note) } else { Outcome::failed(note) })
}
