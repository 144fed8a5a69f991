//! What `mashines … --json` answers, as far as the demos read it.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::command;

/// A machine.
#[derive(Debug, Deserialize)]
pub(crate) struct Machine {
    pub(crate) host: Option<String>,
    pub(crate) ip4: IpAddr,
    pub(crate) ip6: IpAddr,
}

#[derive(Debug, Deserialize)]
struct Answer {
    source: String,
    target: String,
    phase: String,
    timings: Option<Timings>,
}

/// A migration that succeeded.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) timings: Timings,
}

/// Where the time of a migration went, and what it sent.
#[derive(Debug, Deserialize)]
pub(crate) struct Timings {
    pub(crate) total_ms: u64,
    pub(crate) rounds: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) pages_sent: u64,
    pub(crate) pages_zero: u64,
    pub(crate) pause_us: u64,
    pub(crate) stop_us: u64,
    pub(crate) harvest_us: u64,
    pub(crate) final_copy_us: u64,
    pub(crate) save_us: u64,
    pub(crate) restore_us: u64,
    pub(crate) resume_us: u64,
    pub(crate) final_pages: u64,
    pub(crate) packets_held: u64,
}

/// Launches a machine with these options, besides `--json`.
///
/// # Errors
/// When it is not launched.
pub(crate) fn launch<'a>(
    mut cli: Command,
    options: impl IntoIterator<Item = &'a str>,
    say: &dyn Fn(&str),
) -> Result<Machine> {
    let text = command::read_told(cli.args(["launch", "--json"]).args(options), |line| say(line))?;
    parse("launch", &text)
}

/// Migrates a machine.
///
/// # Errors
/// When it does not succeed.
pub(crate) fn migrate(mut cli: Command, machine: &str, target: &str, say: &dyn Fn(&str)) -> Result<Moved> {
    let text =
        command::read_told(cli.args(["migrate", machine, "--to", target, "--json"]), |line| say(line))?;
    let Answer { source, target, phase, timings } = parse("migrate", &text)?;
    if phase != "succeeded" {
        bail!("the migration to {target} ended as {phase}: {text}");
    }
    let timings = timings.ok_or_else(|| anyhow!("a migration succeeded without timings: {text}"))?;
    Ok(Moved { source, target, timings })
}

fn parse<T: DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| format!("`mashines {what} --json` said {text}"))
}
