//! The command lines of a fleet's processes.

use std::path::{Path, PathBuf};

use super::layout::{FABRIC_IP4, FleetName, Host, UPLINK};
use super::processes::Service;
use crate::repository::Binaries;

/// UDP port on which the control plane listens for hosts, in the fabric namespace.
const HOSTS_PORT: u16 = 7071;
/// Executors of each host's daemon. Two hosts share this machine's cores, so few.
const SHARDS: u32 = 2;

/// Where the fleet's certificates are.
pub fn pki_dir(fleet: &FleetName) -> PathBuf {
    fleet.state_dir().join("pki")
}

/// Log of a service.
pub fn log(fleet: &FleetName, service: &str) -> PathBuf {
    fleet.state_dir().join(format!("{service}.log"))
}

/// The control plane.
pub fn control(fleet: &FleetName, binaries: &Binaries) -> Service {
    let name = "control".to_owned();
    Service {
        namespace: fleet.fabric_namespace(),
        program: binaries.mashines_control.clone(),
        arguments: words(&[
            ("--fleet", &text(&pki_dir(fleet))),
            ("--state", &text(&fleet.state_dir().join("control"))),
            ("--listen", &format!("unix:{}", fleet.api_socket().display())),
            ("--fleet-listen", &format!("{FABRIC_IP4}:{HOSTS_PORT}")),
            ("--default-kernel", &text(&binaries.guest)),
        ]),
        log: log(fleet, &name),
        name,
    }
}

/// A host's daemon.
pub fn host(fleet: &FleetName, host: &Host, binaries: &Binaries, ram_limit: &str) -> Service {
    let name = host.name();
    Service {
        namespace: fleet.host_namespace(host),
        program: binaries.mashined.clone(),
        arguments: words(&[
            ("--name", &name),
            ("--state", &text(&fleet.state_dir().join(&name))),
            ("--fleet", &text(&pki_dir(fleet).join("hosts").join(&name))),
            ("--control", &format!("{FABRIC_IP4}:{HOSTS_PORT}")),
            ("--uplink", UPLINK),
            ("--shards", &SHARDS.to_string()),
            ("--ram-limit", ram_limit),
            ("--vmm", &text(&binaries.mashine_vmm)),
        ]),
        log: log(fleet, &name),
        name,
    }
}

fn words(options: &[(&str, &str)]) -> Vec<String> {
    options.iter().flat_map(|(option, value)| [(*option).to_owned(), (*value).to_owned()]).collect()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
