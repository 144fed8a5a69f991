//! Breaking a fleet on purpose, and mending it: what the end-to-end tests inject.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::layout::{FABRIC_LINK, Host};
use super::processes::{self, Process};
use super::{Fleet, netns};

impl Fleet {
    /// Kills a daemon (`control` or a host's name) with SIGKILL, as a crash would. Its machines go on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, service: &str) -> Result<()> {
        let Some(mut child) = self.children.release(service) else { bail!("{service} does not run") };
        child.kill().with_context(|| format!("killing {service}"))?;
        child.wait().with_context(|| format!("waiting for {service}")).map(drop)
    }

    /// A host loses power: its daemon and all its machines are gone at once. The daemon is stopped first, as it must not see its machines
    /// die; they die before it, as a stopped process goes on when its parent ends (the kernel continues orphaned process groups).
    ///
    /// # Errors
    /// When its daemon does not run.
    pub fn kill_with_machines(&mut self, host: &Host) -> Result<()> {
        let name = host.name();
        let daemon = self.pid(&name).and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let daemon = daemon.with_context(|| format!("{name} does not run"))?;
        kill_process(daemon, Signal::STOP).with_context(|| format!("stopping {name}"))?;
        self.vmms_on(host).iter().for_each(|vmm| vmm.signal(Signal::KILL));
        self.kill(&name)
    }

    /// Removes the state directory of a host whose daemon and machines are gone, as a reboot does that is on a tmpfs.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn lose_state(&self, host: &Host) -> Result<()> {
        let state = self.name().state_dir().join(host.name());
        std::fs::remove_dir_all(&state).with_context(|| format!("removing {}", state.display()))
    }

    /// Process number of a daemon (`control` or a host's name) that we started and did not kill.
    pub fn pid(&self, service: &str) -> Option<u32> {
        self.children.pid(service)
    }

    /// The processes that run machines, on all hosts. On one machine they share a process table, so the host is told by the network namespace.
    pub fn vmms(&self) -> Vec<Process> {
        let mut found = processes::of_fleet(self.name());
        found.retain(|process| process.program == processes::VMM_PROGRAM);
        found
    }

    /// The processes that run machines on one host.
    pub fn vmms_on(&self, host: &Host) -> Vec<Process> {
        let namespace = netns::path(&self.name().host_namespace(host));
        let mut found = self.vmms();
        found.retain(|process| netns::is_in(process.pid, &namespace));
        found
    }

    /// Cuts a host off the fabric: its link stays up and every packet is lost, as with a broken switch.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn cut(&self, host: &Host) -> Result<()> {
        let port = host.fabric_port();
        netns::batch(&self.name().fabric_namespace(), &[format!("link set {port} nomaster")])
    }

    /// Undoes [`Fleet::cut`].
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn mend(&self, host: &Host) -> Result<()> {
        let port = host.fabric_port();
        netns::batch(&self.name().fabric_namespace(), &[format!("link set {port} master {FABRIC_LINK}")])
    }
}
