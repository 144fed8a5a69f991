//! The fleet's processes: started in their namespaces, found again by what they carry, ended through pidfds.
//!
//! Every process of a fleet has `MASHINES_FLEET=NAME` in its environment and so have its children. What a fleet runs is
//! therefore read from `/proc`, not from a file that a crash would leave wrong; a pid that was given to someone else in
//! the meantime does not carry the mark. Signals go through a pidfd that is opened before the mark is checked, so
//! they cannot reach a later process with the same number.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::layout::FleetName;
use super::netns;
use crate::signals;

/// The mark that processes of a fleet carry in their environment.
pub const MARK: &str = "MASHINES_FLEET";

/// A program to run as part of a fleet.
#[derive(Debug)]
pub struct Service {
    /// For people, and the name of its log.
    pub name: String,
    /// Where it runs.
    pub namespace: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where its output goes (appended).
    pub log: PathBuf,
}

impl Service {
    /// Gives an option another value, or adds it.
    pub fn set_option(&mut self, option: &str, value: &str) {
        match self.arguments.iter().position(|word| word == option) {
            Some(place) if place + 1 < self.arguments.len() => {
                value.clone_into(&mut self.arguments[place + 1])
            }
            _ => self.arguments.extend([option.to_owned(), value.to_owned()]),
        }
    }

    /// Starts it, in a process group of its own, so that Ctrl-C in a terminal does not reach it.
    ///
    /// # Errors
    /// When the log or the namespace cannot be opened or the program not started.
    pub fn start(&self, fleet: &FleetName) -> Result<Child> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        let errors = log.try_clone().context("duplicating a log's descriptor")?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env(MARK, fleet.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0);
        netns::within(&self.namespace, move || command.spawn())?
            .with_context(|| format!("starting {} ({})", self.name, self.program.display()))
    }
}

/// A live process of a fleet, held so that its number cannot come to mean another.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// File name of its program; empty if it ended meanwhile.
    pub program: String,
    pidfd: OwnedFd,
}

impl Process {
    fn open(number: i32) -> Option<Self> {
        let pid = Pid::from_raw(number)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let program = std::fs::read_link(format!("/proc/{number}/exe")).ok()?;
        let program = program.file_name()?.to_string_lossy().into_owned();
        Some(Self { pid: number, program, pidfd })
    }

    /// Sends `signal`; a process that has ended is not an error.
    pub fn signal(&self, signal: Signal) {
        // The only failures are "has ended" and "may not", and root may.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Waits until it has ended, at most `limit`. Returns whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        wait_readable(&self.pidfd, limit)
    }
}

fn wait_readable(fd: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut polled = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The fleet's live processes.
pub fn of_fleet(fleet: &FleetName) -> Vec<Process> {
    let mark = format!("{MARK}={fleet}");
    numbers().into_iter().filter_map(|pid| Process::open(pid).filter(|_| carries(pid, &mark))).collect()
}

/// Whether the process has `mark` in the environment it was started with.
fn carries(pid: i32, mark: &str) -> bool {
    environment(pid).split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
}

/// Whether the process belongs to any fleet.
pub fn belongs_to_a_fleet(pid: i32) -> bool {
    let mark = format!("{MARK}=");
    environment(pid).split(|&byte| byte == 0).any(|variable| variable.starts_with(mark.as_bytes()))
}

/// The environment a process was started with; empty for a kernel thread and for a zombie, which is as good as gone.
fn environment(pid: i32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default()
}

/// All process numbers there are.
pub fn numbers() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Ends all of the fleet's processes: asks the daemons first, then takes what is left. Returns once they are gone.
///
/// # Errors
/// When one survives SIGKILL for [`KILL_LIMIT`], by name.
pub fn end_all(fleet: &FleetName) -> Result<()> {
    let processes = of_fleet(fleet);
    // VMMs outlive their daemon by design, and a daemon that lives may start another one: daemons go first.
    let daemons: Vec<_> = processes.iter().filter(|process| process.program != VMM_PROGRAM).collect();
    daemons.iter().for_each(|daemon| daemon.signal(Signal::TERM));
    let deadline = Instant::now() + TERM_LIMIT;
    for daemon in daemons {
        daemon.wait(deadline.saturating_duration_since(Instant::now()));
    }
    // A daemon may have started something between the listing and its end; now nobody is left who could.
    let left = of_fleet(fleet);
    left.iter().for_each(|process| process.signal(Signal::KILL));
    for process in left {
        if !process.wait(KILL_LIMIT) {
            return Err(anyhow!("{} (pid {}) does not end after SIGKILL", process.program, process.pid));
        }
    }
    Ok(())
}

/// File name of the program that runs one machine.
pub const VMM_PROGRAM: &str = "mashine-vmm";
/// How long daemons get to end by themselves.
const TERM_LIMIT: Duration = Duration::from_secs(2);
/// How long the kernel gets to end a process: freeing gigabytes takes it a while.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Waits until a line of a log satisfies `wanted`, or `child` ends, or `limit` is over.
///
/// # Errors
/// The latter two, with the end of the log.
pub fn await_line(
    name: &str,
    child: &mut Child,
    log: &Path,
    limit: Duration,
    wanted: impl Fn(&str) -> bool,
) -> Result<()> {
    let lines = Lines::of(log)?;
    let deadline = Instant::now() + limit;
    loop {
        signals::check()?;
        if lines.text()?.lines().any(&wanted) {
            return Ok(());
        }
        if let Some(status) = child.try_wait().with_context(|| format!("asking for {name}"))? {
            return Err(anyhow!("{name} ended before it was ready ({status}):\n{}", tail(log)));
        }
        if Instant::now() >= deadline {
            return Err(anyhow!("{name} was not ready within {limit:?}:\n{}", tail(log)));
        }
        // A process that ends writes nothing, so the wait for a line is cut short now and then to ask for it.
        lines.wait(LINE_WAIT.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// A log that grows.
#[derive(Debug)]
pub(crate) struct Lines {
    log: PathBuf,
    watch: OwnedFd,
}

impl Lines {
    /// Watches a log, which must be there.
    pub(crate) fn of(log: &Path) -> Result<Self> {
        use rustix::fs::inotify;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context("watching a log")?;
        inotify::add_watch(&watch, log, inotify::WatchFlags::MODIFY).context("watching a log")?;
        Ok(Self { log: log.to_owned(), watch })
    }

    /// What it says now.
    pub(crate) fn text(&self) -> Result<String> {
        let text = std::fs::read(&self.log).with_context(|| format!("reading {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Waits until it has grown, at most `limit`.
    pub(crate) fn wait(&self, limit: Duration) {
        wait_readable(&self.watch, limit);
        let mut sink = [0; 4096];
        while rustix::io::read(&self.watch, &mut sink).is_ok_and(|bytes| bytes > 0) {}
    }
}

/// Longest wait for a line before the process itself is looked at.
const LINE_WAIT: Duration = Duration::from_millis(200);

/// The last lines of a log, for an error.
pub fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(15);
    lines.get(from..).unwrap_or_default().iter().map(|line| format!("    {line}\n")).collect()
}
