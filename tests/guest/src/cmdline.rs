//! The kernel command line: where the devices are, who the machine is, what load it starts with.
//!
//! Unknown words are ignored, as they may be meant for another kernel; a known word with a bad value is counted in
//! [`Config::rejected`] and leaves the default, so that a typing error shows instead of changing the test.

use crate::command::{Mode, Pattern};
use crate::text::Text;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

/// Most virtio devices that are looked at.
pub const MAX_DEVICES: usize = 8;
/// Most vCPUs that are started.
pub const MAX_VCPUS: u32 = 16;

/// A virtio-mmio window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceWindow {
    /// Guest-physical address of the registers, below 4 GiB.
    pub base: u64,
    /// Global system interrupt, 0..48.
    pub gsi: u32,
}

/// Everything the command line can say.
#[derive(Clone)]
pub struct Config {
    /// Machine id, `-` if not given.
    pub id: Text<63>,
    /// Own IPv4 address.
    pub ip4: Option<Ipv4Addr>,
    /// IPv4 gateway.
    pub gw4: Option<Ipv4Addr>,
    /// Own IPv6 address.
    pub ip6: Option<Ipv6Addr>,
    /// IPv6 gateway.
    pub gw6: Option<Ipv6Addr>,
    /// vCPUs to run, 1..=16.
    pub vcpus: u32,
    /// What the loops do when there is nothing to do.
    pub mode: Mode,
    /// Whether to populate all pages at boot.
    pub populate: bool,
    /// Dirty rate from boot, pages/s.
    pub dirty_rate: u64,
    /// Working set, pages, 0 = all.
    pub ws: u64,
    /// Share of random content, 0..=100.
    pub entropy: u8,
    /// Order in which pages are dirtied.
    pub pattern: Pattern,
    /// TSC frequency, if told.
    pub tsc_khz: Option<u64>,
    devices: [Option<DeviceWindow>; MAX_DEVICES],
    /// Known words whose value made no sense, and devices beyond the eighth.
    pub rejected: u32,
}

impl Config {
    /// Reads a command line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut config = Self {
            id: Text::from_args(format_args!("-")),
            ip4: None,
            gw4: None,
            ip6: None,
            gw6: None,
            vcpus: 1,
            mode: Mode::Idle,
            populate: false,
            dirty_rate: 0,
            ws: 0,
            entropy: 100,
            pattern: Pattern::Rand,
            tsc_khz: None,
            devices: [None; MAX_DEVICES],
            rejected: 0,
        };
        for word in line.split_ascii_whitespace() {
            if let Some((key, value)) = word.split_once('=')
                && config.set(key, value).is_none()
            {
                config.rejected += 1;
            }
        }
        config
    }

    /// The virtio-mmio windows, in the order given.
    pub fn devices(&self) -> impl Iterator<Item = DeviceWindow> + '_ {
        self.devices.iter().flatten().copied()
    }

    /// `None` if the key is known and the value bad.
    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "virtio_mmio.device" => {
                let window = DeviceWindow::parse(value)?;
                *self.devices.iter_mut().find(|d| d.is_none())? = Some(window);
            }
            "mashine.id" => {
                if value.len() > 63 || !value.bytes().all(|b| b.is_ascii_graphic()) {
                    return None;
                }
                self.id = Text::from_args(format_args!("{value}"));
            }
            "mashine.ip4" => self.ip4 = Some(address(value)?),
            "mashine.gw4" => self.gw4 = Some(address(value)?),
            "mashine.ip6" => self.ip6 = Some(address(value)?),
            "mashine.gw6" => self.gw6 = Some(address(value)?),
            "mashine.vcpus" => self.vcpus = number(value).filter(|n| (1..=MAX_VCPUS).contains(n))?,
            "mashine.mode" => self.mode = Mode::parse(value)?,
            "mashine.populate" => self.populate = number::<u8>(value).filter(|n| *n <= 1)? == 1,
            "mashine.dirty" => self.dirty_rate = number(value)?,
            "mashine.ws" => self.ws = number(value)?,
            "mashine.entropy" => self.entropy = number(value).filter(|n| *n <= 100)?,
            "mashine.pattern" => self.pattern = Pattern::parse(value)?,
            "mashine.tsc_khz" => self.tsc_khz = Some(number(value).filter(|n| *n >= 1000)?),
            _ => {}
        }
        Some(())
    }
}

impl DeviceWindow {
    /// `SIZE@BASE:GSI[:ID]`, as Linux has it.
    fn parse(text: &str) -> Option<Self> {
        let (_size, rest) = text.split_once('@')?;
        let mut parts = rest.split(':');
        let base = parts.next()?;
        let base = match base.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok()?,
            None => base.parse().ok()?,
        };
        let gsi = number(parts.next()?)?;
        (base % 4 == 0 && base < 0xffff_f000 && gsi < 48).then_some(Self { base, gsi })
    }
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// An address with or without a prefix length. The length does not matter: everything goes to the gateway.
fn address<T: FromStr>(text: &str) -> Option<T> {
    match text.split_once('/') {
        Some((address, length)) => {
            number::<u8>(length).filter(|l| *l <= 128)?;
            number(address)
        }
        None => number(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_full_line() {
        let config = Config::parse(
            "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=512@0xfeb02a00:12:3 \
             mashine.ip4=198.19.0.2/16 mashine.gw4=198.19.255.254 mashine.ip6=2001:db8:6d61::2/64 \
             mashine.gw6=fe80::1 mashine.id=m-1 mashine.vcpus=2 mashine.mode=spin mashine.populate=1 \
             mashine.dirty=20000 mashine.ws=1000 mashine.entropy=50 mashine.pattern=seq",
        );
        assert_eq!(config.rejected, 0);
        let devices: Vec<_> = config.devices().collect();
        assert_eq!(devices[0], DeviceWindow { base: 0xd000_0000, gsi: 5 });
        assert_eq!(devices[1], DeviceWindow { base: 0xfeb0_2a00, gsi: 12 });
        assert_eq!(config.ip4, Some(Ipv4Addr::new(198, 19, 0, 2)));
        assert_eq!(config.gw6, Some("fe80::1".parse().unwrap()));
        assert_eq!(
            (config.id.as_str(), config.vcpus, config.mode, config.populate),
            ("m-1", 2, Mode::Spin, true)
        );
        assert_eq!((config.dirty_rate, config.ws, config.entropy), (20_000, 1000, 50));
        assert_eq!(config.pattern, Pattern::Seq);
    }

    #[test]
    fn counts_nonsense_and_keeps_defaults() {
        let config = Config::parse(
            "mashine.ip4=300.1.1.1 mashine.vcpus=0 mashine.entropy=101 mashine.dirty=-1 \
             virtio_mmio.device=4K0xd0:5 virtio_mmio.device=4K@0xd0000001:5 virtio_mmio.device=4K@0xd0000000:99 other=1 =",
        );
        assert_eq!(config.rejected, 7);
        assert_eq!((config.vcpus, config.entropy, config.devices().count()), (1, 100, 0));
    }

    #[test]
    fn takes_eight_devices() {
        let line = "virtio_mmio.device=4K@0xd0000000:5 ".repeat(9);
        let config = Config::parse(&line);
        assert_eq!((config.devices().count(), config.rejected), (8, 1));
    }
}
