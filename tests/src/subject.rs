//! The machine under test and those who watch it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use controlplane::api::{Machine, MachineState, Phase};
use xtask::demo::echo::Echo;
use xtask::demo::guest::{self, Commands, Done, ECHO_PORT, Populated, Status, Verified};
use xtask::demo::watch::Watch;
use xtask::fleet::layout::Host;

use crate::ground::{Ground, until};
use crate::moves::Move;
use crate::tidy;

/// Pages that the guest rewrites per second.
const DIRTY_PAGES_PER_S: u32 = 2000;
/// A host that came back without a machine says so with its heartbeats; what is asked of both ends of a migration takes a few seconds.
const LOSS_LIMIT: Duration = Duration::from_secs(30);

/// A machine whose memory is full of random bytes and rewritten all the while, with a TCP connection that never rests, and
/// observers who look for a second copy and for a clock that steps back.
#[derive(Debug)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its address.
    pub ip4: IpAddr,
    commands: Commands,
    echo: Echo,
    watch: Watch,
    last: Status,
}

impl Subject {
    /// Launches it with `memory` of RAM and has it work.
    ///
    /// # Errors
    /// When it does not run.
    pub fn launch(ground: &Ground, on: Host, memory: &str) -> Result<Self> {
        let name = "subject";
        let machine: Machine =
            ground.ask(&["launch", "--name", name, "--host", &on.name(), "--memory", memory])?;
        Self::put_to_work(ground, name, IpAddr::V4(machine.ip4))
    }

    fn put_to_work(ground: &Ground, name: &str, ip4: IpAddr) -> Result<Self> {
        let client = ground.fleet.name().fabric_namespace();
        let mut commands = Commands::connect(&client, ip4)?;
        let _: Populated = commands.ask("populate entropy=100")?;
        let _: Done = commands.ask(&format!("dirty rate={DIRTY_PAGES_PER_S} pattern=rand"))?;
        let echo = Echo::start(guest::connect(&client, ip4, ECHO_PORT)?)?;
        let watch = Watch::start(ground.fleet.name(), Commands::connect(&client, ip4)?)?;
        let last = commands.ask("status")?;
        Ok(Self { name: name.to_owned(), ip4, commands, echo, watch, last })
    }

    /// Begins to move it.
    ///
    /// # Errors
    /// When that is refused.
    pub fn move_to(&self, ground: &Ground, to: Host) -> Result<Move> {
        Move::begin(ground, &self.name, to)
    }

    /// It runs on `host`, only there, with its memory, clock and connections as they should be; and nothing is left elsewhere.
    ///
    /// # Errors
    /// What is wrong.
    pub fn is_well_on(&mut self, ground: &Ground, host: Host) -> Result<()> {
        self.echo.echo_after(Instant::now()).context("the echo connection is broken")?;
        let now: Status = self.commands.ask("status")?;
        if now.boot_id != self.last.boot_id {
            bail!("the guest was booted anew");
        }
        if now.uptime_us < self.last.uptime_us || now.pages_written < self.last.pages_written {
            bail!("the guest went back in time: {now:?} after {:?}", self.last);
        }
        self.last = now;
        let seen: Verified = self.commands.ask("verify")?;
        if seen.wrong > 0 || !seen.sum_ok {
            bail!("the guest's memory is damaged: {seen:?}");
        }
        tidy::is_on(ground, &self.name, host)
    }

    /// Another migration, with nothing in its way, succeeds; the machine is well thereafter.
    ///
    /// # Errors
    /// What went wrong.
    pub fn can_still_move(&mut self, ground: &Ground, to: Host) -> Result<()> {
        self.move_to(ground, to)?.ends_as(ground, Phase::Succeeded).context("migrating again")?;
        self.is_well_on(ground, to).context("after migrating again")
    }

    /// It was lost with its host's memory: the control plane says so, no host holds anything of it, and it can be started again, from
    /// its kernel. Returns the new one. Never did two copies of the old one run.
    ///
    /// # Errors
    /// When that is not so.
    pub fn start_again(self, ground: &Ground) -> Result<Self> {
        until("the machine to be given up", LOSS_LIMIT, || {
            let view = ground.machine(&self.name)?;
            let failed = view.state == MachineState::Failed && view.reason.is_some();
            Ok(if failed { Ok(()) } else { Err(format!("it is {}: {:?}", view.state, view.reason)) })
        })?;
        tidy::nothing_is_held(ground)?;
        let _: Machine = ground.ask(&["start", &self.name])?;
        let Self { name, ip4, echo, watch, .. } = self;
        let reborn = Self::put_to_work(ground, &name, ip4)?;
        // Its connections end with it: the new guest knows nothing of them.
        let (verdict, seen) = (echo.finish(), watch.finish());
        match (verdict.broken, seen.two_copies) {
            (Some(_), None) => Ok(reborn),
            (None, _) => bail!("a connection outlived the guest that it led to"),
            (_, Some(wrong)) => bail!("{wrong}"),
        }
    }

    /// Ends it and asks the observers what they saw.
    ///
    /// # Errors
    /// When they saw what must not be.
    pub fn finish(self) -> Result<()> {
        let (verdict, seen) = (self.echo.finish(), self.watch.finish());
        let wrongs = [verdict.broken, seen.two_copies, seen.uptime_wrong];
        let wrongs: Vec<String> = wrongs.into_iter().flatten().collect();
        if wrongs.is_empty() { Ok(()) } else { bail!("{}", wrongs.join("; ")) }
    }
}
