//! `cargo xtask sim`: runs many seeds, or one with its trace.

use clap::Parser;
use serde::Serialize;
use sim::{Options, Summary, campaign, run};

/// Simulates migrations with injected faults and checks the invariants after each event.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Run this one seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// With `--seed`: print what happened.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Threads; as many as there are CPUs if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// End with one JSON object on standard output.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Output {
    ok: bool,
    seeds: u64,
    events: u64,
    violations: Vec<String>,
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    let begun = std::time::Instant::now();
    let summary = match arguments.seed {
        Some(seed) => one(seed, arguments.trace),
        None => {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            campaign(arguments.first, arguments.seeds, arguments.threads.unwrap_or(cpus), &Options::default())
        }
    };
    let ok = summary.violations.is_empty();
    let violations: Vec<String> = summary
        .violations
        .iter()
        .map(|(seed, what)| format!("seed {seed}: {what}; replay: cargo xtask sim --seed {seed} --trace"))
        .collect();
    for line in &violations {
        eprintln!("{line}");
    }
    eprintln!(
        "{} seeds, {} events, {} moved, {} violations, {:.1} s",
        summary.seeds,
        summary.events,
        summary.moved,
        violations.len(),
        begun.elapsed().as_secs_f64()
    );
    if arguments.json {
        let output = Output { ok, seeds: summary.seeds, events: summary.events, violations };
        match serde_json::to_string(&output) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("cannot write JSON: {error}"),
        }
    }
    if ok { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

fn one(seed: u64, trace: bool) -> Summary {
    let report = run(seed, &Options { trace, ..Options::default() });
    for line in &report.trace {
        println!("{line}");
    }
    Summary {
        seeds: 1,
        events: report.events,
        moved: u64::from(report.moved),
        reached: report.reached,
        violations: report.violations.into_iter().map(|what| (seed, what)).collect(),
    }
}
