//! What the store keeps, as the core works with it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use wire::ids::{Digest, Epoch, HostName, MachineId, MachineName, MigrationId, StateId};
use wire::space::DiskSize;
use wire::vmm::DiskSpec;

use crate::api::machine::Reason;
use crate::api::{text, text_option};
use crate::saga;

/// Serde of an epoch as a number.
pub(crate) mod epoch {
    use serde::{Deserialize, Deserializer, Serializer};
    use wire::ids::Epoch;

    pub(crate) fn serialize<S: Serializer>(epoch: &Epoch, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(epoch.0)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Epoch, D::Error> {
        u64::deserialize(deserializer).map(Epoch)
    }
}

/// Counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Starts of the control plane so far; the high half of command numbers, so that they never repeat.
    pub generation: u32,
    /// Id of the newest event.
    pub event_id: u64,
    /// Migrations so far.
    pub migration_sequence: u64,
    /// Where the search for a free address begins; moves on, so that an address is not given out again soon.
    pub address_cursor: u32,
}

/// What to boot, from the launch request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Kernel on the host.
    pub kernel: String,
    /// Initial RAM disk on the host.
    pub initrd: Option<String>,
    /// Kernel command line as given.
    pub cmdline: String,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name, a label.
    #[serde(with = "text")]
    pub name: MachineName,
    /// Its size, a valid [`wire::space::DiskSize`].
    pub bytes: u64,
    /// The blob under it.
    #[serde(with = "text_option")]
    pub base: Option<Digest>,
}

impl DiskRecord {
    /// What hosts are told of it; `None` for a size that no disk can have, which is never kept.
    pub fn spec(&self) -> Option<DiskSpec> {
        let size = DiskSize::from_bytes(self.bytes).ok()?;
        Some(DiskSpec { name: self.name.clone(), size, base: self.base })
    }
}

/// What a guest's init and agent are told at boot; see the guest contract in docs/guests.md.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Whether the machine was made from an image, whose init reads a configuration.
    pub configured: bool,
    /// Public keys that may log in as root.
    pub ssh_keys: Vec<String>,
    /// Environment of the image's first process.
    pub env: BTreeMap<String, String>,
    /// User data for cloud-init, base64.
    pub user_data_base64: Option<String>,
    /// What to run when the image has no init of its own.
    pub entrypoint: Option<Vec<String>>,
}

/// The CPU the guest sees: that of the host it was booted on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Name of the profile.
    #[serde(default = "Cpu::host")]
    pub profile: String,
    /// Features it may use, sorted.
    pub features: Vec<String>,
    /// TSC frequency it was told.
    pub tsc_khz: u32,
}

impl Cpu {
    /// The profile of records that do not say.
    fn host() -> String {
        wire::cpu::Profile::Host.name().to_owned()
    }
}

/// A guest that was asked to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Button {
    /// Whether its host has pressed the power button.
    pub pressed: bool,
    /// When it is ended if it has not by itself.
    pub until_unix_ms: u64,
}

/// Where a machine is in its life.
///
/// ```text
/// launch --> Creating --Done--> Started <--Done-- Starting <-- start
///               |                  |                  |          ^
///            refused       stop, guest ended,      refused       |
///               v           rm --force                v          |
///            Failed            Stopping            Failed --------+
///               |             /    |   \                          |
///               |       Failed  Stopped  Gone        Stopped -----+
///               +--rm--> Gone <-rm-'
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Lifecycle {
    /// First launch.
    Creating,
    /// Launch of a stopped machine.
    Starting,
    /// Its vCPUs run, as far as is known.
    Started,
    /// Its console is saved, then its VMM ended.
    Stopping {
        /// What it becomes.
        then: Ending,
        /// Whether the console has been saved (or cannot be).
        console_saved: bool,
    },
    /// No host has it.
    Stopped,
    /// No host has it, and that was not asked for.
    Failed,
    /// Removed for its owner; kept until the last host has confirmed that it holds no copy.
    Gone,
}

/// What a machine becomes after it was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// [`Lifecycle::Stopped`].
    Stopped,
    /// [`Lifecycle::Failed`].
    Failed,
    /// [`Lifecycle::Gone`].
    Gone,
}

/// A copy that a host must still clear away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleanup {
    /// The host.
    #[serde(with = "text")]
    pub host: HostName,
    /// Highest epoch that may be cleared.
    #[serde(with = "epoch")]
    pub epoch: Epoch,
    /// Whether to leave it the forward period, in which late packets are passed on.
    pub forwarding: bool,
}

