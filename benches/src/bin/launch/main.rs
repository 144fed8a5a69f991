//! How long from `launch` to the first instruction of the guest, and what does one VMM process cost besides the guest's RAM?
//!
//! The test guest's first instruction in 64-bit mode writes the letter M to the serial port. The VMM puts it into the console ring, which is a
//! memory file: this program opens it through `/proc` as soon as the VMM has it, and reads its first word (the number of bytes written so far) every
//! 50 microseconds until it is not zero. No log, no clock of another process and no request to the API is involved.
//!
//! Two ways to launch, in turns: a REST request, and the command line (the start of its process included). When the answer comes
//! that the machine runs is timed too. Machines run on alternate hosts and are removed before the next one is launched.
//!
//! Run with: `cargo xtask bench launch --memory 128M --launches 20`

mod console;
mod resident;

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use benches::api::Api;
use benches::cpu::{self, HostTicks};
use benches::spread::Spread;
use benches::{bed, place};
use clap::Parser;
use resident::Resident;
use serde::Serialize;
use serde_json::{Value, json};
use xtask::fleet::Fleet;
use xtask::fleet::layout::FleetName;
use xtask::{command, signals};

/// The machine's name.
const MACHINE: &str = "bench";
/// How long a removed machine's process may take to go.
const GONE_LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked for.
const GONE_POLL: Duration = Duration::from_millis(20);
/// Longest wait for the answer that the machine runs, in seconds.
const STARTED_WAIT_S: u32 = 30;

#[derive(Debug, Parser)]
#[command(
    about = "Time from launch to the guest's first instruction, and memory of a VMM besides the guest's"
)]
struct Arguments {
    /// RAM of the machines: a number of bytes, or with K, M or G behind it.
    #[arg(long, default_value = "128M", value_parser = bed::parse_size)]
    memory: u64,
    /// Launches by each way.
    #[arg(long, default_value_t = 20)]
    launches: u32,
    /// One JSON object on stdout; the table goes to stderr.
    #[arg(long)]
    json: bool,
    /// Name of the fleet that is made for it.
    #[arg(long, default_value = "benchl")]
    fleet: FleetName,
}

/// How a machine is launched.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    Rest,
    CommandLine,
}

/// One launch; times since it was asked for, in milliseconds.
#[derive(Debug, Clone, Serialize)]
struct One {
    way: Way,
    /// The VMM process was there.
    process_ms: f64,
    /// The guest had written its first byte.
    first_byte_ms: f64,
    /// We were told that the machine runs: two requests, or the end of the command line.
    answered_ms: f64,
    resident: Resident,
}

#[derive(Serialize)]
struct Report {
    place: place::Place,
    load_after: f64,
    ram_bytes: u64,
    launches: Vec<One>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let binaries = bed::prepare()?;
    let place = place::Place::look();
    eprintln!("{}", place.line());
    let fleet = bed::fleet(&arguments.fleet, binaries, arguments.memory, 2)?;
    let measured = measure(&fleet, &arguments);
    let launches = match fleet.down() {
        Ok(()) => measured?,
        Err(error) => return measured.and(Err(error)),
    };
    let report = Report { place, load_after: place::load(), ram_bytes: arguments.memory, launches };
    let table = report.table();
    if arguments.json {
        eprint!("{table}");
        println!("{}", serde_json::to_string(&report).context("writing the report")?);
    } else {
        print!("{table}");
    }
    Ok(())
}

fn measure(fleet: &Fleet, arguments: &Arguments) -> Result<Vec<One>> {
    let hosts: Vec<String> = fleet.hosts().iter().map(xtask::fleet::layout::Host::name).collect();
    let mut launches = Vec::new();
    // The first launch on each host and by each way warms up and does not count.
    for number in 0..arguments.launches + 2 {
        for way in [Way::Rest, Way::CommandLine] {
            signals::check()?;
            let host = hosts.get(usize::try_from(number)? % hosts.len().max(1)).context("no host")?;
            let one = launch(fleet, way, host, arguments.memory)
                .with_context(|| format!("launch {number} by {way:?} on {host}"))?;
            if number >= 2 {
                launches.push(one);
            }
        }
    }
    Ok(launches)
}

