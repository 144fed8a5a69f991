//! Hosts as the API shows them.

use serde::{Deserialize, Serialize};
use wire::ids::HostName;

use super::text;

/// Whether a host is in sight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// It is connected and sends heartbeats.
    Online,
    /// Known, not heard of since the control plane started or for less than three heartbeats.
    Connecting,
    /// Silent for three heartbeats. Its machines may well be running.
    Lost,
}

impl HostState {
    /// The text used in JSON and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Connecting => "connecting",
            Self::Lost => "lost",
        }
    }
}

/// A host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// Its name, as in its certificate.
    #[serde(with = "text")]
    pub name: HostName,
    /// Whether it is in sight.
    pub state: HostState,
    /// Release of its daemon.
    pub release: String,
    /// RAM that machines may use in all; absent until its first heartbeat.
    pub ram_bytes: Option<u64>,
    /// RAM that nothing has, reservations of the control plane already taken off.
    pub ram_free_bytes: Option<u64>,
    /// Physical CPUs.
    pub cpus: Option<u32>,
    /// vCPUs of the machines placed here.
    pub vcpus_used: u32,
    /// Machines placed here.
    pub machines: u32,
    /// TSC frequency.
    pub tsc_khz: Option<u32>,
    /// CPU features, named as in `/proc/cpuinfo`, sorted.
    pub cpu_features: Vec<String>,
    /// Since it was last heard of; absent if not since the control plane started.
    pub last_heard_ms_ago: Option<u64>,
}

/// All hosts, ordered by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostList {
    /// The hosts.
    pub hosts: Vec<Host>,
}
