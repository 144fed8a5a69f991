//! What a guest is told at boot: the file `/mashines/config.json` of its initial RAM disk.

use serde::Serialize;

use crate::store::records::MachineRecord;

/// Gateway of every guest on every host, as `mashined` sets it up on each tap.
const GATEWAY_IP4: &str = "198.19.255.254";
/// The same for IPv6.
const GATEWAY_IP6: &str = "fe80::1";

#[derive(Serialize)]
struct Config<'a> {
    machine_id: String,
    hostname: &'a str,
    ssh_keys: &'a [String],
    env: &'a std::collections::BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_data_base64: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entrypoint: Option<&'a [String]>,
    network: Network,
}

#[derive(Serialize)]
struct Network {
    ip4: String,
    gw4: &'static str,
    ip6: String,
    gw6: &'static str,
}

impl MachineRecord {
    /// The configuration; empty for a machine that was not made from an image.
    pub(super) fn guest_config(&self) -> Vec<u8> {
        if !self.guest.configured {
            return Vec::new();
        }
        let config = Config {
            machine_id: self.id.to_string(),
            hostname: self.name.as_str(),
            ssh_keys: &self.guest.ssh_keys,
            env: &self.guest.env,
            user_data_base64: self.guest.user_data_base64.as_deref(),
            entrypoint: self.guest.entrypoint.as_deref(),
            network: Network {
                ip4: format!("{}/32", self.ip4),
                gw4: GATEWAY_IP4,
                ip6: format!("{}/128", self.ip6),
                gw6: GATEWAY_IP6,
            },
        };
        // Strings and maps of strings always have a JSON form.
        serde_json::to_vec(&config).unwrap_or_default()
    }
}
