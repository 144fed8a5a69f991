//! Bringing the lab up and taking it down.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{FlockOperation, flock};

use super::boot::Booting;
use super::options::Options;
use super::prepare::Ready;
use super::qemu::{self, Common};
use super::seed::Seed;
use super::shell::Shell;
use super::{initramfs, layout, network, tsc};
use crate::fleet::children::Children;
use crate::fleet::layout::{FleetName, Host};
use crate::fleet::processes::{self, Service};
use crate::fleet::{self, netns, services, state};
use crate::{command, signals};

/// How long daemons get to become ready and join: emulation is slow, and both hosts share this machine.
const JOIN_LIMIT: Duration = Duration::from_secs(90);
/// How long hosts bear each other's silence: a processor that is emulated is held up for seconds.
const PEER_TIMEOUT_S: u32 = 20;
/// How often hosts send heartbeats, in milliseconds: three of them last as long as hosts bear each other's silence.
const HEARTBEAT_MS: u32 = PEER_TIMEOUT_S * 1000 / 3;
/// Size of a host's disk. The file is sparse, so only what is written takes place.
const DISK_BYTES: u64 = 32 << 30;

/// What a lab is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its size.
    pub options: Options,
    /// What it is made of.
    pub ready: Ready,
}

/// A lab that this process brought up, or that was up already.
#[derive(Debug)]
pub struct Lab {
    name: FleetName,
    plan: Plan,
    hosts: Vec<Host>,
    shell: Shell,
    children: Children,
    kept: bool,
}

impl Lab {
    /// Brings the lab up. What a crashed one left is cleared away first.
    ///
    /// # Errors
    /// When one is up or coming up already, or a step fails; nothing is left then.
    pub fn up(plan: Plan, tell: &dyn Fn(&str)) -> Result<Self> {
        let _lock = try_lock()?;
        let name = layout::name()?;
        if is_up() {
            bail!("a lab is up already, and a machine has one at most: `cargo xtask lab down` takes it down");
        }
        clear(&name)?;
        let hosts = Host::first(plan.options.hosts)?;
        let shell = Shell::into(&name);
        let children = Children::new(name.clone(), JOIN_LIMIT);
        let mut lab = Self { name, plan, hosts, shell, children, kept: false };
        lab.build_up(tell)?;
        Ok(lab)
    }

    fn build_up(&mut self, tell: &dyn Fn(&str)) -> Result<()> {
        self.make_ground()?;
        let booting = self.start_hosts()?;
        // While the hosts boot.
        fleet::make_certificates(&self.name, &self.plan.ready.binaries, &self.hosts)?;
        self.start_control()?;
        for (host, booting) in self.hosts.clone().into_iter().zip(booting) {
            let (qemu, took) = booting.await_up(&self.name)?;
            self.children.adopt(host.name(), qemu);
            self.shell.open(&host)?;
            tell(&format!("{} booted in {:.1} s", host.name(), took.as_secs_f64()));
            self.start_daemon(&host)?;
        }
        let cli = || fleet::cli(&self.name, &self.plan.ready.binaries);
        self.children.await_hosts(self.hosts.len(), cli)?;
        state::write(&self.name, &state::Record { hosts: self.hosts.clone() })
    }

