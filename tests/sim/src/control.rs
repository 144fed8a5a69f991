//! The model of the control plane: wants the machine moved, retries, and settles doubts by fence and reclaim. Its steps are
//! durable and each is repeated until answered, so that its own crashes look like a time without answers.

use wire::ids::{Epoch, HostName, MachineId, MigrationId};
use wire::migration::convergence::Policy;
use wire::migration::source::{SourceConfig, SourceLimits};
use wire::migration::target::{TargetConfig, TargetLimits};
use wire::units::RamSize;
use wire::vmm::{BootSpec, CpuProfile, FileRef, MachineSpec};

use crate::options::Mutation;
use crate::rng::Rng;
use crate::world::{Event, FAULTS_US, Side, World, trace};

/// Commands.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "as in wire::fleet::Command")]
pub enum Request {
    Prepare { config: Box<TargetConfig> },
    Migrate { config: Box<SourceConfig> },
    Inquire { migration: MigrationId },
    Cancel { migration: MigrationId },
    Reclaim { migration: MigrationId, epoch: Epoch },
    TargetOwns { migration: MigrationId, epoch: Epoch },
    Forget { migration: MigrationId },
    Fence { epoch: Epoch },
}

/// Where a migration stands on its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Under way.
    Moving,
    /// Given away, and nothing known.
    InDoubt,
    /// The target runs it.
    Moved,
    /// Ended, the machine runs here.
    Stayed,
    /// The guest is dead.
    NoGuest,
    /// Not known here, because another one is under way: a command that came late began it after all.
    Other {
        /// Which.
        migration: MigrationId,
        /// Its target's epoch.
        to_epoch: Epoch,
    },
    /// Not known here; the machine is, under this epoch.
    Unknown {
        /// The epoch.
        epoch: Epoch,
    },
}

/// Answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in wire::fleet::Answer")]
pub enum Response {
    Prepared { migration: MigrationId, ok: bool },
    Standing { migration: MigrationId, standing: Standing },
    Forgotten { migration: MigrationId, gone: bool },
    Fenced { epoch: Epoch },
    Owns { epoch: Epoch },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Prepare,
    Watch,
    Forget,
    Fence,
    Reclaim(Epoch),
    TellOwns,
    FenceForDead,
    Moved,
    Lost,
}

/// The control plane.
#[derive(Debug)]
pub struct Control {
    step: Step,
    migration: MigrationId,
    newest: u64,
    owner_epoch: Epoch,
    to_epoch: Epoch,
    highest: Epoch,
    doubt_since: Option<u64>,
    unknown: u32,
    /// Whether the source said in so many words that the migration ended and the machine is its own; else it was only
    /// silent about it, and a command still on its way may yet begin it.
    stayed: bool,
    spec: MachineSpec,
    hosts: (HostName, HostName),
    lanes: (u16, u16),
    policy: Policy,
    limits: (SourceLimits, TargetLimits),
    patience_us: u64,
    /// Until when it is down.
    pub down_until: u64,
}

fn spec() -> MachineSpec {
    let label = |text: &str| text.parse().unwrap_or_else(|_| unreachable!("a literal label"));
    MachineSpec {
        id: MachineId::from_u64(7),
        name: label("m"),
        vcpus: 1,
        ram: RamSize::from_bytes(16 << 20).unwrap_or_else(|_| unreachable!("a literal size")),
        mac: [2, 0, 0, 0, 0, 1],
        ip4: [198, 19, 0, 2],
        ip6: [0; 16],
        boot: BootSpec {
            kernel: FileRef::Path(String::new()),
            initrd: None,
            cmdline: String::new(),
            guest_config: Vec::new(),
        },
        cpu: CpuProfile { name: String::new(), features: Vec::new(), tsc_khz: 0 },
        disks: Vec::new(),
    }
}

