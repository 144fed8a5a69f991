//! The demo from top to bottom.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::echo::Echo;
use super::guest::{self, Commands, Done, ECHO_PORT, Gap, Populated, Status, Verified};
use super::result::{DemoResult, Migration, Options};
use super::watch::Watch;
use crate::answers::{self, Machine, Moved};
use crate::fleet::leaks::Baseline;
use crate::fleet::{self, Fleet, Plan};
use crate::repository::Binaries;
use crate::signals;

/// The machine's name.
const MACHINE: &str = "demo";
/// Machines of the demo's size that a host has RAM for: the copy that was given away counts until it is released, shortly after the move.
const MACHINES_PER_HOST: u64 = 2;
/// How long the guest rewrites its memory before the first migration.
const WARM_UP: Duration = Duration::from_secs(1);

/// Runs the demo, prints its timeline through `say`, takes everything down and looks for leaks.
///
/// An error of the demo itself is printed and in the result; so that whatever happened, the result tells how far it came.
///
/// # Errors
/// When the fleet is up already.
pub fn run(options: &Options, binaries: Binaries, say: &dyn Fn(&str)) -> Result<DemoResult> {
    if fleet::is_up(&options.fleet) {
        bail!(
            "the fleet `{0}` is up: another demo runs, or one was killed; `cargo xtask down --fleet {0}` removes it",
            options.fleet
        );
    }
    let baseline = Baseline::take();
    let mut result = DemoResult { dirty_pages_per_s: options.dirty, ..DemoResult::default() };
    let mut faults = Vec::new();
    if let Err(error) = demonstrate(options, binaries, say, &mut result, &mut faults) {
        faults.push(format!("{error:#}"));
    }
    result.leaks = baseline.leaks(&options.fleet);
    say(&format!(
        "{:>9}  taken down; left behind: {}",
        "",
        match result.leaks.as_slice() {
            [] => "nothing".to_owned(),
            leaks => leaks.join(", "),
        }
    ));
    if result.pages_wrong > 0 {
        faults.push(format!("{} pages of the guest are wrong", result.pages_wrong));
    }
    faults.extend(result.leaks.iter().map(|leak| format!("left behind: {leak}")));
    result.ok = faults.is_empty();
    for fault in faults {
        say(&format!("FAILED: {fault}"));
    }
    Ok(result)
}

/// A line of the timeline, with the time since the start of the demo.
struct Timeline<'a> {
    begun: Instant,
    say: &'a dyn Fn(&str),
}

impl Timeline<'_> {
    fn tell(&self, what: &str) {
        (self.say)(&format!("{:>7.2} s  {what}", self.begun.elapsed().as_secs_f64()));
    }
}

fn demonstrate(
    options: &Options,
    binaries: Binaries,
    say: &dyn Fn(&str),
    result: &mut DemoResult,
    faults: &mut Vec<String>,
) -> Result<()> {
    let timeline = Timeline { begun: Instant::now(), say };
    let ram_limit = options.memory.saturating_mul(MACHINES_PER_HOST).to_string();
    let plan = Plan { name: options.fleet.clone(), hosts: 2, ram_limit, binaries };
    let fleet = Fleet::up(plan)?;
    timeline.tell("up: host-a, host-b and a client, each in a network namespace");

    let machine = launch(&fleet, options, &timeline)?;
    let client = fleet.name().fabric_namespace();
    let address = machine.ip4;
    timeline.tell(&format!(
        "launched `{MACHINE}` on {}: {address}, {}",
        machine.host.as_deref().unwrap_or("?"),
        machine.ip6
    ));

    let mut commands = Commands::connect(&client, address)?;
    let populated: Populated = commands.ask("populate entropy=100")?;
    let _: Done = commands.ask(&format!("dirty rate={} pattern=rand", options.dirty))?;
    result.ram_bytes = commands.ask::<Status>("status")?.ram_bytes;
    timeline.tell(&format!(
        "guest filled {} pages with random bytes and rewrites {} pages/s",
        populated.pages, options.dirty
    ));

    let echo = Echo::start(guest::connect(&client, address, ECHO_PORT)?)?;
    let watch = Watch::start(fleet.name(), Commands::connect(&client, address)?)?;
    timeline.tell("client echoes over one TCP connection every millisecond");
    let moved = migrate_to_and_fro(&fleet, options, &timeline, &mut commands, &echo, result);
    faults.extend(observe_end(echo, watch, &timeline, result));
    moved?;

    let _: Done = commands.ask("shutdown")?;
    fleet.down()
}

