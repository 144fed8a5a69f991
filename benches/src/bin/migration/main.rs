//! What does a live migration cost, and who notices it?
//!
//! Two hosts and a client, each in a network namespace; one machine whose RAM is full of random bytes, which it rewrites at a set rate; one TCP
//! connection that echoes every millisecond. The machine goes to and fro: twice to warm up, because the first touch of memory that a host has not used for a
//! while costs more than the migration, then `--migrations` times, which count. Everything runs: REST, control plane, both daemons, both VMMs.
//!
//! Pauses are seen from three sides: the hosts' own clocks, the guest (largest gap of its loop) and the client (largest gap between two
//! echoes; at least the pace of a millisecond). The yardsticks, plain TCP between the same two hosts and memcpy, are measured in the same run, before and after each
//! series. A wrong page or a broken connection is an error: the figures of a migration that lost something are worth nothing.
//!
//! Run with: `cargo xtask bench migration --memory 1G --migrations 50 --dirty 0,20000`

mod outcome;
mod series;
mod yardstick;

use anyhow::{Context, Result};
use benches::{bed, place};
use clap::Parser;
use outcome::{Report, Series};
use xtask::fleet::layout::FleetName;

#[derive(Debug, Parser)]
#[command(about = "Cost and pauses of live migration between two hosts on this machine")]
struct Arguments {
    /// RAM of the machine: a number of bytes, or with K, M or G behind it.
    #[arg(long, default_value = "1G", value_parser = bed::parse_size)]
    memory: u64,
    /// Migrations that count, for each rate.
    #[arg(long, default_value_t = 50)]
    migrations: u32,
    /// Migrations before them: an even number leaves both hosts' memory touched.
    #[arg(long, default_value_t = 2)]
    warm_up: u32,
    /// Rates at which the guest rewrites pages, per second.
    #[arg(long, value_delimiter = ',', default_value = "0,20000")]
    dirty: Vec<u64>,
    /// vCPUs of the machine.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// One JSON object on stdout; the table goes to stderr.
    #[arg(long)]
    json: bool,
    /// Name of the fleet that is made for it.
    #[arg(long, default_value = "bench")]
    fleet: FleetName,
}

/// Machines of this size that a host has RAM for: a copy that was given away counts until it is released.
const MACHINES_PER_HOST: u64 = 2;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let binaries = bed::prepare()?;
    let place = place::Place::look();
    eprintln!("{}", place.line());
    let fleet = bed::fleet(&arguments.fleet, binaries, arguments.memory, MACHINES_PER_HOST)?;
    let measured = measure(&fleet, &arguments);
    // Taken down whatever happened, and what happened is told first.
    let series = match fleet.down() {
        Ok(()) => measured?,
        Err(error) => return measured.and(Err(error)),
    };
    let report = Report {
        ram_bytes: arguments.memory,
        vcpus: arguments.vcpus,
        migrations: arguments.migrations,
        load_after: place::load(),
        place,
        series,
    };
    let table = report.table();
    if arguments.json {
        eprint!("{table}");
        println!("{}", serde_json::to_string(&report).context("writing the report")?);
    } else {
        print!("{table}");
    }
    Ok(())
}

fn measure(fleet: &xtask::fleet::Fleet, arguments: &Arguments) -> Result<Vec<Series>> {
    let mut bench = series::Bench::launch(fleet, arguments.memory, arguments.vcpus)?;
    let mut all = Vec::new();
    for &dirty in &arguments.dirty {
        eprintln!("{} migrations at {dirty} pages/s", arguments.migrations);
        all.push(bench.series(dirty, arguments.warm_up, arguments.migrations)?);
    }
    Ok(all)
}
