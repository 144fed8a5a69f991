//! What `mashined` and a `mashine-vmm` process say to each other.
//!
//! A Unix stream socket that `mashined` made listening and passed as descriptor 3 carries [`frame`](crate::frame)s. The
//! VMM serves one connection at a time; at end of file it keeps the guest as it is and accepts the next, which is how a
//! restarted `mashined` adopts a running machine. Requests are answered in order, one [`Reply`] each, with the request's
//! `seq`. [`Notice`]s come unasked, with `seq` 0. Descriptors travel as `SCM_RIGHTS` with the first byte of their frame,
//! in the order the message lists them.
//!
//! Connections to vsock ports of the guest come in over a second listening Unix socket, passed as descriptor 4: whoever connects sends the port (4 bytes,
//! little-endian), and gets the byte [`VSOCK_OPEN`] when the guest has accepted; from then on the socket carries the connection's
//! bytes. It is closed when the guest refuses, closes, or leaves this host. Without descriptor 4, nobody can connect.
//!
//! The VMM process is also the record of who owns the machine: after [`Request::Disown`] it never runs the guest again,
//! whatever else happens to `mashined`, unless a [`Request::Reclaim`] with a higher epoch arrives. That record needs no
//! disk, because it dies exactly when the memory it speaks of dies.

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]
#![allow(
    clippy::large_enum_variant,
    reason = "messages are built once, archived and dropped; none is stored in numbers"
)]

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{Digest, Epoch, HostName, MachineId, MachineName, MigrationId};
use crate::space::{DiskSize, PageSpace};
use crate::units::{PageIndex, RamSize};

/// Version of this protocol; both ends come from one release, but a restarted `mashined` may be newer than the VMM.
/// * 1: first.
/// * 2: disks, kernels as blobs, guest configuration; vsock, power button, balloon.
pub const VERSION: u16 = 2;

/// What the VMM says on a vsock connection when the guest has accepted it.
pub const VSOCK_OPEN: u8 = 0;

/// Longest kernel command line, in bytes (what Linux takes on x86).
pub const CMDLINE_BYTES_MAX: usize = 2047;

/// Size of the console ring memfd: a page of header, then the ring. See [`CONSOLE_RING_BYTES`].
pub const CONSOLE_MEMFD_BYTES: u64 = 4096 + CONSOLE_RING_BYTES;
/// Bytes of serial output that the ring keeps. The first 8 bytes of the header are the absolute offset (little-endian,
/// stored with release ordering after the data) of the next byte to be written; byte `n` lies at `4096 + n % CONSOLE_RING_BYTES`.
pub const CONSOLE_RING_BYTES: u64 = 1 << 20;

/// Who the machine is and how it looks: what stays the same wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct MachineSpec {
    /// The machine's id.
    pub id: MachineId,
    /// The machine's name.
    pub name: MachineName,
    /// Number of vCPUs, 1 to [`crate::units::VCPUS_MAX`].
    pub vcpus: u32,
    /// RAM.
    pub ram: RamSize,
    /// MAC address of its network interface.
    pub mac: [u8; 6],
    /// IPv4 address, in network order.
    pub ip4: [u8; 4],
    /// IPv6 address, in network order.
    pub ip6: [u8; 16],
    /// What to boot; also kept for a cold restart.
    pub boot: BootSpec,
    /// CPU profile the guest sees; see [`CpuProfile`].
    pub cpu: CpuProfile,
    /// Its writable disks, at most [`crate::space::DISKS_MAX`]; the first is the root.
    pub disks: Vec<DiskSpec>,
}

impl MachineSpec {
    /// All pages that move with the machine.
    pub fn space(&self) -> PageSpace {
        PageSpace::new(self.ram, self.disks.iter().map(|disk| disk.size))
    }
}

/// A writable disk: an overlay ([`crate::disk`]) over a base that stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct DiskSpec {
    /// What the guest reads as the disk's serial number, and the stem of its file's name: `root`.
    pub name: MachineName,
    /// Size.
    pub size: DiskSize,
    /// What lies under the overlay: a blob that is no longer than the disk. Each host finds it by its digest.
    pub base: Option<Digest>,
}

/// What to boot. The VMM only ever sees descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct BootSpec {
    /// The kernel.
    pub kernel: FileRef,
    /// The initial RAM disk.
    pub initrd: Option<FileRef>,
    /// Kernel command line; the network and device parameters are appended by the host and the VMM.
    pub cmdline: String,
    /// What the guest's init finds as `/mashines/config.json`: the host appends it to the initial RAM disk in an archive of its own. Empty for none;
    /// at most [`GUEST_CONFIG_BYTES_MAX`].
    pub guest_config: Vec<u8>,
}

/// Longest guest configuration, in bytes: user data included.
pub const GUEST_CONFIG_BYTES_MAX: usize = 256 << 10;

