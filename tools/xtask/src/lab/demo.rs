//! The first form of the lab's demo: our own test guest moves between two lab hosts, while it writes and answers.
//!
//! It shows that the engine works on complete KVM with AMD-V, and how long each stage takes when it is emulated.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::options::Options;
use super::{Lab, Plan, Ready};
use crate::demo::echo::Echo;
use crate::demo::guest::{self, Commands, Done, ECHO_PORT, Gap, Populated, Status, Verified};
use crate::{answers, command, signals};

/// The machine's name.
const MACHINE: &str = "guest";
/// Its RAM, as `mashines launch` takes it.
const RAM: &str = "256M";
/// Pages it writes a second: enough that rounds have something to do, on a processor that is emulated.
const DIRTY: u32 = 500;

/// Brings a lab up, runs the demo in it, and takes it down.
///
/// # Errors
/// When a step fails; the lab is down then too.
pub fn run(options: &Options, ready: Ready) -> Result<()> {
    if options.hosts < 2 {
        bail!("a machine moves between two hosts at least");
    }
    let begun = Instant::now();
    let tell = |what: &str| println!("{:>7.2} s  {what}", begun.elapsed().as_secs_f64());
    let lab = Lab::up(Plan { options: options.clone(), ready }, &tell)?;
    tell("the lab is up and all hosts have joined");
    demonstrate(&lab, &tell)?;
    lab.down()?;
    tell("taken down");
    Ok(())
}

/// The demo in a lab that is up; it leaves nothing there.
///
/// # Errors
/// When the connection breaks, a page is wrong, or the guest is another afterwards.
pub fn demonstrate(lab: &Lab, tell: &dyn Fn(&str)) -> Result<()> {
    let options = ["--name", MACHINE, "--vcpu", "1", "--memory", RAM, "--host", "host-a"];
    let machine = answers::launch(lab.cli(), options, tell)?;
    tell(&format!("launched `{MACHINE}` on host-a: {}", machine.ip4));

    let client = lab.client_namespace();
    let mut commands = Commands::connect(&client, machine.ip4)?;
    let before: Status = commands.ask("status")?;
    tell(&format!("the guest answers, {} ms after its boot", before.uptime_us / 1000));
    let populated: Populated = commands.ask("populate entropy=100")?;
    let _: Done = commands.ask(&format!("dirty rate={DIRTY} pattern=rand"))?;
    tell(&format!("guest filled {} pages and rewrites {DIRTY} a second", populated.pages));

    let echo = Echo::start(guest::connect(&client, machine.ip4, ECHO_PORT)?)?;
    let moved = ["host-b", "host-a"].into_iter().try_for_each(|target| {
        signals::check()?;
        migrate(lab, target, &mut commands, &echo, tell)
    });
    let verdict = echo.finish();
    if let Some(why) = verdict.broken {
        bail!("the echo connection broke: {why}");
    }
    moved?;
    let after: Status = commands.ask("status")?;
    if after.boot_id != before.boot_id || after.uptime_us <= before.uptime_us {
        bail!("the guest booted again, or its uptime went back: {before:?}, {after:?}");
    }
    tell(&format!("connection intact: {} echoes, {} packets lost", verdict.echoes, verdict.packets_lost));
    command::read(lab.cli().args(["rm", MACHINE, "--force"])).map(drop)
}

fn migrate(lab: &Lab, target: &str, commands: &mut Commands, echo: &Echo, tell: &dyn Fn(&str)) -> Result<()> {
    let _: Gap = commands.ask("gap reset")?;
    let begun = Instant::now();
    let timings = answers::migrate(lab.cli(), MACHINE, target, tell)?.timings;
    let after = echo.echo_after(Instant::now()).context("the echo connection broke")?;
    let gap: Gap = commands.ask("gap")?;
    let client_us = echo.gap_us_max(begun, after).context("no echo during a migration")?;
    tell(&format!(
        "migrated to {target} in {} ms: {} rounds, {} MiB, pause {} ms, largest gap: guest {} ms, client {} ms",
        timings.total_ms,
        timings.rounds,
        timings.sent_bytes >> 20,
        timings.pause_us / 1000,
        gap.gap_us_max / 1000,
        client_us / 1000
    ));
    let verified: Verified = commands.ask("verify")?;
    if verified.wrong > 0 || !verified.sum_ok {
        bail!("pages of the guest are wrong: {verified:?}");
    }
    tell(&format!("guest checked {} pages: none wrong", verified.pages));
    Ok(())
}
