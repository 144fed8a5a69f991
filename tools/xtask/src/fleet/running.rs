//! Bringing a fleet up and taking it down.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::children::Children;
use super::layout::{self, FleetName, Host};
use super::processes;
use super::state::{self, Record};
use super::{netns, services};
use crate::command;
use crate::repository::Binaries;

/// How long a process gets to become ready; a debug build on a loaded machine needs seconds.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// What a fleet is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its name.
    pub name: FleetName,
    /// Number of hosts.
    pub hosts: u8,
    /// RAM that machines on one host may use in all, as `mashined --ram-limit` takes it.
    pub ram_limit: String,
    /// What to run.
    pub binaries: Binaries,
}

/// A fleet that this process brought up.
#[derive(Debug)]
pub struct Fleet {
    plan: Plan,
    hosts: Vec<Host>,
    pub(super) children: Children,
    kept: bool,
}

impl Fleet {
    /// Brings a fleet up. What a crashed one of the same name left is cleared away first.
    ///
    /// # Errors
    /// When it is up already, or a step fails; nothing is left then.
    pub fn up(plan: Plan) -> Result<Self> {
        let _lock = lock()?;
        if is_up(&plan.name) {
            bail!("the fleet `{}` is up already; `cargo xtask down` takes it down", plan.name);
        }
        clear(&plan.name)?;
        let hosts = Host::first(plan.hosts)?;
        let children = Children::new(plan.name.clone(), READY_LIMIT);
        let mut fleet = Self { plan, hosts, children, kept: false };
        fleet.build_up()?;
        Ok(fleet)
    }

    fn build_up(&mut self) -> Result<()> {
        let name = &self.plan.name;
        std::fs::create_dir_all(name.state_dir())
            .with_context(|| format!("making {}", name.state_dir().display()))?;
        netns::create(name, &self.hosts)?;
        make_certificates(name, &self.plan.binaries, &self.hosts)?;
        self.start_control()?;
        for host in self.hosts.clone() {
            self.start_host(&host)?;
        }
        self.await_hosts()?;
        state::write(&self.plan.name, &Record { hosts: self.hosts.clone() })
    }

    /// Starts the daemon of a host, at first or again after it was killed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_host(&mut self, host: &Host) -> Result<()> {
        let plan = &self.plan;
        self.children.start(services::host(&plan.name, host, &plan.binaries, &plan.ram_limit))
    }

    /// As [`Fleet::start_host`], with options of `mashined` added, or put in the place of the usual ones.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_host_with(&mut self, host: &Host, options: &[(&str, &str)]) -> Result<()> {
        let plan = &self.plan;
        let mut service = services::host(&plan.name, host, &plan.binaries, &plan.ram_limit);
        for (option, value) in options {
            service.set_option(option, value);
        }
        self.children.start(service)
    }

    /// Starts the control plane, at first or again after it was killed, and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started or does not become ready.
    pub fn start_control(&mut self) -> Result<()> {
        self.children.start(services::control(&self.plan.name, &self.plan.binaries))?;
        self.children.await_control()
    }

    /// Waits until all hosts have joined.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn await_hosts(&mut self) -> Result<()> {
        let name = &self.plan.name;
        self.children.await_hosts(self.hosts.len(), || cli(name, &self.plan.binaries))
    }

    /// The `mashines` command line, pointed at this fleet.
    pub fn cli(&self) -> Command {
        cli(&self.plan.name, &self.plan.binaries)
    }

    /// Its name.
    pub fn name(&self) -> &FleetName {
        &self.plan.name
    }

    /// Its hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Leaves the fleet up when this process ends.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Takes it down.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn down(mut self) -> Result<()> {
        self.kept = true;
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let cleared = clear(&self.plan.name);
        self.children.reap();
        cleared
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.end() {
            eprintln!("taking the fleet `{}` down: {error:#}", self.plan.name);
        }
    }
}

/// Where images are, for us and for the control planes that we start: they inherit the variable.
pub fn images() -> PathBuf {
    std::env::var_os("MASHINES_IMAGES").map_or_else(|| "/var/lib/mashines/images".into(), PathBuf::from)
}

/// The `mashines` command line, pointed at a fleet.
pub(crate) fn cli(fleet: &FleetName, binaries: &Binaries) -> Command {
    let mut command = Command::new(&binaries.mashines);
    command.env("MASHINES_URL", url(fleet));
    command
}

/// Value of `MASHINES_URL` that reaches the fleet from any shell on this machine. No token: the socket's file mode guards it.
pub fn url(fleet: &FleetName) -> String {
    format!("unix:{}", fleet.api_socket().display())
}

/// Lets an ordinary user, who brought a fleet up through sudo, use its API.
///
/// # Errors
/// When the socket cannot be given to them.
pub fn give_api_to(fleet: &FleetName, user: u32) -> Result<()> {
    let socket = fleet.api_socket();
    std::os::unix::fs::chown(&socket, Some(user), None)
        .with_context(|| format!("giving {} to user {user}", socket.display()))
}

/// Whether the fleet was brought up completely and its daemons live.
pub fn is_up(fleet: &FleetName) -> bool {
    let Some(record) = state::read(fleet) else { return false };
    let daemons =
        processes::of_fleet(fleet).into_iter().filter(|process| process.program != processes::VMM_PROGRAM);
    daemons.count() > record.hosts.len()
}

/// Takes a fleet down, whoever brought it up and however far it got. Returns whether there was anything.
///
/// # Errors
/// When something cannot be removed.
pub fn down(fleet: &FleetName) -> Result<bool> {
    let _lock = lock()?;
    let there = fleet.state_dir().exists()
        || !netns::existing(fleet).is_empty()
        || !processes::of_fleet(fleet).is_empty();
    clear(fleet)?;
    Ok(there)
}

/// Makes the authority of a fleet and an identity for each host, in the fleet's state directory.
pub(crate) fn make_certificates(fleet: &FleetName, binaries: &Binaries, hosts: &[Host]) -> Result<()> {
    let mut init = Command::new(&binaries.mashines);
    init.args(["fleet", "init", "--dir"]).arg(services::pki_dir(fleet));
    for host in hosts {
        init.args(["--host", &host.name()]);
    }
    command::read(&mut init).map(drop)
}

/// Removes all of a fleet that can be found by its name.
pub(crate) fn clear(fleet: &FleetName) -> Result<()> {
    processes::end_all(fleet)?;
    netns::remove(fleet)?;
    match std::fs::remove_dir_all(fleet.state_dir()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", fleet.state_dir().display()))
        }
        _ => Ok(()),
    }
}

/// One `up` or `down` at a time on this machine; waits for the other one. Released when the file is closed, also by a crash.
fn lock() -> Result<File> {
    let path = layout::lock_file();
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}
