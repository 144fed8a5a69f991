//! The processes that a fleet or a lab started, and waiting for what they do.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::layout::FleetName;
use super::processes;
use super::{services, state};
use crate::{command, signals};

/// How often what tells of no change by itself is asked whether it has come: a socket's file, a list of hosts.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Processes by the names of their services.
#[derive(Debug)]
pub(crate) struct Children {
    fleet: FleetName,
    running: Vec<(String, Child)>,
    /// How long they get to become ready.
    limit: Duration,
}

impl Children {
    pub(crate) const fn new(fleet: FleetName, limit: Duration) -> Self {
        Self { fleet, running: Vec::new(), limit }
    }

    /// Starts one.
    ///
    /// # Errors
    /// When that fails, or we are to end.
    pub(crate) fn start(&mut self, service: processes::Service) -> Result<()> {
        signals::check()?;
        let child = service.start(&self.fleet)?;
        self.running.push((service.name, child));
        Ok(())
    }

    /// Takes over one that was started.
    pub(crate) fn adopt(&mut self, name: String, child: Child) {
        self.running.push((name, child));
    }

    /// Gives one up.
    pub(crate) fn release(&mut self, name: &str) -> Option<Child> {
        let place = self.running.iter().position(|(running, _)| running == name)?;
        Some(self.running.swap_remove(place).1)
    }

    /// Process number of one.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.running.iter().find(|(running, _)| running == name).map(|(_, child)| child.id())
    }

    /// Waits until the control plane answers.
    ///
    /// # Errors
    /// When it does not in time.
    pub(crate) fn await_control(&mut self) -> Result<()> {
        let socket = self.fleet.api_socket();
        self.await_that("the control plane's API", || UnixStream::connect(&socket).is_ok())
    }

    /// Waits until so many hosts have joined.
    ///
    /// # Errors
    /// When they do not in time.
    pub(crate) fn await_hosts(&mut self, count: usize, cli: impl Fn() -> Command) -> Result<()> {
        self.await_that("all hosts to join", || {
            command::read(cli().args(["host", "ls", "--json"]))
                .is_ok_and(|text| state::online_hosts(&text) == count)
        })
    }

    fn await_that(&mut self, what: &str, is_so: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        while !is_so() {
            signals::check()?;
            self.check()?;
            if Instant::now() >= deadline {
                let logs: String = self.running.iter().map(|(name, _)| self.shown_log(name)).collect();
                bail!("waited {:?} for {what}\n{logs}", self.limit);
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(())
    }

    /// # Errors
    /// When one has ended, with the end of its log.
    fn check(&mut self) -> Result<()> {
        let mut ended = None;
        for (name, child) in &mut self.running {
            if let Some(status) = child.try_wait().with_context(|| format!("asking for {name}"))? {
                ended = Some((name.clone(), status));
            }
        }
        match ended {
            Some((name, status)) => Err(anyhow!("{name} ended ({status})\n{}", self.shown_log(&name))),
            None => Ok(()),
        }
    }

    fn shown_log(&self, name: &str) -> String {
        format!("  log of {name}:\n{}", processes::tail(&services::log(&self.fleet, name)))
    }

    /// Takes notice of those that ended.
    pub(crate) fn reap(&mut self) {
        for (_, child) in &mut self.running {
            // It has ended, or who ended it has said that it would not.
            let _ = child.try_wait();
        }
    }
}
