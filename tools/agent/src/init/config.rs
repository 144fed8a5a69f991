//! What the host tells the guest about itself: `/mashines/config.json` in the initramfs, and words on the kernel's command line where that says nothing.
//!
//! Fields that are not known are passed over, so that an older guest boots under a newer host.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::Deserialize;

use super::cmdline::Cmdline;

/// The configuration of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `m-0123456789abcdef`.
    pub machine_id: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Public keys for root, one each.
    pub ssh_keys: Vec<String>,
    /// Disks to mount.
    pub volumes: Vec<Volume>,
    /// NoCloud user data, base64.
    pub user_data_base64: Option<String>,
    /// Variables for the image's init or entrypoint.
    pub env: BTreeMap<String, String>,
    /// The network interface.
    pub network: Network,
    /// Program of an image without an init.
    pub entrypoint: Option<Vec<String>>,
    /// Whether an image without init and entrypoint gets a shell on the console.
    pub console: bool,
}

/// A disk and its place.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Volume {
    /// `/dev/vdb`.
    pub device: String,
    /// `/data`.
    pub mountpoint: String,
}

/// The network interface, `eth0`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Network {
    /// `198.19.0.2/32`.
    pub ip4: Option<Prefix>,
    /// Its gateway, which is on the link whatever the prefix says.
    pub gw4: Option<Ipv4Addr>,
    /// `2001:db8::2/128`.
    pub ip6: Option<Prefix>,
    /// Its gateway.
    pub gw6: Option<Ipv6Addr>,
    /// Largest packet, in bytes.
    pub mtu: Option<u32>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
}

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// Bits of the prefix.
    pub bits: u8,
}

/// Not `ADDRESS` or `ADDRESS/BITS`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an address with a prefix length, such as 198.19.0.2/32")]
pub struct NoPrefix(String);

impl FromStr for Prefix {
    type Err = NoPrefix;

    fn from_str(text: &str) -> Result<Self, NoPrefix> {
        let bad = || NoPrefix(text.to_owned());
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| bad()))?;
        if bits > most { Err(bad()) } else { Ok(Self { address, bits }) }
    }
}

impl TryFrom<String> for Prefix {
    type Error = NoPrefix;

    fn try_from(text: String) -> Result<Self, NoPrefix> {
        text.parse()
    }
}

impl Config {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Where it is not as it should be.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// Takes from the command line what is missing. Words that make no sense are named and passed over.
    pub fn complete(&mut self, cmdline: &Cmdline) {
        fn word<T: FromStr>(cmdline: &Cmdline, name: &str) -> Option<T> {
            let text = cmdline.value(name)?;
            let parsed = text.parse().ok();
            if parsed.is_none() {
                crate::say!("`{name}={text}` on the kernel's command line makes no sense");
            }
            parsed
        }
        let network = &mut self.network;
        network.ip4 = network.ip4.or_else(|| word(cmdline, "mashine.ip4"));
        network.gw4 = network.gw4.or_else(|| word(cmdline, "mashine.gw4"));
        network.ip6 = network.ip6.or_else(|| word(cmdline, "mashine.ip6"));
        network.gw6 = network.gw6.or_else(|| word(cmdline, "mashine.gw6"));
        self.machine_id = self.machine_id.take().or_else(|| word(cmdline, "mashine.id"));
    }

    /// Variables of the guest contract, and the machine's own.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let mut all = self.env.clone();
        let mut put = |name: &str, value: String| {
            if !value.is_empty() {
                all.insert(name.to_owned(), value);
            }
        };
        put("MACHINE_ID", self.machine_id.clone().unwrap_or_default());
        put("MACHINE_SSH_KEYS", self.ssh_keys.join("\n"));
        let volumes = self.volumes.iter().map(|volume| format!("{}:{}", volume.device, volume.mountpoint));
        put("MACHINE_VOLUMES", volumes.collect::<Vec<_>>().join(","));
        put("MACHINE_USER_DATA", self.user_data_base64.clone().unwrap_or_default());
        // What an environment cannot hold.
        all.retain(|name, value| {
            !name.is_empty() && !name.contains(['=', '\0', '\n']) && !value.contains('\0')
        });
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_wins_over_the_command_line() {
        let text = r#"{"machine_id": "m-00000000deadbeef", "hostname": "web-1", "ssh_keys": ["a", "b"],
            "volumes": [{"device": "/dev/vdb", "mountpoint": "/data"}], "env": {"A": "1", "": "x", "B=": "y"},
            "network": {"ip4": "198.19.0.2/32", "gw4": "198.18.0.1", "dns": ["2001:db8::53"], "mtu": 1400},
            "entrypoint": null, "console": true, "from_the_future": {}}"#;
        let mut config = Config::parse(text).unwrap();
        let words =
            "mashine.ip4=198.19.0.9/24 mashine.gw6=fe80::1 mashine.ip6=2001:db8::2/128 mashine.id=m-1";
        config.complete(&Cmdline::parse(words));
        assert_eq!(config.network.ip4, Some("198.19.0.2/32".parse().unwrap()));
        assert_eq!(config.network.gw6, Some("fe80::1".parse().unwrap()));
        assert_eq!(config.network.ip6.unwrap().bits, 128);
        let variables = config.variables();
        assert_eq!(variables["MACHINE_ID"], "m-00000000deadbeef");
        assert_eq!(variables["MACHINE_SSH_KEYS"], "a\nb");
        assert_eq!(variables["MACHINE_VOLUMES"], "/dev/vdb:/data");
        assert_eq!(variables.len(), 4);
    }

    #[test]
    fn prefixes_are_checked() {
        assert_eq!("2001:db8::1".parse::<Prefix>().unwrap().bits, 128);
        for bad in ["", "1.2.3", "1.2.3.4/33", "::/129", "1.2.3.4/", "1.2.3.4/-1"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
        assert!(Config::parse(r#"{"network": {"ip4": "nonsense"}}"#).is_err());
        assert_eq!(Config::parse("{}").unwrap(), Config::default());
    }
}
