//! What the demo is asked for and what it answers.

use serde::{Deserialize, Serialize};

use crate::fleet::layout::FleetName;

/// What to demonstrate.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// RAM of the machine: a number of bytes, or with K, M or G behind it.
    #[arg(long, default_value = "1G", value_parser = parse_bytes)]
    pub memory: u64,
    /// Pages that the guest writes per second.
    #[arg(long, default_value_t = 20_000)]
    pub dirty: u64,
    /// Number of migrations, to and fro.
    #[arg(long, default_value_t = 2)]
    pub migrations: u32,
    /// Print one JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
    /// Name of the fleet that the demo makes.
    #[arg(long, default_value = "demo")]
    pub fleet: FleetName,
}

/// The object that `--json` prints. Other programs read it: fields are added, never changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DemoResult {
    /// Whether all is as it should be.
    pub ok: bool,
    /// RAM that the guest found.
    pub ram_bytes: u64,
    /// Rate at which the guest was asked to write pages.
    pub dirty_pages_per_s: u64,
    /// The migrations that succeeded.
    pub migrations: Vec<Migration>,
    /// Whether the echo connection broke.
    pub tcp_broken: bool,
    /// Segments that the client had to send again.
    pub packets_lost: u64,
    /// Pages of the guest that were not what it had written, over all checks.
    pub pages_wrong: u64,
    /// Whether the guest's uptime went on as if nothing had happened.
    pub uptime_unchanged: bool,
    /// What was left when everything had been taken down.
    pub leaks: Vec<String>,
}

/// One migration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// Host it left.
    pub from: String,
    /// Host it went to.
    pub to: String,
    /// From the command to the target running.
    pub total_ms: u64,
    /// On the wire, headers included.
    pub bytes_sent: u64,
    /// Rounds of copying, the final one included.
    pub rounds: u64,
    /// From the request to pause until the target ran.
    pub pause_us: u64,
    /// Largest time in which the guest did not run, by its own clock.
    pub gap_guest_us: u64,
    /// Largest time between two echoes at the client.
    pub gap_client_us: u64,
}

/// A size as people write it.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad = || {
        format!(
            "`{text}` is not a size: use a number of bytes, or one with K, M or G behind it, such as 512M"
        )
    };
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("K" | "KiB") => 10,
        Some("M" | "MiB") => 20,
        Some("G" | "GiB") => 30,
        _ => return Err(bad()),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_bytes("1G"), Ok(1 << 30));
        assert_eq!(parse_bytes("512M"), Ok(512 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for bad in ["", "G", "1T2", "-1G", "1g", "99999999999G"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_object_has_the_fields_that_others_read() {
        let value = serde_json::to_value(DemoResult {
            migrations: vec![Migration::default()],
            ..DemoResult::default()
        });
        let expected = serde_json::json!({
            "ok": false, "ram_bytes": 0, "dirty_pages_per_s": 0,
            "migrations": [{
                "from": "", "to": "", "total_ms": 0, "bytes_sent": 0, "rounds": 0, "pause_us": 0,
                "gap_guest_us": 0, "gap_client_us": 0
            }],
            "tcp_broken": false, "packets_lost": 0, "pages_wrong": 0, "uptime_unchanged": false, "leaks": []
        });
        assert_eq!(value.unwrap(), expected);
    }
}
