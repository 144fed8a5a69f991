//! `host ls`, `host get`.

use controlplane::api::{Host, HostList};

use crate::args;
use crate::client::Client;
use crate::exit::Failure;
use crate::output;
use crate::units::{show_bytes, show_ms};

pub(super) async fn run(client: &Client, command: &args::Host, json: bool) -> Result<(), Failure> {
    match command {
        args::Host::Ls => {
            let list: HostList = client.get("/v1/hosts").await?;
            if json {
                return output::json(&list);
            }
            let rows: Vec<_> = list.hosts.iter().map(row).collect();
            let heads =
                ["NAME", "STATE", "MACHINES", "VCPUS USED", "CPUS", "RAM FREE", "RAM", "HEARD", "RELEASE"];
            output::table(&heads, &rows)
        }
        args::Host::Get { name } => {
            let host: Host = client.get(&format!("/v1/hosts/{name}")).await?;
            if json {
                return output::json(&host);
            }
            output::pairs(&[
                ("name", host.name.to_string()),
                ("state", host.state.as_str().to_owned()),
                ("release", host.release.clone()),
                ("machines", host.machines.to_string()),
                ("vcpus used", host.vcpus_used.to_string()),
                ("cpus", known(host.cpus)),
                ("ram free", host.ram_free_bytes.map_or_else(unknown, show_bytes)),
                ("ram", host.ram_bytes.map_or_else(unknown, show_bytes)),
                ("tsc khz", known(host.tsc_khz)),
                ("heard", heard(&host)),
                ("cpu features", host.cpu_features.join(" ")),
            ])
        }
    }
}

fn row(host: &Host) -> Vec<String> {
    vec![
        host.name.to_string(),
        host.state.as_str().to_owned(),
        host.machines.to_string(),
        host.vcpus_used.to_string(),
        known(host.cpus),
        host.ram_free_bytes.map_or_else(unknown, show_bytes),
        host.ram_bytes.map_or_else(unknown, show_bytes),
        heard(host),
        host.release.clone(),
    ]
}

fn heard(host: &Host) -> String {
    host.last_heard_ms_ago.map_or_else(unknown, |ms| format!("{} ago", show_ms(ms)))
}

fn known(value: Option<u32>) -> String {
    value.map_or_else(unknown, |value| value.to_string())
}

fn unknown() -> String {
    "-".to_owned()
}
