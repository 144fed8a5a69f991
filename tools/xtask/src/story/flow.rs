//! The story from top to bottom.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::copies;
use super::facts::Facts;
use super::pgbench::{self, Pgbench};
use super::result::{Migration, Options, StoryResult};
use super::services::{self, Abilities};
use super::session::{COUNT, Session};
use super::site::{self, Guest, Site};
use crate::{answers, command, fleet, signals};

/// The machine's name.
const MACHINE: &str = "story";
/// A machine that boots, on real hardware: Debian's services want some seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// How long a session may be silent after a migration, on real hardware.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long everything runs before the first migration and between two.
const BETWEEN: Duration = Duration::from_secs(2);

/// How `mashines image build` makes the image of the short form.
const BUSYBOX: [&str; 1] = ["busybox"];
/// The same for the long form; a flavour follows.
const DEBIAN: [&str; 6] =
    ["debian-12", "--package", "postgresql", "--package", "postgresql-contrib", "--flavour"];

/// What is open and running while the machine moves. Dropped, it ends.
struct Load {
    ssh: Option<Session>,
    enter: Session,
    /// What a client sees: over ssh where there is a server, else over the agent.
    echo: Session,
    pgbench: Option<Pgbench>,
    engine: Option<&'static str>,
}

/// Tells it at a site that is up; leaves no machine there. What went wrong without ending it is added to `faults`.
///
/// # Errors
/// When a step fails; `result` says how far it came.
pub fn tell(
    site: &Site,
    options: &Options,
    image: &str,
    say: &dyn Fn(&str),
    result: &mut StoryResult,
    faults: &mut Vec<String>,
) -> Result<()> {
    let guest = launch(site, options, image, say, result)?;
    let outcome = live(site, &guest, options, say, result, faults);
    if outcome.is_err() {
        say(&format!("the end of its console:\n{}", guest.console()));
    }
    let removed = command::read(&mut site.cli(["rm", MACHINE, "--force"]));
    outcome.and(removed.map(drop))
}

fn launch(
    site: &Site,
    options: &Options,
    image: &str,
    say: &dyn Fn(&str),
    result: &mut StoryResult,
) -> Result<Guest> {
    let key = site::story_key(site)?;
    let public = key.with_extension("pub").display().to_string();
    let memory =
        options.memory.clone().unwrap_or_else(|| if options.short { "256M" } else { "1G" }.to_owned());
    let vcpus = options.vcpus.unwrap_or(if options.short { 1 } else { 2 }).to_string();
    let limit = format!("{}s", site.patience(BOOT_LIMIT).as_secs());
    let [first, _] = &site.hosts;
    let mut arguments = vec![
        "--name",
        MACHINE,
        "--image",
        image,
        "--memory",
        &memory,
        "--vcpu",
        &vcpus,
        "--ssh-key",
        &public,
        "--host",
        first,
        "--timeout",
        &limit,
    ];
    arguments.extend(site.kernel_argument().iter().flat_map(|argument| ["--cmdline", argument]));
    let begun = Instant::now();
    let machine = answers::launch(site.cli([]), arguments, say)?;
    say(&format!("launched `{MACHINE}` of the image {image} on {first}: {}", machine.ip6));
    let guest = Guest::new(site, MACHINE, machine.ip6, Some(key));
    if let Err(error) = guest.await_agent(site.patience(BOOT_LIMIT)) {
        say(&format!("the end of its console:\n{}", guest.console()));
        return Err(error);
    }
    result.boot_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    say(&format!("it runs commands, {} ms after the launch", result.boot_ms));
    Ok(guest)
}