/// Launches one machine, watches its first byte come, looks at its memory and removes it.
fn launch(fleet: &Fleet, way: Way, host: &str, memory: u64) -> Result<One> {
    let api = Api::of(fleet.name());
    let daemon = cpu::daemon_of(fleet.name(), host)?;
    let asked = Instant::now();
    let (watched, answered) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| console::first_byte(daemon));
        let answered = match way {
            Way::Rest => ask_rest(&api, host, memory),
            Way::CommandLine => ask_command_line(fleet, host, memory),
        };
        let answered = answered.map(|()| Instant::now());
        (watcher.join().unwrap_or_else(|_| Err(anyhow!("the watcher panicked"))), answered)
    });
    let (answered, watched) = (answered?, watched?);
    let ms = |moment: Instant| moment.saturating_duration_since(asked).as_secs_f64() * 1000.0;
    let resident = resident::of(watched.pid)?;
    command::read(fleet.cli().args(["rm", MACHINE, "--force"]))?;
    await_gone(fleet, daemon)?;
    Ok(One {
        way,
        process_ms: ms(watched.process),
        first_byte_ms: ms(watched.first_byte),
        answered_ms: ms(answered),
        resident,
    })
}

fn ask_rest(api: &Api, host: &str, memory: u64) -> Result<()> {
    let body = json!({"name": MACHINE, "vcpus": 1, "ram_bytes": memory, "host": host});
    let _: Value = api.ask("POST", "/v1/machines", Some(&body))?;
    let wait = format!("/v1/machines/{MACHINE}/wait?state=started&timeout={STARTED_WAIT_S}");
    api.ask::<Value>("GET", &wait, None).map(drop)
}

fn ask_command_line(fleet: &Fleet, host: &str, memory: u64) -> Result<()> {
    let memory = memory.to_string();
    let mut launch = fleet.cli();
    launch.args(["launch", "--json", "--name", MACHINE, "--vcpu", "1", "--memory", &memory, "--host", host]);
    command::read(&mut launch).map(drop)
}

/// Waits until the host runs no VMM any more.
fn await_gone(fleet: &Fleet, daemon: i32) -> Result<()> {
    let deadline = Instant::now() + GONE_LIMIT;
    while !HostTicks::read(fleet.name(), daemon)?.vmms.is_empty() {
        signals::check()?;
        ensure!(Instant::now() < deadline, "a removed machine's VMM runs on");
        std::thread::sleep(GONE_POLL);
    }
    Ok(())
}

impl Report {
    fn table(&self) -> String {
        let mut text = format!("{}, {:.1} at the end\n", self.place.line(), self.load_after);
        for (way, name) in [(Way::Rest, "REST"), (Way::CommandLine, "command line")] {
            let of_way = |one: &&One| {
                matches!((one.way, way), (Way::Rest, Way::Rest) | (Way::CommandLine, Way::CommandLine))
            };
            let spread =
                |figure: fn(&One) -> f64| Spread::of(self.launches.iter().filter(of_way).map(figure));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "\n{}", Spread::head(&format!("{name}, ms")));
            for (row, figure) in [
                ("VMM process is there", (|one| one.process_ms) as fn(&One) -> f64),
                ("first guest byte", |one| one.first_byte_ms),
                ("told that it runs", |one| one.answered_ms),
            ] {
                if let Some(spread) = spread(figure) {
                    let _ = writeln!(text, "{}", spread.row(row, 1));
                }
            }
        }
        let _ = writeln!(text, "\n{}", Spread::head("VMM besides RAM, KiB"));
        for (row, figure) in [
            ("private", (|one| one.resident.private_kib as f64) as fn(&One) -> f64),
            ("proportional", |one| one.resident.proportional_kib as f64),
            ("resident", |one| one.resident.resident_kib as f64),
        ] {
            if let Some(spread) = Spread::of(self.launches.iter().map(figure)) {
                let _ = writeln!(text, "{}", spread.row(row, 0));
            }
        }
        text
    }
}