impl Control {
    /// Wants the machine moved; how patient all are, and how many lanes, is drawn.
    pub fn new(rng: &mut Rng) -> Self {
        let label = |text: &str| text.parse().unwrap_or_else(|_| unreachable!("a literal label"));
        let source = SourceLimits {
            unreachable_us: rng.between(50_000, 300_000),
            retry_first_us: rng.between(500, 5_000),
            retry_most_us: 30_000,
            switchover_us: rng.between(3_000, 60_000),
        };
        let target =
            TargetLimits { expect_us: rng.between(50_000, 400_000), keep_us: rng.between(20_000, 300_000) };
        Self {
            step: Step::Prepare,
            migration: MigrationId::from_u64(1),
            newest: 1,
            owner_epoch: Epoch::FIRST,
            to_epoch: Epoch(2),
            highest: Epoch(2),
            doubt_since: None,
            unknown: 0,
            stayed: false,
            spec: spec(),
            hosts: (label("a"), label("b")),
            lanes: (
                u16::try_from(rng.between(1, 4)).unwrap_or(1),
                u16::try_from(rng.between(1, 4)).unwrap_or(1),
            ),
            policy: Policy {
                downtime_budget_us: rng.between(500, 3_000),
                fixed_us: 100,
                rounds_max: u32::try_from(rng.between(1, 8)).unwrap_or(4),
                stall_rounds: 2,
                hard_cap_us: None,
            },
            limits: (source, target),
            patience_us: rng.between(5_000, 80_000),
            down_until: 0,
        }
    }

    /// The migration wanted now.
    pub const fn migration(&self) -> MigrationId {
        self.migration
    }

    /// The target's epoch.
    pub const fn to_epoch(&self) -> Epoch {
        self.to_epoch
    }

    /// Whether nothing is left to do.
    pub const fn finished(&self) -> bool {
        matches!(self.step, Step::Moved | Step::Lost)
    }

    /// Whether the machine moved.
    pub const fn moved(&self) -> bool {
        matches!(self.step, Step::Moved)
    }

    /// For messages.
    pub fn step_name(&self) -> String {
        format!("{:?} of {}", self.step, self.migration)
    }

    fn raise(&mut self) -> Epoch {
        self.highest = self.highest.next();
        self.highest
    }

    fn again(&mut self) {
        self.newest += 1;
        self.migration = MigrationId::from_u64(self.newest);
        self.to_epoch = self.raise();
        self.doubt_since = None;
        self.unknown = 0;
        self.stayed = false;
        self.step = Step::Prepare;
    }

    fn target_config(&self) -> TargetConfig {
        let (source, _) = self.hosts.clone();
        let mut config =
            TargetConfig::new(self.migration, self.spec.clone(), self.to_epoch, source, self.lanes.1);
        config.limits = self.limits.1;
        config
    }

    fn source_config(&self) -> SourceConfig {
        let epochs = (self.owner_epoch, self.to_epoch);
        let mut config =
            SourceConfig::new(self.migration, self.spec.clone(), epochs, self.hosts.clone(), self.lanes.0);
        config.policy = self.policy;
        config.limits = self.limits.0;
        config
    }
}

impl World {
    /// Sends a command: lost, late or doubled like anything else.
    pub fn command(&mut self, side: Side, request: Request) {
        let lossy = self.now < FAULTS_US && self.options.duplicates;
        let daemon = match side {
            Side::Source => self.source.starts,
            Side::Target => self.target.starts,
        };
        if lossy && self.rng.chance(3) {
            let at = self.now + self.rng.between(1_000, 200_000);
            self.at(at, Event::Command { side, daemon, request: request.clone() });
        }
        if !(lossy && self.rng.chance(5)) {
            let at = self.now + self.rng.between(100, 2_000);
            self.at(at, Event::Command { side, daemon, request });
        }
    }

    /// Sends an answer to the control plane.
    pub fn respond(&mut self, response: Response) {
        let lossy = self.now < FAULTS_US && self.options.duplicates;
        if !(lossy && self.rng.chance(5)) {
            let at = self.now + self.rng.between(100, 2_000);
            self.at(at, Event::Answer { response });
        }
    }

