//! What a lab is asked to be, as the command line gives it.

use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::fleet::layout::Host;

/// `cargo xtask lab ...`
#[derive(Debug, Clone, Subcommand)]
pub enum Task {
    /// Boot emulated hosts with complete KVM, with a control plane, and leave them up.
    Up(Options),
    /// Run a command on a lab host; without one, a shell. Ends with the command's exit code.
    Run {
        /// `host-a` and so on.
        host: Host,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Take the lab down, whatever is left of it.
    Down,
    /// Bring a lab up, migrate a Linux machine to and fro while it is used, and take the lab down.
    Demo(crate::story::Options),
    /// Bring a lab up, boot and migrate each kernel that Debian's packages offer, and take the lab down.
    Kernels(crate::story::kernels::Options),
    /// As `demo`, with the bare-metal test guest, which checks its own memory.
    DemoSkeleton(Options),
}

/// Size of a lab.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Number of hosts.
    #[arg(long, default_value_t = 2)]
    pub hosts: u8,
    /// RAM of each host. Machines get what the host does not need itself.
    #[arg(long, default_value = "3G")]
    pub ram: Ram,
    /// Image that the hosts have from the start; others they fetch when a machine needs them, which takes them minutes.
    #[arg(long = "image", value_name = "NAME")]
    pub images: Vec<String>,
}

/// RAM of a lab host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ram {
    mib: u64,
}

/// What a host needs for itself: its kernel, `mashined`, and pages on the way.
const HOST_MIB: u64 = 768;
/// Most that a host gets: what is asked for in error rather than in earnest.
const RAM_MIB_MAX: u64 = 1 << 20;

impl Ram {
    /// All of it.
    pub fn mib(self) -> u64 {
        self.mib
    }

    /// What machines may use, as `mashined --ram-limit` takes it.
    pub fn limit(self) -> String {
        format!("{}M", self.mib - HOST_MIB)
    }
}

impl FromStr for Ram {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, unit) = match text.strip_suffix(['G', 'g']) {
            Some(number) => (number, 1024),
            None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
        };
        let number: u64 =
            number.parse().with_context(|| format!("`{text}` is no size: write 3G or 3072M"))?;
        let mib = number.saturating_mul(unit);
        if !(HOST_MIB + 256..=RAM_MIB_MAX).contains(&mib) {
            bail!("a lab host has from 1G to {}G of RAM, not {text}", RAM_MIB_MAX / 1024);
        }
        Ok(Self { mib })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_bounded() {
        assert_eq!("3G".parse::<Ram>().unwrap().mib(), 3072);
        assert_eq!("3072M".parse::<Ram>().unwrap(), "3072".parse().unwrap());
        assert_eq!("3G".parse::<Ram>().unwrap().limit(), "2304M");
        for bad in ["", "G", "-1G", "0", "100M", "3T", "99999999999999999999G", "18446744073709551615G"] {
            assert!(bad.parse::<Ram>().is_err(), "{bad}");
        }
    }
}