    /// Directories, keys, disks and the network.
    fn make_ground(&self) -> Result<()> {
        for directory in [&*self.name.state_dir(), layout::disks_dir()] {
            std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        self.shell.make_keys()?;
        initramfs::write(&self.plan.ready.kernel, &self.initramfs())?;
        let seed = Seed::lay(layout::disks_dir().join("seed"), &fleet::images(), &self.plan.options.images)?;
        self.hosts.iter().try_for_each(|host| make_disk(&layout::disk(host), &seed))?;
        network::create(&self.name, &self.hosts)
    }

    fn initramfs(&self) -> std::path::PathBuf {
        self.name.state_dir().join("initramfs")
    }

    fn start_hosts(&self) -> Result<Vec<Booting>> {
        let ready = &self.plan.ready;
        let programs = ready.binaries.mashined.parent().unwrap_or(Path::new("/")).to_owned();
        let common = Common {
            kernel: ready.kernel.clone(),
            initramfs: self.initramfs(),
            programs,
            dropbear: ready.dropbear.clone(),
            ram_mib: self.plan.options.ram.mib(),
            tsc_khz: tsc::measured_khz()?,
        };
        let start = |host| {
            signals::check()?;
            Booting::start(&self.name, self.host_service(host, &common))
        };
        self.hosts.iter().map(start).collect()
    }

    fn host_service(&self, host: &Host, common: &Common) -> Service {
        Service {
            name: host.name(),
            namespace: self.name.fabric_namespace(),
            program: command::locate(qemu::PROGRAM).unwrap_or_else(|| qemu::PROGRAM.into()),
            arguments: qemu::arguments(&self.name, host, common),
            log: layout::console(&self.name, host),
        }
    }

    fn start_control(&mut self) -> Result<()> {
        let mut service = services::control(&self.name, &self.plan.ready.binaries);
        service.arguments.extend(["--heartbeat-ms".to_owned(), HEARTBEAT_MS.to_string()]);
        self.children.start(service)?;
        self.children.await_control()
    }

    /// Starts `mashined` on a host, at first or again after it ended. Its log is outside, beside those of a fleet.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn start_daemon(&self, host: &Host) -> Result<()> {
        let limit = self.plan.options.ram.limit();
        let mut service = services::host(&self.name, host, &self.plan.ready.binaries, &limit);
        service.arguments.extend(["--peer-timeout".to_owned(), PEER_TIMEOUT_S.to_string()]);
        let words = std::iter::once(service.program.display().to_string()).chain(service.arguments);
        let line: Vec<String> = words.map(|word| super::shell::quoted(&word)).collect();
        // As for a fleet's, whose daemons inherit it.
        let filter = std::env::var("MASHINES_LOG").unwrap_or_else(|_| "info".to_owned());
        let script = format!(
            "MASHINES_LOG={} setsid taskset -c {} {} < /dev/null >> {} 2>&1 &",
            super::shell::quoted(&filter),
            qemu::FOR_MACHINES,
            line.join(" "),
            super::shell::quoted(&service.log.display().to_string())
        );
        self.shell.read(host, &script).map(drop)
    }

    /// Its name as a fleet: namespaces, state directory and marks follow from it.
    pub fn name(&self) -> &FleetName {
        &self.name
    }

    /// Its hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The way into its hosts.
    pub fn shell(&self) -> &Shell {
        &self.shell
    }

    /// Runs a line of shell on a host and returns what it printed.
    ///
    /// # Errors
    /// When it ends with anything but 0; with what it said.
    pub fn run(&self, host: &Host, script: &str) -> Result<String> {
        self.shell.read(host, script)
    }

    /// The namespace of clients, from which hosts and machines are reached.
    pub fn client_namespace(&self) -> String {
        self.name.fabric_namespace()
    }

    /// The `mashines` command line, pointed at this lab.
    pub fn cli(&self) -> Command {
        fleet::cli(&self.name, &self.plan.ready.binaries)
    }

    /// Leaves the lab up when this process ends.
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
        let cleared = clear(&self.name);
        self.children.reap();
        cleared
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.end() {
            eprintln!("taking the lab down: {error:#}");
        }
    }
}

/// Makes the file behind a host's disk: large, with a file system that has nothing but the seed.
fn make_disk(path: &Path, seed: &Seed) -> Result<()> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    file.set_len(DISK_BYTES).with_context(|| format!("sizing {}", path.display()))?;
    // A lab's disk lives for an hour: no journal, no reserve, tables when they are needed.
    let options = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"];
    let mkfs =
        command::locate("mkfs.ext4").ok_or_else(|| anyhow!("there is no mkfs.ext4: install e2fsprogs"))?;
    command::read(Command::new(mkfs).args(options).arg("-d").arg(seed.path()).arg(path)).map(drop)
}

/// Whether the lab was brought up completely and its hosts and control plane live.
pub fn is_up() -> bool {
    let Ok(name) = layout::name() else { return false };
    let Some(record) = state::read(&name) else { return false };
    let running = processes::of_fleet(&name);
    let count = |program: &str| running.iter().filter(|process| process.program == program).count();
    count(qemu::PROGRAM) >= record.hosts.len() && count("mashines-control") >= 1
}

/// Takes the lab down, whoever brought it up and however far it got. Returns whether there was anything.
///
/// # Errors
/// When something cannot be removed, or somebody brings it up just now.
pub fn down() -> Result<bool> {
    let _lock = try_lock()?;
    let name = layout::name()?;
    let there = name.state_dir().exists()
        || layout::disks_dir().exists()
        || !netns::existing(&name).is_empty()
        || !processes::of_fleet(&name).is_empty();
    clear(&name)?;
    Ok(there)
}

fn clear(name: &FleetName) -> Result<()> {
    Shell::into(name).close();
    fleet::clear(name)?;
    match std::fs::remove_dir_all(layout::disks_dir()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", layout::disks_dir().display()))
        }
        _ => Ok(()),
    }
}

/// One `up` or `down` at a time; a second is refused, because a boot takes too long to wait for. Released when the file is
/// closed, also by a crash.
fn try_lock() -> Result<File> {
    let path = layout::lock_file();
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("another `cargo xtask lab` is bringing a lab up or down: wait for it, or end it")
        }
        Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}