/// Where a host finds a file.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FileRef {
    /// At this path of its own.
    Path(String),
    /// Among its blobs, or else the control plane's.
    Blob(Digest),
}

impl std::fmt::Display for FileRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => f.write_str(path),
            Self::Blob(digest) => digest.fmt(f),
        }
    }
}

/// The CPU that a guest sees, by name and by the features it needs. A host that lacks one refuses the machine by that
/// feature's name.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct CpuProfile {
    /// `host` or the name of a fleet baseline.
    pub name: String,
    /// Linux `/proc/cpuinfo` names of the features the guest may use, sorted.
    pub features: Vec<String>,
    /// TSC frequency in kHz that the guest was told; 0 if the host has not said.
    pub tsc_khz: u32,
}

/// Requests of `mashined`.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Request {
    /// Always first on a connection. Answer: [`Reply::Hello`].
    Hello {
        /// Newest version the caller speaks.
        version: u16,
    },
    /// Creates the VM: memory slots, chips, vCPUs, devices; nothing runs. Descriptors: `/dev/kvm`, RAM memfd, dirty bitmap
    /// memfd (a bit for each page of [`MachineSpec::space`]), console memfd, tap, and for each disk its overlay and, if it has one, its base (in this order);
    /// without the tap, the machine has no network interface. The tap is made non-blocking. Allowed in [`Phase::Empty`]. Answer: [`Reply::Done`]. Takes some 10 ms: do it before a pause.
    Create(MachineSpec),
    /// Loads a kernel: descriptors kernel and, if `initrd`, the initial RAM disk. RAM must be all zero. Allowed in [`Phase::Created`].
    /// Answer: [`Reply::Done`]; the phase becomes [`Phase::Paused`]. After [`Code::BadKernel`], RAM may hold part of the file.
    Boot {
        /// Whether a second descriptor follows.
        initrd: bool,
        /// Full kernel command line but for the device parameters, which the VMM appends.
        cmdline: String,
    },
    /// Loads a state archive ([`crate::state`]) into a created VM whose RAM `mashined` has filled or is filling. Allowed in [`Phase::Created`].
    /// Answer: [`Reply::Done`]; the phase becomes [`Phase::Paused`].
    Restore(Vec<u8>),
    /// Runs the vCPUs and devices. Allowed in [`Phase::Paused`]; refused with [`Code::Disowned`] after a disowning, and with
    /// [`Code::StaleEpoch`] when `epoch` is below the highest the VMM has seen. Running already with this epoch: `Done` again.
    Run {
        /// The epoch under which the caller owns the machine.
        epoch: Epoch,
    },
    /// Stops all vCPUs and devices; afterwards neither touches RAM. Answer: [`Reply::Paused`]. With `harvest`, the KVM
    /// dirty log has also been published to the shared bitmap (if it is on), and saving has begun, so that a [`Request::Save`] that follows finds
    /// most of its work done. Paused already: the same answer again. A guest that ends in the same moment: [`Code::WrongPhase`].
    Pause {
        /// Whether to publish the dirty log and begin to save.
        harvest: bool,
    },
    /// Saves all state that the guest can observe. Allowed in [`Phase::Paused`]. Answer: [`Reply::State`].
    Save,
    /// Switches dirty logging on or off. On (also when it is on already): all pages of RAM count as dirty, so that the first pass sends everything, and the
    /// shared bitmap is cleared, but for the blocks that the overlays of disks hold. Blocks that are written later are marked at once. Allowed in any phase from `Created`. Answer: [`Reply::Done`].
    DirtyLog {
        /// On or off.
        on: bool,
    },
    /// Takes a snapshot of the KVM dirty log without clearing it, and starts a round with it. Answer: [`Reply::Dirty`] with the
    /// number of pages dirty in the log or in the shared bitmap.
    DirtySync,
    /// For pages `first .. first + count`: clears those bits of the last snapshot in KVM's log (write-protecting them again) and only then publishes
    /// them in the shared bitmap. Answer: [`Reply::Dirty`] with the number of bits published. Devices wait meanwhile: ask for some chunks at a time.
    DirtyTake {
        /// First page; a multiple of 64.
        first: PageIndex,
        /// Number of pages, a multiple of 64.
        count: u64,
    },
    /// Gives the machine away: records the migration and the epoch, and refuses every later `Run`. Allowed in [`Phase::Paused`]. Answer: `Done`,
    /// also when repeated with the same arguments.
    Disown(Disowned),
    /// Takes a disowned machine back under a higher epoch, on the control plane's word that the target will never run it. Answer: `Done`,
    /// also when repeated with the same epoch.
    Reclaim {
        /// The new epoch; must be above the disowned one.
        epoch: Epoch,
    },
    /// Who are you, what do you hold. Answer: [`Reply::Description`], with the descriptors RAM, dirty bitmap, console, tap, and those of the disks as in [`Request::Create`] if the machine is created.
    Describe,
    /// Writes to the guest's serial input. Answer: `Done`; [`Code::BadArgument`] when the guest has left 64 KiB unread.
    SerialInput(Vec<u8>),
    /// Ends the process after the answer `Done`. The guest is gone.
    Quit,
    /// Presses the guest's power button: a guest with ACPI shuts down by itself, and says so by [`Notice::GuestEnded`]. Allowed in
    /// [`Phase::Paused`] (the guest sees it when it runs) and [`Phase::Running`]. Answer: [`Reply::Done`], which says nothing about what the guest makes of it.
    PowerButton,
    /// What the guest says of its memory through its balloon. Answer: [`Reply::Balloon`].
    BalloonStats,
}

