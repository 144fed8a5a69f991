//! The fleet that a test has for itself.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use controlplane::api::{Host as HostView, HostList, Machine};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use xtask::fleet::layout::{FleetName, Host};
use xtask::fleet::leaks::Baseline;
use xtask::fleet::processes::{self, Process};
use xtask::fleet::{Fleet, Plan};
use xtask::repository::{self, Binaries};
use xtask::setup::{self, Kvm};
use xtask::{command, signals};

/// How often something that tells nothing of its change is asked again.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// A host that was restarted joins within a second; the back-off of its link doubles to two.
const JOIN_LIMIT: Duration = Duration::from_secs(20);
/// One fleet at a time: two would take the cores from each other, and then nothing is on time.
static TURN: Mutex<()> = Mutex::new(());
/// Built once for all tests.
static BINARIES: OnceLock<Result<Binaries, String>> = OnceLock::new();

/// A fleet of two hosts, taken down however the test ends.
#[derive(Debug)]
pub struct Ground {
    /// Dropped before the fleet, whose logs go with it.
    logs: LogsOfFailure,
    /// The fleet.
    pub fleet: Fleet,
    /// Host `host-a`.
    pub a: Host,
    /// Host `host-b`.
    pub b: Host,
    baseline: Baseline,
    _turn: MutexGuard<'static, ()>,
}