    /// Says again whatever has no answer.
    pub fn control_tick(&mut self) {
        let next = self.now + self.rng.between(2_000, 8_000);
        self.at(next, Event::ControlTick);
        if self.now < self.control.down_until {
            return;
        }
        let (migration, epoch) = (self.control.migration, self.control.to_epoch);
        match self.control.step {
            Step::Prepare => {
                let config = Box::new(self.control.target_config());
                self.command(Side::Target, Request::Prepare { config });
            }
            Step::Watch => self.command(Side::Source, Request::Inquire { migration }),
            Step::Forget => self.command(Side::Target, Request::Forget { migration }),
            Step::Fence | Step::FenceForDead => self.command(Side::Target, Request::Fence { epoch }),
            Step::Reclaim(epoch) => {
                self.command(Side::Source, Request::Reclaim { migration, epoch });
                self.command(Side::Source, Request::Inquire { migration });
            }
            Step::TellOwns => {
                self.command(Side::Source, Request::TargetOwns { migration, epoch });
                self.command(Side::Source, Request::Inquire { migration });
            }
            Step::Moved | Step::Lost => {}
        }
    }

    /// An answer arrives.
    pub fn control_answer(&mut self, response: Response) {
        if self.now < self.control.down_until {
            return;
        }
        let control = &mut self.control;
        let before = control.step;
        match (control.step, response) {
            (Step::Prepare, Response::Prepared { migration, ok }) if migration == control.migration => {
                if ok {
                    control.step = Step::Watch;
                    let config = Box::new(control.source_config());
                    self.command(Side::Source, Request::Migrate { config });
                } else {
                    control.step = Step::Forget;
                }
            }
            (Step::Watch | Step::Reclaim(_) | Step::TellOwns, Response::Standing { migration, standing })
                if migration == control.migration =>
            {
                self.control_standing(standing);
            }
            (Step::Forget, Response::Forgotten { migration, gone }) if migration == control.migration => {
                if gone {
                    control.again();
                } else if !control.stayed {
                    control.step = Step::Watch;
                    control.unknown = 0;
                } else {
                    self.violation("invariant 1: the source has the machine, and the target owns it");
                }
            }
            (Step::Fence, Response::Fenced { epoch }) if epoch == control.to_epoch => {
                let epoch = control.raise();
                control.step = Step::Reclaim(epoch);
            }
            (Step::Fence, Response::Owns { epoch }) if epoch == control.to_epoch => {
                control.step = Step::TellOwns
            }
            (Step::FenceForDead, Response::Fenced { epoch }) if epoch == control.to_epoch => {
                control.step = Step::Lost;
            }
            (Step::FenceForDead, Response::Owns { epoch }) if epoch == control.to_epoch => {
                control.step = Step::Moved;
            }
            _ => {}
        }
        if self.control.step != before {
            trace!(self, "control plane: {}", self.control.step_name());
        }
    }

    fn control_standing(&mut self, standing: Standing) {
        let mutation = self.options.mutation;
        let now = self.now;
        let control = &mut self.control;
        match (control.step, standing) {
            (Step::Watch, Standing::InDoubt) => {
                let since = *control.doubt_since.get_or_insert(now);
                if now >= since + control.patience_us {
                    control.step = if mutation == Some(Mutation::ReclaimWithoutFence) {
                        let epoch = control.raise();
                        Step::Reclaim(epoch)
                    } else {
                        Step::Fence
                    };
                }
            }
            (Step::Watch | Step::TellOwns, Standing::Moved) => control.step = Step::Moved,
            (Step::Watch, Standing::Stayed) => {
                control.stayed = true;
                control.step = Step::Forget;
            }
            (Step::Watch, Standing::NoGuest) => control.step = Step::FenceForDead,
            // First things first: that one is settled before another is begun.
            (Step::Watch, Standing::Other { migration, to_epoch }) => {
                control.migration = migration;
                control.to_epoch = to_epoch;
                control.doubt_since = None;
            }
            (Step::Watch, Standing::Unknown { epoch }) => {
                control.owner_epoch = epoch;
                control.unknown += 1;
                if control.unknown > 3 {
                    control.step = Step::Forget;
                } else {
                    let config = Box::new(control.source_config());
                    self.command(Side::Source, Request::Migrate { config });
                }
            }
            (Step::Reclaim(epoch), Standing::Stayed | Standing::Unknown { .. }) => {
                control.owner_epoch = epoch;
                control.stayed = true;
                control.step = Step::Forget;
            }
            (Step::Reclaim(_), Standing::NoGuest) => control.step = Step::Lost,
            (Step::Reclaim(_), Standing::Moved) => self.violation("reclaimed what the target runs"),
            (Step::TellOwns, Standing::NoGuest) => control.step = Step::Moved,
            _ => {}
        }
    }
}