/// The record of a machine given away.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Disowned {
    /// Under which epoch the target owns the machine.
    pub epoch: Epoch,
    /// By which migration.
    pub migration: MigrationId,
    /// To which host.
    pub target: HostName,
}

/// Where in its life the VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug, PartialEq))]
pub enum Phase {
    /// The process waits for [`Request::Create`].
    Empty,
    /// The VM exists; its vCPUs have no state yet.
    Created,
    /// State is loaded; nothing runs.
    Paused,
    /// vCPUs run.
    Running,
    /// Given away; nothing runs, and nothing will unless reclaimed.
    Disowned,
    /// The guest has ended; see [`Notice::GuestEnded`].
    Ended,
}

/// Answers of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// Version that both ends use from here on.
        version: u16,
        /// The VMM's phase.
        phase: Phase,
    },
    /// Done; nothing more to say.
    Done,
    /// To [`Request::Pause`].
    Paused {
        /// From the request until the last vCPU and device had stopped, in microseconds.
        stop_us: u64,
        /// Harvesting the dirty log, in microseconds; 0 without `harvest`.
        harvest_us: u64,
        /// Pages set in the shared bitmap; 0 without `harvest`.
        dirty_pages: u64,
    },
    /// To [`Request::Save`]: a state archive.
    State(Vec<u8>),
    /// To [`Request::DirtySync`] and [`Request::DirtyTake`].
    Dirty {
        /// Pages.
        pages: u64,
    },
    /// To [`Request::Describe`]. Descriptors follow if `spec` is there.
    Description {
        /// What was created, if anything.
        spec: Option<MachineSpec>,
        /// The phase.
        phase: Phase,
        /// Highest epoch seen.
        epoch: Epoch,
        /// The record of giving it away.
        disowned: Option<Disowned>,
        /// Whether dirty logging is on.
        dirty_log: bool,
        /// Why the guest ended, in phase `Ended`.
        ended: Option<GuestEnd>,
    },
    /// The request was refused or failed; the phase is as it was.
    Refused {
        /// For programs.
        code: Code,
        /// For people: one line, with the remedy where there is one.
        detail: String,
    },
    /// To [`Request::BalloonStats`].
    Balloon(BalloonReport),
}

/// What a guest's balloon says (virtio 1.2, section 5.5.6.3). A guest without a driver, or one that has not answered yet, says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct BalloonReport {
    /// All memory, in bytes.
    pub total_bytes: Option<u64>,
    /// Free memory, in bytes.
    pub free_bytes: Option<u64>,
    /// What could be given to programs without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Caches of disks, in bytes.
    pub caches_bytes: Option<u64>,
    /// Given back to the host as free since the machine began to run here, in bytes (free page reporting).
    pub reported_bytes: u64,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Code {
    /// Not allowed in this phase.
    WrongPhase,
    /// The machine was given away.
    Disowned,
    /// The epoch is below one already seen.
    StaleEpoch,
    /// The kernel file cannot be booted.
    BadKernel,
    /// A state archive cannot be read or does not fit the VM.
    BadState,
    /// An argument is out of range.
    BadArgument,
    /// KVM or the operating system failed.
    Host,
}

/// What the VMM says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Notice {
    /// The guest ended by itself. Said once; [`Reply::Description`] repeats it.
    GuestEnded(GuestEnd),
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum GuestEnd {
    /// It powered off.
    PowerOff,
    /// It asked for a reset, or a triple fault did.
    Reset,
    /// It said that it panicked.
    Panic,
    /// KVM could not go on; one line.
    Crash(String),
}

/// What travels from `mashined` to the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ToVmm {
    /// Chosen by the caller, repeated in the answer; never 0.
    pub seq: u32,
    /// The request.
    pub request: Request,
}

/// What travels from the VMM to `mashined`.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FromVmm {
    /// The answer to request `seq`.
    Reply {
        /// The request's number.
        seq: u32,
        /// The answer.
        reply: Reply,
    },
    /// Unasked.
    Notice(Notice),
}

#[cfg(test)]
mod tests;
