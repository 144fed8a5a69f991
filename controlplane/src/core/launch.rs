//! Creating machines: what a request must be, and what a machine is given for life.

use image::manifest::Manifest;
use wire::cpu::Profile;
use wire::ids::{Epoch, HostName, Label, MachineId};
use wire::units::{RamSize, VCPUS_MAX};
use wire::vmm::CMDLINE_BYTES_MAX;

use super::images::{self, Made};
use super::machines::bad_value;
use super::{Core, addresses};
use crate::api::{EventKind, LaunchRequest, Machine, Problem, ProblemCode};
use crate::placement::Demand;
use crate::store::records::{Boot, ConsolePosition, Cpu, Guest, Lifecycle, MachineRecord};

/// Longest command line a request may give: hosts append network and device parameters to it.
const CMDLINE_GIVEN_MAX: usize = CMDLINE_BYTES_MAX / 2;
/// Longest path on a host.
const PATH_BYTES_MAX: usize = 4096;

impl Core {
    /// Creates a machine and begins its launch; `image` is the one that the request names, if it does.
    ///
    /// # Errors
    /// A [`Problem`] that says which value is wrong, which name is taken, or why each host cannot take it.
    pub fn launch(&mut self, request: &LaunchRequest, image: Option<&Manifest>) -> Result<Machine, Problem> {
        let ram = check_shape(request)?;
        let made = match image {
            Some(image) => images::make(request, image)?,
            None => Made { boot: self.check_boot(request)?, disks: Vec::new(), guest: Guest::default() },
        };
        let id = self.new_machine_id()?;
        let name = match &request.name {
            Some(name) => self.check_name(name)?,
            None => made_up_name(id)?,
        };
        if let Some(host) = &request.host {
            self.check_host_known(host)?;
        }
        let profile: Profile = match &request.cpu {
            Some(name) => name.parse().map_err(|error: wire::cpu::UnknownProfile| {
                bad_value(error.to_string(), "take one of those")
            })?,
            None => Profile::Host,
        };
        let demand = Demand {
            features: profile.owned_features(),
            ram_bytes: ram.bytes(),
            vcpus: request.vcpus,
            only: request.host.clone(),
            ..Demand::default()
        };
        let host = self.place(&demand)?;
        let address = self.allocate_address()?;
        let record = MachineRecord {
            id,
            name: name.clone(),
            vcpus: request.vcpus,
            ram_bytes: ram.bytes(),
            address_index: address.index,
            mac: addresses::mac(id),
            ip4: address.ip4,
            ip6: address.ip6,
            boot: made.boot,
            image: request.image.clone(),
            disks: made.disks,
            guest: made.guest,
            disks_on: None,
            cpu: self.cpu_of(&host, profile),
            lifecycle: Lifecycle::Creating,
            button: None,
            reason: None,
            host: Some(host.clone()),
            epoch: Epoch::FIRST,
            epoch_burnt: Epoch::FIRST,
            migration: None,
            cleanups: Vec::new(),
            ended_guest: None,
            console: ConsolePosition::default(),
            created_unix_ms: self.now.unix_ms,
            started_unix_ms: None,
        };
        self.model.insert_machine(record);
        self.machine_event(id, EventKind::MachineCreated, format!("machine {name} is launched on {host}"));
        self.view_machine(id)
    }

    /// The CPU that a guest booted on the host sees.
    pub(super) fn cpu_of(&self, host: &HostName, profile: Profile) -> Cpu {
        let capacity = self.hosts.get(host).and_then(|runtime| runtime.capacity.as_ref());
        capacity
            .map(|capacity| Cpu {
                profile: profile.name().to_owned(),
                features: match profile {
                    Profile::Host => capacity.cpu_features.clone(),
                    baseline => baseline.owned_features(),
                },
                tsc_khz: capacity.tsc_khz,
            })
            .unwrap_or_else(|| Cpu { profile: profile.name().to_owned(), ..Cpu::default() })
    }

    fn check_name(&self, name: &Label) -> Result<Label, Problem> {
        if name.as_str().parse::<MachineId>().is_ok() {
            return Err(bad_value(
                format!("`{name}` looks like an id"),
                "choose a name that is not of the form m-0123456789abcdef",
            ));
        }
        match self.model.machine_named(name) {
            None => Ok(name.clone()),
            Some(taken) => Err(Problem::new(
                ProblemCode::NameTaken,
                format!("there is a machine `{name}` already"),
                format!("choose another name, or remove that machine with `mashines rm {name}`"),
            )
            .conflicting(taken)),
        }
    }

    fn check_boot(&self, request: &LaunchRequest) -> Result<Boot, Problem> {
        if request.disk_bytes.is_some()
            || !request.ssh_keys.is_empty()
            || !request.env.is_empty()
            || request.user_data_base64.is_some()
            || request.entrypoint.is_some()
        {
            return Err(bad_value(
                "a disk, keys, environment, user data or entry point without an image",
                "give --image NAME; `mashines image ls` lists them",
            ));
        }
        let kernel = request.kernel.clone().or_else(|| self.config.default_kernel.clone()).ok_or_else(|| {
            bad_value(
                "no kernel was given and the control plane has no default",
                "give --kernel FILE (a path on the host), or start mashines-control with --default-kernel",
            )
        })?;
        for path in [Some(&kernel), request.initrd.as_ref()].into_iter().flatten() {
            if !path.starts_with('/') || path.len() > PATH_BYTES_MAX || path.contains('\0') {
                return Err(bad_value(
                    format!("`{}` is not an absolute path", path.escape_debug()),
                    "give the path of the file on the host, starting with /",
                ));
            }
        }
        let cmdline = request.cmdline.clone().unwrap_or_default();
        if cmdline.len() > CMDLINE_GIVEN_MAX || cmdline.chars().any(char::is_control) {
            return Err(bad_value(
                format!("a kernel command line of {} bytes, or with control characters", cmdline.len()),
                format!("use at most {CMDLINE_GIVEN_MAX} bytes of printable text"),
            ));
        }
        Ok(Boot { kernel, initrd: request.initrd.clone(), cmdline })
    }

    fn new_machine_id(&self) -> Result<MachineId, Problem> {
        loop {
            let id = MachineId::from_u64(super::idempotency::random_u64()?);
            // The MAC address carries the low 40 bits only.
            let same_mac = |other: &MachineRecord| other.mac == addresses::mac(id);
            if !self.model.machines().any(|other| other.id == id || same_mac(other)) {
                return Ok(id);
            }
        }
    }
}

fn check_shape(request: &LaunchRequest) -> Result<RamSize, Problem> {
    if !(1..=VCPUS_MAX).contains(&request.vcpus) {
        return Err(bad_value(format!("{} vCPUs", request.vcpus), format!("give 1 to {VCPUS_MAX} vCPUs")));
    }
    RamSize::from_bytes(request.ram_bytes).map_err(|error| {
        bad_value(error.to_string(), "give a multiple of 2 MiB from 16M to 1T, for example --memory 1G")
    })
}

/// `m` and the low half of the id: readable, a label, and not of the form of an id.
fn made_up_name(id: MachineId) -> Result<Label, Problem> {
    let name = format!("machine-{:08x}", id.as_u64() & u64::from(u32::MAX));
    name.parse().map_err(|error: wire::ids::ParseIdError| bad_value(error.to_string(), "give a --name"))
}
