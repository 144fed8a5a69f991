//! Where the story is told: a lab, or a fleet of namespaces where the machine's own KVM is complete. The story itself sees no difference.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::facts::{Facts, SCRIPT};
use crate::fleet::layout::FleetName;
use crate::fleet::processes::MARK;
use crate::fleet::{self, netns};
use crate::lab::PLAIN_ADDRESSES;
use crate::{command, signals};

/// Transactions a second that an emulated machine does with room for other things.
const EMULATED_TRANSACTIONS: u32 = 5;
/// How often a guest that boots is asked whether it answers.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// A control plane, hosts, and a network of clients.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its name as a fleet.
    pub name: FleetName,
    /// The command line.
    pub mashines: PathBuf,
    /// Its two hosts.
    pub hosts: [String; 2],
    /// How many times longer than real machines its machines take.
    pub slowness: u32,
}

impl Site {
    /// The namespace of clients.
    pub fn clients(&self) -> String {
        self.name.fabric_namespace()
    }

    /// The `mashines` command line, pointed at this site.
    pub fn cli<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(&self.mashines);
        // The mark is what `down` finds it by, if this process is killed.
        command.env("MASHINES_URL", fleet::url(&self.name)).env(MARK, self.name.to_string()).args(arguments);
        command
    }

    /// The load its machine is given, in transactions; without a limit where it is a real machine. One that is emulated, and the
    /// hosts beside it, share the few processors of this one.
    pub fn transactions_per_second(&self) -> Option<u32> {
        (self.slowness > 1).then_some(EMULATED_TRANSACTIONS)
    }

    /// What its machines' kernel is told besides.
    pub fn kernel_argument(&self) -> Option<&'static str> {
        (self.slowness > 1).then_some(PLAIN_ADDRESSES)
    }

    /// A time that is enough for real machines, as it is enough here.
    pub fn patience(&self, real: Duration) -> Duration {
        real * self.slowness
    }
}

/// The machine, as its clients reach it.
#[derive(Debug, Clone)]
pub struct Guest {
    site: Site,
    name: String,
    address: IpAddr,
    ssh_key: Option<PathBuf>,
}

impl Guest {
    /// A machine of `site`. With a key it has an ssh server that takes it.
    pub fn new(site: &Site, name: &str, address: IpAddr, ssh_key: Option<PathBuf>) -> Self {
        Self { site: site.clone(), name: name.to_owned(), address, ssh_key }
    }

    /// Where clients reach it.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// A command in the guest by way of its agent, with our standard input.
    pub fn exec(&self, script: &str) -> Command {
        self.site.cli(["exec", "--interactive", &self.name, "--", "/bin/sh", "-c", script])
    }

    /// A shell in a terminal of the guest.
    pub fn enter(&self) -> Command {
        self.site.cli(["enter", &self.name])
    }

    /// A command in the guest by way of ssh. To be started in the clients' namespace: see [`Guest::among_clients`].
    pub fn ssh(&self, script: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-T");
        self.ssh_options(&mut ssh);
        ssh.arg(format!("root@{}", self.address)).arg("--").arg(script);
        ssh
    }

    fn ssh_options(&self, ssh: &mut Command) {
        ssh.env(MARK, self.site.name.to_string()).args(["-F", "none"]);
        if let Some(key) = &self.ssh_key {
            ssh.arg("-i").arg(key);
        }
        // The machine is minutes old and its host key was made at its boot: there is nothing to compare it with.
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "GlobalKnownHostsFile=none",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "LogLevel=ERROR",
            "ConnectTimeout=30",
            "ServerAliveInterval=20",
        ] {
            ssh.args(["-o", option]);
        }
    }

    /// Copies a file or directory between the guest and here, by way of its agent. A path in the guest is given by [`Guest::path`].
    pub fn copy(&self, from: &str, to: &str) -> Command {
        self.site.cli(["cp", from, to])
    }

    /// A path in the guest, as [`Guest::copy`] takes it.
    pub fn path(&self, path: &str) -> String {
        format!("{}:{path}", self.name)
    }

    /// Copies a file into the guest by way of ssh. To be started in the clients' namespace.
    pub fn scp(&self, from: &str, to: &str) -> Command {
        let mut scp = Command::new("scp");
        scp.arg("-q");
        self.ssh_options(&mut scp);
        scp.arg(from).arg(format!("root@[{}]:{to}", self.address));
        scp
    }

    /// Runs `work` where clients are: what it starts and connects belongs to their network.
    ///
    /// # Errors
    /// When there is no such network.
    pub fn among_clients<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        netns::within(&self.site.clients(), work)
    }

    /// Runs a line of shell in the guest by way of its agent and returns what it printed.
    ///
    /// # Errors
    /// When it ends with anything but 0; with what it said.
    pub fn run(&self, script: &str) -> Result<String> {
        command::read(&mut self.exec(script))
    }

    /// Waits until the agent runs commands.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn await_agent(&self, limit: Duration) -> Result<()> {
        self.await_that(limit, "the agent", || self.run("true").map(drop))
    }

    /// Waits until one can log in by ssh.
    ///
    /// # Errors
    /// When one cannot within `limit`.
    pub fn await_ssh(&self, limit: Duration) -> Result<()> {
        self.await_that(limit, "the ssh server", || {
            self.among_clients(|| command::read(&mut self.ssh("true")))?.map(drop)
        })
    }

    fn await_that(&self, limit: Duration, what: &str, works: impl Fn() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            signals::check()?;
            match works() {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(
                        error.context(format!("{what} of {} does not answer in {limit:?}", self.name))
                    );
                }
                // A guest that boots tells nobody outside how far it is.
                Err(_) => std::thread::sleep(ASK_EVERY),
            }
        }
    }

    /// What the guest says about itself now.
    ///
    /// # Errors
    /// When it says nothing, or something else.
    pub fn facts(&self) -> Result<Facts> {
        Facts::parse(&self.run(SCRIPT)?)
    }

    /// The end of its console, for when it does not answer.
    pub fn console(&self) -> String {
        let text = command::read(&mut self.site.cli(["logs", &self.name]));
        let text = text.unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default();
        tail.iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// The key of the story's clients, made at first.
///
/// # Errors
/// When ssh's programs are missing.
pub fn story_key(site: &Site) -> Result<PathBuf> {
    let key = site.name.state_dir().join("story-key");
    // A site where more than one story is told has one.
    if key.exists() {
        return key.canonicalize().context("finding the key");
    }
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "story", "-f"]).arg(&key);
    command::read(&mut keygen)?;
    if !key.exists() {
        bail!("ssh-keygen made no key");
    }
    key.canonicalize().context("finding the key")
}