fn launch(fleet: &Fleet, options: &Options, timeline: &Timeline<'_>) -> Result<Machine> {
    let memory = options.memory.to_string();
    let options = ["--name", MACHINE, "--vcpu", "1", "--memory", &memory, "--host", "host-a"];
    answers::launch(fleet.cli(), options, &|line| timeline.tell(line))
}

fn migrate_to_and_fro(
    fleet: &Fleet,
    options: &Options,
    timeline: &Timeline<'_>,
    commands: &mut Commands,
    echo: &Echo,
    result: &mut DemoResult,
) -> Result<()> {
    rest(WARM_UP)?;
    let hosts = fleet.hosts();
    for target in hosts.iter().cycle().skip(1).take(usize::try_from(options.migrations)?) {
        signals::check()?;
        let _: Gap = commands.ask("gap reset")?;
        let begun = Instant::now();
        let moved = answers::migrate(fleet.cli(), MACHINE, &target.name(), &|line| timeline.tell(line))?;
        let after = echo.echo_after(Instant::now()).context("the echo connection broke")?;
        let gap: Gap = commands.ask("gap")?;
        let gap_client_us = echo.gap_us_max(begun, after).context("no echo during a migration")?;
        result.migrations.push(report(timeline, &moved, gap.gap_us_max, gap_client_us));

        let verified: Verified = commands.ask("verify")?;
        result.pages_wrong += verified.wrong;
        if !verified.sum_ok {
            bail!("the guest counted other page writes than its pages show");
        }
        timeline.tell(&format!(
            "guest checked {} pages: {} wrong, {} never written",
            verified.pages, verified.wrong, verified.unwritten
        ));
    }
    Ok(())
}

/// Prints where the time of a migration went and makes its row of the result.
fn report(timeline: &Timeline<'_>, moved: &Moved, gap_guest_us: u64, gap_client_us: u64) -> Migration {
    let times = &moved.timings;
    let ms = |us: u64| format!("{}.{:02} ms", us / 1000, us % 1000 / 10);
    timeline.tell(&format!(
        "migrated {} -> {} in {} ms: {} rounds, {} MiB ({} pages sent, {} zero)",
        moved.source,
        moved.target,
        times.total_ms,
        times.rounds,
        times.sent_bytes >> 20,
        times.pages_sent,
        times.pages_zero
    ));
    let detail = |text: &str| (timeline.say)(&format!("{:>9}    {text}", ""));
    detail(&format!(
        "pause {}: stop {}, harvest {}, last {} pages {}, save {}, restore {}, resume {}",
        ms(times.pause_us),
        ms(times.stop_us),
        ms(times.harvest_us),
        times.final_pages,
        ms(times.final_copy_us),
        ms(times.save_us),
        ms(times.restore_us),
        ms(times.resume_us)
    ));
    detail(&format!(
        "largest gap: guest {}, client {}; {} packets held and forwarded",
        ms(gap_guest_us),
        ms(gap_client_us),
        times.packets_held
    ));
    Migration {
        from: moved.source.clone(),
        to: moved.target.clone(),
        total_ms: times.total_ms,
        bytes_sent: times.sent_bytes,
        rounds: times.rounds,
        pause_us: times.pause_us,
        gap_guest_us,
        gap_client_us,
    }
}

/// Ends the observers; what they saw goes into the result. Returns what must not be.
fn observe_end(echo: Echo, watch: Watch, timeline: &Timeline<'_>, result: &mut DemoResult) -> Vec<String> {
    let (verdict, seen) = (echo.finish(), watch.finish());
    result.tcp_broken = verdict.broken.is_some();
    result.packets_lost = u64::from(verdict.packets_lost);
    result.uptime_unchanged = seen.uptime_wrong.is_none();
    timeline.tell(&format!(
        "connection {}: {} echoes, {} packets lost; uptime {}",
        if result.tcp_broken { "BROKEN" } else { "intact" },
        verdict.echoes,
        verdict.packets_lost,
        if result.uptime_unchanged { "went on unchanged" } else { "WRONG" },
    ));
    let broken = verdict.broken.map(|why| format!("the echo connection broke: {why}"));
    [seen.two_copies, seen.uptime_wrong, broken].into_iter().flatten().collect()
}

/// Lets time pass, unless we are asked to end.
fn rest(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        signals::check()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