fn live(
    site: &Site,
    guest: &Guest,
    options: &Options,
    say: &dyn Fn(&str),
    result: &mut StoryResult,
    faults: &mut Vec<String>,
) -> Result<()> {
    let abilities = if options.short { Abilities::default() } else { Abilities::of(guest)? };
    if !options.short && !abilities.missing().is_empty() {
        bail!("the image lacks {}; without --short the story needs them", abilities.missing().join(", "));
    }
    let mut load = begin(site, guest, &abilities, say)?;
    let first = guest.facts()?;
    result.kernel.clone_from(&first.kernel);
    std::thread::sleep(BETWEEN);
    let before = guest.facts()?;
    let begun = Instant::now();
    say(&format!(
        "Linux {}, up {:.0} s, {} processes of user space",
        before.kernel,
        before.uptime_s,
        first.in_common(&before)
    ));
    let [one, other] = &site.hosts;
    let mut ways = [(one, other), (other, one)].into_iter().cycle();
    for _ in 0..options.migrations() {
        let Some((from, to)) = ways.next() else { break };
        signals::check()?;
        let migration = migrate(site, from, to, &load, say)?;
        result.migrations.push(migration);
        if let Some(pgbench) = &mut load.pgbench {
            pgbench.check()?;
        }
        std::thread::sleep(BETWEEN);
    }
    end(guest, load, say, result, faults)?;
    let after = guest.facts()?;
    judge(&first, &before, &after, begun.elapsed(), say, result, faults);
    Ok(())
}

/// Opens the sessions and starts the services that the image has.
fn begin(site: &Site, guest: &Guest, abilities: &Abilities, say: &dyn Fn(&str)) -> Result<Load> {
    // A prompt may stand on the line before the first number.
    let enter = Session::counting_in_terminal("enter", &mut guest.enter(), &format!("echo; {COUNT}\n"))?;
    enter.arrival_after(Instant::now(), site.patience(SILENCE_LIMIT))?;
    say("a session in a terminal counts");
    let (mut ssh, echo) = if abilities.ssh {
        guest.await_ssh(site.patience(BOOT_LIMIT))?;
        let ssh = guest.among_clients(|| Session::counting("ssh", &mut guest.ssh(COUNT), ""))??;
        let echo = guest.among_clients(|| Session::echoing("echo over ssh", &mut guest.ssh("cat")))??;
        (Some(ssh), echo)
    } else {
        (None, Session::echoing("echo over the agent", &mut guest.exec("cat"))?)
    };
    echo.arrival_after(Instant::now(), site.patience(SILENCE_LIMIT))?;
    if let Some(ssh) = &mut ssh {
        ssh.arrival_after(Instant::now(), site.patience(SILENCE_LIMIT))?;
        say("an ssh session counts, another echoes");
    }
    copies::there_and_back(guest, &site.name.state_dir(), abilities.ssh)?;
    say("files went in and came back as they were");
    if let Some(engine) = abilities.containers {
        services::start_container(guest, engine, &site.name.state_dir())?;
        say(&format!("{engine} runs a container of an image that was made here"));
    }
    let mut load = Load { ssh, enter, echo, pgbench: None, engine: abilities.containers };
    if abilities.postgresql {
        services::open_postgresql(guest)?;
        pgbench::fill(&site.clients(), guest.address())?;
        load.pgbench =
            Some(Pgbench::start(&site.clients(), guest.address(), site.transactions_per_second())?);
        say("pgbench runs, from the clients' network");
    }
    Ok(load)
}

fn migrate(site: &Site, from: &str, to: &str, load: &Load, say: &dyn Fn(&str)) -> Result<Migration> {
    let begun = Instant::now();
    let timings = answers::migrate(site.cli([]), MACHINE, to, say)?.timings;
    let limit = site.patience(SILENCE_LIMIT);
    let now = Instant::now();
    let answered = load.echo.arrival_after(now, limit)?;
    load.enter.arrival_after(now, limit)?;
    if let Some(ssh) = &load.ssh {
        ssh.arrival_after(now, limit)?;
    }
    let gap = load.echo.gap_us_max(begun, answered);
    say(&format!(
        "migrated {from} -> {to} in {} ms: {} rounds, {} MiB, pause {} ms, largest gap of a client {} ms",
        timings.total_ms,
        timings.rounds,
        timings.sent_bytes >> 20,
        timings.pause_us / 1000,
        gap.unwrap_or(0) / 1000
    ));
    Ok(Migration {
        from: from.to_owned(),
        to: to.to_owned(),
        total_ms: timings.total_ms,
        bytes_sent: timings.sent_bytes,
        rounds: timings.rounds,
        pause_us: timings.pause_us,
        gap_client_us: gap,
    })
}

