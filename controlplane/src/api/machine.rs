//! Machines as the API shows and takes them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use wire::ids::{HostName, MachineId, MachineName, MigrationId};

use super::migration::{Phase, Progress};
use super::{text, text_option};

/// Body of `POST /v1/machines`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchRequest {
    /// Name, unique in the fleet; made up when absent.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u32,
    /// RAM in bytes: a multiple of 2 MiB, from 16 MiB.
    pub ram_bytes: u64,
    /// Kernel (PVH ELF) on the host; the control plane's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Initial RAM disk on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line, at most 1024 bytes; network and devices are appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Image to make it from, by name; it brings its own kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Size of its root disk in bytes, a multiple of 2 MiB; the image's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// SSH public keys that may log in as root (images only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// Environment of the guest's first process (images only).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// User data for cloud-init, base64 (images only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data_base64: Option<String>,
    /// What to run in an image without an init of its own, instead of what the image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// CPU that the guest sees: `host` (the default), `x86-64-v2`, `x86-64-v3` or `x86-64-v4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Host to run on; chosen by free RAM and vCPUs when absent.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// First launch is under way.
    Creating,
    /// A stopped or failed machine is being started.
    Starting,
    /// It runs (also while it migrates).
    Started,
    /// It is being stopped.
    Stopping,
    /// It does not run; its RAM is gone, name and addresses stay.
    Stopped,
    /// It does not run, and that was not asked for; `reason` says why.
    Failed,
    /// It is being removed.
    Destroying,
    /// It is gone. Seen only as the answer to a wait or a delete.
    Destroyed,
    /// It ran when its host was last heard of; the host is lost from sight now.
    Unknown,
}

impl MachineState {
    /// The text used in JSON, queries and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Destroying => "destroying",
            Self::Destroyed => "destroyed",
            Self::Unknown => "unknown",
        }
    }

    /// All states.
    pub const ALL: [Self; 9] = [
        Self::Creating,
        Self::Starting,
        Self::Started,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Destroying,
        Self::Destroyed,
        Self::Unknown,
    ];
}

impl std::str::FromStr for MachineState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|state| state.as_str()).collect();
            format!("`{text}` is not a machine state; use one of {}", known.join(", "))
        })
    }
}

impl std::fmt::Display for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a machine failed or stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// For programs: snake case, stable.
    pub code: String,
    /// For people.
    pub detail: String,
}

/// A machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Its id, for life.
    #[serde(with = "text")]
    pub id: MachineId,
    /// Its name.
    #[serde(with = "text")]
    pub name: MachineName,
    /// What it does.
    pub state: MachineState,
    /// Why it failed or stopped, if it did so by itself.
    pub reason: Option<Reason>,
    /// The host that owns it, if any.
    #[serde(with = "text_option")]
    pub host: Option<HostName>,
    /// Ownership epoch; grows with each move.
    pub epoch: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM.
    pub ram_bytes: u64,
    /// IPv4 address, the machine's for life.
    pub ip4: Ipv4Addr,
    /// IPv6 address, the machine's for life.
    pub ip6: Ipv6Addr,
    /// MAC address, colon-separated.
    pub mac: String,
    /// Kernel on the host.
    pub kernel: String,
    /// Initial RAM disk on the host.
    pub initrd: Option<String>,
    /// Kernel command line as given.
    pub cmdline: String,
    /// The image it was made from.
    pub image: Option<String>,
    /// Size of its root disk, if it has one.
    pub disk_bytes: Option<u64>,
    /// CPU profile.
    pub cpu: String,
    /// When it was created.
    pub created_unix_ms: u64,
    /// When its guest was last booted; a move does not change it.
    pub started_unix_ms: Option<u64>,
    /// Since then, while it runs.
    pub uptime_ms: Option<u64>,
    /// The migration it is in, if any.
    pub migration: Option<MigrationRef>,
}

/// A machine's migration, in short.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationRef {
    /// Its id; see `/v1/migrations/{id}`.
    #[serde(with = "text")]
    pub id: MigrationId,
    /// Where the machine goes.
    #[serde(with = "text")]
    pub target: HostName,
    /// Its phase.
    pub phase: Phase,
    /// How far it is, once it runs.
    pub progress: Option<Progress>,
}

/// A page of machines, ordered by id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineList {
    /// The machines.
    pub machines: Vec<Machine>,
    /// Give it as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Body of `POST /v1/machines/{id}/stop`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// End it at once instead of asking its guest to shut down.
    #[serde(default)]
    pub force: bool,
    /// How long the guest has to shut down before it is ended, in milliseconds; 30 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// All images, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageList {
    /// The images.
    pub images: Vec<image::manifest::Manifest>,
}
