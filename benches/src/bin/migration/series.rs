//! One machine, moved to and fro at a set rate of dirtying.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use benches::api::Api;
use benches::cpu::{self, HostTicks};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::IpAddr;
use xtask::demo::echo::Echo;
use xtask::demo::guest::{self, Commands, Done, ECHO_PORT, Gap, Verified};
use xtask::fleet::Fleet;
use xtask::signals;

use super::outcome::{Cpu, One, Series, Timings};
use super::yardstick;

/// The machine's name.
const MACHINE: &str = "bench";
/// How long the guest dirties at its new rate before the first migration, and how long its VMM is watched at rest.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a source may take to release what it gave away.
const RELEASE_LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked for: neither the kernel nor the API tells when another process's child was collected.
const RELEASE_POLL: Duration = Duration::from_millis(20);

/// A machine, as far as it matters here.
#[derive(Deserialize)]
struct Machine {
    state: String,
    ip4: IpAddr,
}

/// A migration, as far as it matters here.
#[derive(Deserialize)]
struct Migration {
    phase: String,
    progress: Option<Progress>,
    timings: Option<Timings>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Progress {
    bytes_per_s: u64,
}

/// A running machine and the way to it.
pub struct Bench<'a> {
    fleet: &'a Fleet,
    api: Api,
    address: IpAddr,
    commands: Commands,
    /// Hosts' names with their daemons; the machine is on the first.
    hosts: [(String, i32); 2],
}

impl<'a> Bench<'a> {
    /// Launches it on the first host and fills its memory with random bytes.
    ///
    /// # Errors
    /// When it does not start.
    pub fn launch(fleet: &'a Fleet, ram_bytes: u64, vcpus: u32) -> Result<Self> {
        let names: Vec<String> = fleet.hosts().iter().map(xtask::fleet::layout::Host::name).collect();
        let [first, second] = names.try_into().map_err(|_| anyhow!("two hosts are needed"))?;
        let api = Api::of(fleet.name());
        let body = json!({"name": MACHINE, "vcpus": vcpus, "ram_bytes": ram_bytes, "host": first});
        let machine: Machine = api.ask("POST", "/v1/machines", Some(&body))?;
        let client = fleet.name().fabric_namespace();
        let mut commands = Commands::connect(&client, machine.ip4)?;
        let _: Done = commands.ask("populate entropy=100")?;
        let state = api.ask::<Machine>("GET", &format!("/v1/machines/{MACHINE}"), None)?.state;
        ensure!(state == "started", "the machine is `{state}`");
        let hosts =
            [first, second].map(|name| cpu::daemon_of(fleet.name(), &name).map(|daemon| (name, daemon)));
        let [first, second] = hosts;
        Ok(Self { fleet, api, address: machine.ip4, commands, hosts: [first?, second?] })
    }

    /// Warms up, then measures `count` migrations at `dirty` pages/s.
    ///
    /// # Errors
    /// When a migration fails, the connection breaks or a page is wrong.
    pub fn series(&mut self, dirty: u64, warm_up: u32, count: u32) -> Result<Series> {
        let client = self.fleet.name().fabric_namespace();
        let mut yardsticks = vec![self.yardstick()?];
        let _: Done = self.commands.ask(&format!("dirty rate={dirty} pattern=rand"))?;
        let echo = Echo::start(guest::connect(&client, self.address, ECHO_PORT)?)?;
        std::thread::sleep(SETTLE);
        let vmm_at_rest = self.at_rest()?;
        let mut migrations = Vec::new();
        for number in 0..warm_up + count {
            signals::check()?;
            let one =
                self.migrate(&echo).with_context(|| format!("migration {number} at {dirty} pages/s"))?;
            if number >= warm_up {
                migrations.push(one);
            }
        }
        let verified: Verified = self.commands.ask("verify")?;
        ensure!(
            verified.wrong == 0 && verified.sum_ok,
            "{} of {} pages are wrong{}",
            verified.wrong,
            verified.pages,
            if verified.sum_ok { "" } else { ", and writes were lost" }
        );
        let verdict = echo.finish();
        if let Some(why) = verdict.broken {
            bail!("the echo connection broke: {why}");
        }
        let _: Done = self.commands.ask("dirty rate=0")?;
        yardsticks.push(self.yardstick()?);
        let packets_lost = verdict.packets_lost;
        Ok(Series { dirty_pages_per_s: dirty, packets_lost, vmm_at_rest, yardsticks, migrations })
    }