impl Ground {
    /// Brings the fleet up, unless this machine cannot run one: then says so, for whoever counts tests.
    ///
    /// # Panics
    /// When it should come up and does not.
    pub fn up(name: &str) -> Option<Self> {
        if let Some(why) = missing() {
            println!("SKIPPED: {why}");
            return None;
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        match Self::bring_up(name, turn) {
            Ok(ground) => Some(ground),
            Err(error) => panic!("the fleet `{name}` did not come up: {error:#}"),
        }
    }

    fn bring_up(name: &str, turn: MutexGuard<'static, ()>) -> Result<Self> {
        setup::limits()?;
        let binaries = BINARIES.get_or_init(|| repository::build().map_err(|error| format!("{error:#}")));
        let binaries = binaries.clone().map_err(anyhow::Error::msg)?;
        let baseline = Baseline::take();
        let name = format!("{name}{}", std::process::id() % 1000).parse()?;
        let fleet = Fleet::up(Plan { name, hosts: 2, ram_limit: "1536M".to_owned(), binaries })?;
        let &[a, b] = fleet.hosts() else { bail!("a fleet of two has other hosts") };
        let logs = LogsOfFailure(Some(fleet.name().clone()));
        Ok(Self { logs, fleet, a, b, baseline, _turn: turn })
    }

    /// The host that is not `host`.
    pub fn other(&self, host: Host) -> Host {
        if host == self.a { self.b } else { self.a }
    }

    /// The host of this name.
    ///
    /// # Errors
    /// When the fleet has none.
    pub fn host(&self, name: &str) -> Result<Host> {
        let found = [self.a, self.b].into_iter().find(|host| host.name() == name);
        found.with_context(|| format!("no host {name}"))
    }

    /// Runs `mashines WORDS --json` and reads its answer.
    ///
    /// # Errors
    /// When it fails; the text is what the user would see.
    pub fn ask<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T> {
        let text = command::read(self.fleet.cli().arg("--json").args(words))?;
        serde_json::from_str(&text).with_context(|| format!("`mashines {}` said {text}", words.join(" ")))
    }

    /// Runs `mashines WORDS`, which must fail, and returns its exit code and what it told the user.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn refused(&self, words: &[&str]) -> Result<(i32, String)> {
        let output = command::finish(self.fleet.cli().args(words))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(code) if code != 0 => Ok((code, said)),
            _ => bail!("`mashines {}` ended with {}: {said}", words.join(" "), output.status),
        }
    }

    /// The control plane's view of a machine.
    ///
    /// # Errors
    /// When there is none.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        self.ask(&["get", name])
    }

    /// The control plane's view of a host.
    ///
    /// # Errors
    /// When there is none.
    pub fn host_view(&self, host: Host) -> Result<HostView> {
        let list: HostList = self.ask(&["host", "ls"])?;
        list.hosts.into_iter().find(|view| view.name.as_str() == host.name()).context("not in the list")
    }

    /// Starts a host's daemon again and waits until the control plane sees it.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self, host: Host) -> Result<()> {
        let before = self.joins(host);
        self.fleet.start_host(&host)?;
        self.await_join(host, before)
    }

    /// Stops a host's daemon and starts it with other options.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart_with(&mut self, host: Host, options: &[(&str, &str)]) -> Result<()> {
        self.fleet.kill(&host.name())?;
        let before = self.joins(host);
        self.fleet.start_host_with(&host, options)?;
        self.await_join(host, before)
    }

    /// How often a host's daemons have joined the fleet, by their log.
    fn joins(&self, host: Host) -> usize {
        let log = self.fleet.name().state_dir().join(format!("{}.log", host.name()));
        std::fs::read_to_string(log).unwrap_or_default().matches("joined the fleet").count()
    }

    /// Waits until the control plane has heard from a daemon that has just been started: that a host is online may still be said of the
    /// one before it.
    fn await_join(&mut self, host: Host, before: usize) -> Result<()> {
        let mut joined = None;
        until("the restarted host to join", JOIN_LIMIT, || {
            if joined.is_none() && self.joins(host) > before {
                joined = Some(Instant::now());
            }
            let Some(since) = joined.map(|at| at.elapsed()) else {
                return Ok(Err("it has not joined".to_owned()));
            };
            let heard = self.host_view(host)?.last_heard_ms_ago.map(Duration::from_millis);
            Ok(heard.filter(|ago| *ago < since).map(drop).ok_or_else(|| format!("heard {heard:?} ago")))
        })?;
        self.fleet.await_hosts()
    }

    /// Stops the processes that run machines on a host, with SIGSTOP: what waits for one of them, waits.
    pub fn freeze(&self, host: Host) -> Frozen {
        let vmms = self.fleet.vmms_on(&host);
        vmms.iter().for_each(|vmm| vmm.signal(Signal::STOP));
        Frozen(vmms)
    }

    /// Stops a daemon with SIGSTOP until it is killed.
    ///
    /// # Errors
    /// When it does not run.
    pub fn freeze_daemon(&self, service: &str) -> Result<()> {
        let pid = self.fleet.pid(service).with_context(|| format!("{service} does not run"))?;
        let pid = Pid::from_raw(i32::try_from(pid)?).context("not a process number")?;
        kill_process(pid, Signal::STOP).context("stopping a daemon")
    }

    /// Takes the fleet down.
    ///
    /// # Errors
    /// When anything is left of it.
    pub fn finish(mut self) -> Result<()> {
        self.logs.0 = None;
        let name = self.fleet.name().clone();
        self.fleet.down()?;
        let leaks = self.baseline.leaks(&name);
        if leaks.is_empty() { Ok(()) } else { bail!("left behind: {}", leaks.join(", ")) }
    }
}

/// Prints what the daemons said last, unless the test came to its end.
#[derive(Debug)]
struct LogsOfFailure(Option<FleetName>);

impl Drop for LogsOfFailure {
    fn drop(&mut self) {
        let Some(name) = &self.0 else { return };
        for service in ["control", "host-a", "host-b"] {
            let log = name.state_dir().join(format!("{service}.log"));
            println!("  log of {service}:\n{}", processes::tail(&log));
        }
    }
}

/// Processes that were stopped; they go on when this is dropped.
#[derive(Debug)]
pub struct Frozen(Vec<Process>);

impl Frozen {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|vmm| vmm.signal(Signal::CONT));
    }
}

/// Asks until `answer` is there. None of what is asked tells of its change by itself.
///
/// # Errors
/// When it is not there within `limit`, with what was missing last.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut answer: impl FnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        signals::check()?;
        match answer()? {
            Ok(value) => return Ok(value),
            Err(missing) if Instant::now() >= deadline => bail!("waited {limit:?} for {what}: {missing}"),
            Err(_) => std::thread::sleep(ASK_EVERY),
        }
    }
}

fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    match setup::kvm() {
        Kvm::Usable => None,
        Kvm::Missing(why) => Some(why),
    }
}
