//! The lab's network: the fabric's namespace and bridge as of a fleet, with a tap for each host in the place of a veth pair.

use anyhow::Result;

use crate::fleet::layout::{FABRIC_LINK, FABRIC_MTU, FleetName, Host};
use crate::fleet::netns;

/// Makes the namespace, the bridge and the taps.
///
/// # Errors
/// When it exists already, or `ip` refuses.
pub(super) fn create(lab: &FleetName, hosts: &[Host]) -> Result<()> {
    netns::create(lab, &[])?;
    let taps: Vec<String> = hosts.iter().flat_map(tap).collect();
    netns::batch(&lab.fabric_namespace(), &taps)
}

fn tap(host: &Host) -> [String; 3] {
    let port = host.fabric_port();
    [
        format!("tuntap add dev {port} mode tap vnet_hdr"),
        format!("link set {port} mtu {FABRIC_MTU} master {FABRIC_LINK}"),
        format!("link set {port} up"),
    ]
}
