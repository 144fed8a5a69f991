//! What the Linux story is asked for and what it answers.

use serde::{Deserialize, Serialize};

/// What to tell.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Image of the machine, in the store that MASHINES_IMAGES names. By default one of Debian 12 with podman and PostgreSQL, or with
    /// `--short` of busybox, that is built first if the store lacks it.
    #[arg(long)]
    pub image: Option<String>,
    /// What runs the container in the image that is built: podman or dockerd.
    #[arg(long, default_value = Self::FLAVOUR, value_parser = ["podman", "dockerd"], conflicts_with_all = ["image", "short"])]
    pub flavour: String,
    /// RAM of the machine, as `mashines launch` takes it.
    #[arg(long)]
    pub memory: Option<String>,
    /// vCPUs of the machine.
    #[arg(long)]
    pub vcpus: Option<u32>,
    /// Number of migrations, to and fro; by default five, with `--short` one.
    #[arg(long)]
    pub migrations: Option<u32>,
    /// The form that CI runs: a small image, one boot, one command run in it, one migration.
    #[arg(long)]
    pub short: bool,
    /// Print one JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// The flavour that is built unless another one is asked for.
    pub const FLAVOUR: &str = "podman";

    /// How often it moves.
    pub fn migrations(&self) -> u32 {
        self.migrations.unwrap_or(if self.short { 1 } else { 5 })
    }
}

/// The object that `--json` prints. Other programs read it: fields are added, never changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoryResult {
    /// Whether all is as it should be.
    pub ok: bool,
    /// Release of the guest's kernel, by itself.
    pub kernel: String,
    /// From the command to launch it until a command could be run in it.
    pub boot_ms: u64,
    /// The migrations that succeeded.
    pub migrations: Vec<Migration>,
    /// Whether the boot id is what it was.
    pub boot_id_unchanged: bool,
    /// Whether every process that ran before the first migration runs after the last one.
    pub pids_unchanged: bool,
    /// Whether the ssh session went on, with nothing lost or doubled; null where the image has no ssh server.
    pub ssh_alive: Option<bool>,
    /// The same for the session in a terminal, by way of the agent; null where none was opened.
    pub enter_alive: Option<bool>,
    /// Transactions of pgbench that failed; null where the image has no PostgreSQL.
    pub pgbench_failed: Option<u64>,
    /// Lines of the guest's kernel about lock-ups, jumps of the clock, and devices.
    pub dmesg_bad: Vec<String>,
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
    /// Largest time between two answers that a client in the network got; null where no client could ask.
    pub gap_client_us: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_the_fields_that_others_read() {
        let value = serde_json::to_value(StoryResult {
            migrations: vec![Migration::default()],
            ssh_alive: Some(false),
            enter_alive: Some(false),
            pgbench_failed: Some(0),
            ..StoryResult::default()
        });
        let expected = serde_json::json!({
            "ok": false, "kernel": "", "boot_ms": 0,
            "migrations": [{
                "from": "", "to": "", "total_ms": 0, "bytes_sent": 0, "rounds": 0, "pause_us": 0, "gap_client_us": null
            }],
            "boot_id_unchanged": false, "pids_unchanged": false, "ssh_alive": false, "enter_alive": false,
            "pgbench_failed": 0, "dmesg_bad": []
        });
        assert_eq!(value.unwrap(), expected);
    }
}