/// Ends what ran, and says how it fared.
fn end(
    guest: &Guest,
    mut load: Load,
    say: &dyn Fn(&str),
    result: &mut StoryResult,
    faults: &mut Vec<String>,
) -> Result<()> {
    if let Some(pgbench) = load.pgbench.take() {
        let figures = pgbench.finish()?;
        say(&format!("pgbench: {} transactions, {} failed", figures.done, figures.failed));
        result.pgbench_failed = Some(figures.failed);
        if figures.failed > 0 || figures.done == 0 {
            faults.push(format!("pgbench: {} transactions failed, of {}", figures.failed, figures.done));
        }
    }
    if let Some(engine) = load.engine {
        let count = services::container_count(guest, engine)?;
        say(&format!("the container counted to {count}, without a gap"));
    }
    let mut alive = |session: &Session, what: &str| {
        let (outcome, count) = session.verdict();
        match &outcome {
            Ok(()) => say(&format!("{what}: alive, {count} numbers, none lost or doubled")),
            Err(error) => faults.push(format!("{error:#}")),
        }
        outcome.is_ok()
    };
    result.enter_alive = Some(alive(&load.enter, "enter session"));
    let echo = alive(&load.echo, "echo session");
    result.ssh_alive = load.ssh.as_ref().map(|ssh| alive(ssh, "ssh session") && echo);
    Ok(())
}

/// Compares what the guest said before and after.
fn judge(
    first: &Facts,
    before: &Facts,
    after: &Facts,
    elapsed: Duration,
    say: &dyn Fn(&str),
    result: &mut StoryResult,
    faults: &mut Vec<String>,
) {
    result.boot_id_unchanged = before.boot_id == after.boot_id;
    if !result.boot_id_unchanged || after.uptime_s < before.uptime_s {
        faults.push("the guest booted again, or its uptime went back".to_owned());
    }
    let gone = first.gone(before, after);
    result.pids_unchanged = gone.is_empty();
    if !gone.is_empty() {
        faults.push(format!("processes that were there before are gone: {}", gone.join(", ")));
    }
    for line in before.bad_messages() {
        say(&format!("note: before the first migration the guest's kernel said: {line}"));
    }
    result.dmesg_bad = after.bad_messages_since(before);
    faults.extend(result.dmesg_bad.iter().map(|line| format!("the guest's kernel: {line}")));
    say(&format!(
        "boot id {}, uptime {:.1} s more after {:.1} s, {} processes {}",
        if result.boot_id_unchanged { "unchanged" } else { "CHANGED" },
        after.uptime_s - before.uptime_s,
        elapsed.as_secs_f64(),
        first.in_common(before),
        if result.pids_unchanged { "unchanged" } else { "CHANGED" },
    ));
}

/// Builds the image if the store lacks it, or has it with an older agent than ours.
///
/// # Errors
/// When it cannot be built.
pub fn provide_image(mashines: &Path, agent: &Path, options: &Options, say: &dyn Fn(&str)) -> Result<String> {
    if let Some(name) = &options.image {
        return Ok(name.clone());
    }
    let flavour = options.flavour.as_str();
    let (name, recipe) = if options.short {
        ("lab-busybox".to_owned(), BUSYBOX.to_vec())
    } else {
        (format!("lab-debian-12-{flavour}"), [&DEBIAN[..], &[flavour]].concat())
    };
    let images = fleet::images();
    let made = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    let image = made(&images.join("images").join(format!("{name}.json")));
    // The small one takes seconds, so it follows what builds it too.
    let parts = if options.short { made(agent).max(made(mashines)) } else { made(agent) };
    if image.is_some() && image >= parts {
        return Ok(name);
    }
    say(&format!("building the image {name}, once: Debian takes minutes"));
    let mut build = std::process::Command::new(mashines);
    build.args(["image", "build"]).args(recipe).args(["--name", &name, "--agent"]).arg(agent);
    build.arg("--store").arg(&images);
    command::read_told(&mut build, |line| say(line))?;
    Ok(name)
}