/// A guest that ended while its machine was being migrated; judged when it is known who owns the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedGuest {
    /// The host that said so.
    #[serde(with = "text")]
    pub host: HostName,
    /// The epoch it had there.
    #[serde(with = "epoch")]
    pub epoch: Epoch,
    /// Whether it ended by its own will.
    pub clean: bool,
    /// How.
    pub reason: Reason,
}

/// Where a machine's console output is found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsolePosition {
    /// Offset, over all boots, of the first byte of the present boot; also where the kept output of the last one ends.
    pub base: u64,
    /// Bytes kept of earlier boots, ending at `base`.
    pub kept_bytes: u64,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// Id.
    #[serde(with = "text")]
    pub id: MachineId,
    /// Name.
    #[serde(with = "text")]
    pub name: MachineName,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM, a valid [`wire::units::RamSize`].
    pub ram_bytes: u64,
    /// Its place in the address pools.
    pub address_index: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub ip4: Ipv4Addr,
    /// IPv6 address.
    pub ip6: Ipv6Addr,
    /// What to boot.
    pub boot: Boot,
    /// The image it was made from, by the name it had then.
    #[serde(default)]
    pub image: Option<String>,
    /// Its disks; the first is the root.
    #[serde(default)]
    pub disks: Vec<DiskRecord>,
    /// What its guest is told at boot besides its addresses.
    #[serde(default)]
    pub guest: Guest,
    /// The CPU it sees.
    pub cpu: Cpu,
    /// Where in its life it is.
    pub lifecycle: Lifecycle,
    /// Whether it was asked to shut down; only while it is started.
    #[serde(default)]
    pub button: Option<Button>,
    /// Why it failed or stopped by itself.
    pub reason: Option<Reason>,
    /// The host that has its disks, while no host owns it.
    #[serde(default, with = "text_option")]
    pub disks_on: Option<HostName>,
    /// The host that owns it (or is to); none while stopped or failed.
    #[serde(with = "text_option")]
    pub host: Option<HostName>,
    /// Epoch under which `host` owns it.
    #[serde(with = "epoch")]
    pub epoch: Epoch,
    /// Highest epoch ever given out for it; the next one is above.
    #[serde(with = "epoch")]
    pub epoch_burnt: Epoch,
    /// Its unfinished migration.
    #[serde(with = "text_option")]
    pub migration: Option<MigrationId>,
    /// Copies to clear away.
    pub cleanups: Vec<Cleanup>,
    /// A guest that ended during the migration.
    pub ended_guest: Option<EndedGuest>,
    /// Console output.
    pub console: ConsolePosition,
    /// When it was created.
    pub created_unix_ms: u64,
    /// When its guest was last booted.
    pub started_unix_ms: Option<u64>,
}

/// A host that has joined at least once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its name.
    #[serde(with = "text")]
    pub name: HostName,
    /// Release of its daemon when it last joined.
    pub release: String,
    /// Nonce of its daemon's start when it last joined.
    pub boot_nonce: u64,
    /// When it first joined.
    pub joined_unix_ms: u64,
}

/// A migration: the saga's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Id.
    #[serde(with = "text")]
    pub id: MigrationId,
    /// Grows with each migration; lists are ordered by it.
    pub sequence: u64,
    /// The machine.
    #[serde(with = "text")]
    pub machine: MachineId,
    /// Its name.
    #[serde(with = "text")]
    pub machine_name: MachineName,
    /// The source.
    #[serde(with = "text")]
    pub source: HostName,
    /// The target.
    #[serde(with = "text")]
    pub target: HostName,
    /// Epoch under which the target will own it; burnt when this record is made.
    #[serde(with = "epoch")]
    pub to_epoch: Epoch,
    /// Longest pause to aim for.
    pub downtime_budget_us: u64,
    /// Limit of the pre-copy; 0 for none.
    pub bandwidth_limit_bytes_per_s: u64,
    /// Where the saga is.
    pub state: saga::State,
    /// With what the target remembers this migration; `None` until it has prepared.
    #[serde(default, with = "text_option")]
    pub target_state: Option<StateId>,
    /// Whether somebody asked to cancel it.
    pub cancel_requested: bool,
    /// Whether the target must still be told to drop what it has.
    pub forget_target: bool,
    /// When it was asked for.
    pub requested_unix_ms: u64,
    /// When its turn came.
    pub started_unix_ms: Option<u64>,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
}

/// The answer that was given under an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyRecord {
    /// Method, path and body, as a 64-bit hash in hex; another request under the same key is refused.
    pub fingerprint: String,
    /// HTTP status.
    pub status: u16,
    /// `Location`, if there was one.
    pub location: Option<String>,
    /// The body.
    pub body: serde_json::Value,
    /// When.
    pub at_unix_ms: u64,
}
