//! `fleet.json`, the sign that a fleet came up completely, and what the API says of its hosts.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::layout::{FleetName, Host};

/// Content of `fleet.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) hosts: Vec<Host>,
}

/// Writes the record; the last step of `up`.
pub(crate) fn write(fleet: &FleetName, record: &Record) -> Result<()> {
    let path = fleet.state_dir().join("fleet.json");
    let text = serde_json::to_string_pretty(record).context("writing a fleet's record")?;
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// The record, unless there is none or it cannot be read (then the fleet did not come up completely).
pub(crate) fn read(fleet: &FleetName) -> Option<Record> {
    let text = std::fs::read_to_string(fleet.state_dir().join("fleet.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// How many hosts are in sight, in the output of `mashines host ls --json`.
pub(crate) fn online_hosts(text: &str) -> usize {
    let Ok(list) = serde_json::from_str::<serde_json::Value>(text) else { return 0 };
    let hosts = list.as_array().or_else(|| list.get("hosts").and_then(|hosts| hosts.as_array()));
    let online =
        |host: &&serde_json::Value| host.get("state").and_then(|state| state.as_str()) == Some("online");
    hosts.map_or(0, |hosts| hosts.iter().filter(online).count())
}