    /// Share of a core that the machine's VMM uses while nothing moves, guest mode left out.
    fn at_rest(&self) -> Result<f64> {
        let daemon = self.hosts[0].1;
        let before = HostTicks::read(self.fleet.name(), daemon)?;
        let begun = Instant::now();
        std::thread::sleep(SETTLE);
        let after = HostTicks::read(self.fleet.name(), daemon)?;
        Ok(cpu::seconds(after.vmm_ticks.saturating_sub(before.vmm_ticks)) / begun.elapsed().as_secs_f64())
    }

    fn yardstick(&self) -> Result<yardstick::Yardstick> {
        let hosts = self.fleet.hosts();
        let [from, to] = hosts else { bail!("two hosts are needed") };
        let name = self.fleet.name();
        yardstick::measure(&name.host_namespace(from), &name.host_namespace(to), to.ip4())
    }

    /// One migration to the other host.
    fn migrate(&mut self, echo: &Echo) -> Result<One> {
        let before = self.released()?;
        let _: Gap = self.commands.ask("gap reset")?;
        let begun = Instant::now();
        let (timings, first_pass_bytes_per_s) = self.move_over()?;
        let wall = begun.elapsed();
        let after = echo.echo_after(Instant::now()).context("the echo connection broke")?;
        let gap: Gap = self.commands.ask("gap")?;
        let gap_client_us = echo.gap_us_max(begun, after).context("no echo during a migration")?;
        self.hosts.swap(0, 1);
        // The machine is on the first again; the accounts were read before it was.
        let [target, source] = self.released()?;
        let [source_before, target_before] = before;
        Ok(One {
            wall_ms: wall.as_secs_f64() * 1000.0,
            gap_guest_us: gap.gap_us_max,
            gap_client_us,
            first_pass_bytes_per_s,
            cpu: Cpu::between((&source_before, &source), (&target_before, &target)),
            timings,
        })
    }

    /// Waits until one VMM is left, on the first host, and reads the accounts of both hosts.
    fn released(&self) -> Result<[HostTicks; 2]> {
        let deadline = Instant::now() + RELEASE_LIMIT;
        let read = |index: usize| HostTicks::read(self.fleet.name(), self.hosts[index].1);
        loop {
            signals::check()?;
            let ticks = [read(0)?, read(1)?];
            if ticks[0].vmms.len() == 1 && ticks[1].vmms.is_empty() {
                return Ok(ticks);
            }
            ensure!(
                Instant::now() < deadline,
                "{RELEASE_LIMIT:?} after a move there are VMMs {:?} on {} and {:?} on {}",
                ticks[0].vmms,
                self.hosts[0].0,
                ticks[1].vmms,
                self.hosts[1].0
            );
            std::thread::sleep(RELEASE_POLL);
        }
    }

    /// Asks for the migration and follows it to its end. Returns its timings and the goodput of the first pass, which is the first goodput that is known.
    fn move_over(&self) -> Result<(Timings, Option<u64>)> {
        let path = format!("/v1/machines/{MACHINE}/migrate");
        let asked: Value = self.api.ask("POST", &path, Some(&json!({"target": self.hosts[1].0})))?;
        let id = asked.get("id").and_then(Value::as_str).context("a migration without an id")?;
        let mut first_pass = None;
        let ended = self.api.follow(&format!("/v1/migrations/{id}/watch"), |event| {
            let migration = Migration::deserialize(event).context("reading a migration")?;
            let goodput = migration.progress.as_ref().map(|progress| progress.bytes_per_s);
            first_pass = first_pass.or(goodput.filter(|&goodput| goodput > 0));
            Ok(matches!(migration.phase.as_str(), "succeeded" | "failed" | "cancelled").then_some(migration))
        })?;
        let timings = ended.timings.with_context(|| {
            format!("the migration ended as {} without timings: {:?}", ended.phase, ended.error)
        })?;
        ensure!(ended.phase == "succeeded", "the migration ended as {}: {:?}", ended.phase, ended.error);
        Ok((timings, first_pass))
    }
}
