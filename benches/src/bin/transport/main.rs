//! How fast does a shard's transport move pages, and what does it cost?
//!
//! Two processes, one core each, over loopback: one sends pages of 4 KiB out of a region of memory, the other
//! puts them into a region of its own. Measured are plain TCP, TCP with TLS, and ours at several datagram
//! sizes; each after a warm-up, in turns, `--runs` times, so that a neighbour's noise hits all alike. Printed
//! are the medians: goodput, its ratio to plain TCP of the same turn, and CPU seconds per GiB at both ends.
//!
//! Run with: `cargo run --release -p benches --bin transport`

mod quic;
mod relay;
mod tcp;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use pki::{FleetCa, Kind, Trust};
use relay::{Link, Relay};
use serde::{Deserialize, Serialize};

/// Guest page.
const PAGE: usize = 4096;
/// Memory that pages come from and go to: more than the caches hold.
const REGION: usize = 64 << 20;
/// Pages are sent in batches, as a migration does.
const BATCH: usize = 64 * PAGE;
/// Sent before each measurement: discovers the datagram size and opens the windows.
const WARM_UP: usize = 64 << 20;

#[derive(Parser)]
#[command(about = "Goodput and CPU cost of the transport against plain TCP")]
struct Arguments {
    /// Bytes per measured run, MiB.
    #[arg(long, default_value_t = 512)]
    mebibytes: usize,
    /// Runs of each scenario; medians are printed.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Streams that the pages are spread over (ours only).
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// Only these scenarios: tcp, tls, or a datagram size such as 8952.
    #[arg(long, value_delimiter = ',', default_value = "tcp,tls,1452,8952,65507")]
    scenarios: Vec<String>,
    /// Puts a relay between the ends (not for tcp and tls) that holds datagrams back this long in each
    /// direction. Copying them costs CPU: goodput is then about round trips and loss, not speed.
    #[arg(long, default_value_t = 0)]
    delay_us: u64,
    /// Has the relay lose this many of a thousand datagrams in each direction.
    #[arg(long, default_value_t = 0)]
    loss_per_mille: u64,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
    /// Used by the program itself to start the receiving process.
    #[arg(long, hide = true)]
    receive: Option<Protocol>,
    #[arg(long, hide = true, default_value_t = 65_507)]
    mtu: u16,
    #[arg(long, hide = true, default_value_t = 0)]
    core: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Protocol {
    Tcp,
    Tls,
    Quic,
}

/// What one process used for the measured part.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Cost {
    seconds: f64,
    cpu_seconds: f64,
}

/// One run.
#[derive(Debug, Clone, Copy, Serialize)]
struct Run {
    mebibytes_per_s: f64,
    ratio_to_tcp: f64,
    receiver_cpu_s_per_gib: f64,
    sender_cpu_s_per_gib: f64,
    /// Datagram size at the end; 0 for TCP.
    mtu: u16,
    packets_lost: u64,
}

#[derive(Serialize)]
struct Report {
    machine: String,
    mebibytes: usize,
    runs: usize,
    streams: usize,
    delay_us: u64,
    loss_per_mille: u64,
    /// Median of each figure by itself.
    scenarios: Vec<(String, Run)>,
}

/// Measures a part of this process's life.
struct Meter {
    begun: Instant,
    cpu: f64,
}

impl Meter {
    fn start() -> Self {
        Self { begun: Instant::now(), cpu: cpu_seconds() }
    }

    fn stop(&self) -> Cost {
        Cost { seconds: self.begun.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds() - self.cpu }
    }
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.receive {
        Some(protocol) => receive(protocol, &arguments),
        None => measure(&arguments),
    }
}

/// The receiving process: says where it listens, receives, and reports its cost.
fn receive(protocol: Protocol, arguments: &Arguments) -> anyhow::Result<()> {
    pin(arguments.core)?;
    let mut secrets = String::new();
    std::io::stdin().read_to_string(&mut secrets)?;
    let (ca, identity) = serde_json::from_str::<(String, (String, String))>(&secrets)?;
    let trust = trust(&ca, identity)?;
    let announce = |address: std::net::SocketAddr| println!("{address}");
    let bytes = arguments.mebibytes << 20;
    let cost = match protocol {
        Protocol::Tcp => tcp::receive(None, bytes, announce)?,
        Protocol::Tls => tcp::receive(Some(&trust), bytes, announce)?,
        Protocol::Quic => quic::receive(&trust, bytes, arguments.streams, arguments.mtu, announce)?,
    };
    println!("{}", serde_json::to_string(&cost)?);
    Ok(())
}

fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    // With a single core both ends share it, and the table says so.
    let cores = dataplane::shards::available_cores();
    let (first, last) =
        (cores.first().copied().context("no core")?, cores.last().copied().context("no core")?);
    pin(first)?;
    let ca = FleetCa::create()?;
    let mut results: Vec<(String, Vec<Run>)> =
        arguments.scenarios.iter().map(|name| (name.clone(), Vec::new())).collect();
    for _ in 0..arguments.runs {
        let mut tcp = None;
        for (name, runs) in &mut results {
            let mut run = scenario(name, &ca, arguments, last).with_context(|| format!("scenario {name}"))?;
            if name == "tcp" {
                tcp = Some(run.mebibytes_per_s);
            }
            run.ratio_to_tcp = tcp.map_or(0.0, |tcp| run.mebibytes_per_s / tcp);
            runs.push(run);
        }
    }
    let report = Report {
        machine: machine(cores.len()),
        mebibytes: arguments.mebibytes,
        runs: arguments.runs,
        streams: arguments.streams,
        delay_us: arguments.delay_us,
        loss_per_mille: arguments.loss_per_mille,
        scenarios: results.into_iter().map(|(name, runs)| (name, median(&runs))).collect(),
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print_table(&report);
    }
    Ok(())
}

fn scenario(name: &str, ca: &FleetCa, arguments: &Arguments, core: usize) -> anyhow::Result<Run> {
    let (protocol, mtu) = match name {
        "tcp" => (Protocol::Tcp, 0),
        "tls" => (Protocol::Tls, 0),
        size => (Protocol::Quic, size.parse().context("a scenario is tcp, tls or a datagram size")?),
    };
    let mut receiver = Receiver::start(protocol, ca, arguments, mtu, core)?;
    let identity = ca.issue("sender", Kind::Host)?;
    let trust = trust(ca.cert_pem(), (identity.cert_chain_pem, identity.key_pem))?;
    let bytes = arguments.mebibytes << 20;
    let (cost, mtu, packets_lost) = match protocol {
        Protocol::Tcp => (tcp::send(None, receiver.address, bytes)?, 0, 0),
        Protocol::Tls => (tcp::send(Some(&trust), receiver.address, bytes)?, 0, 0),
        Protocol::Quic => {
            let link = Link {
                delay: Duration::from_micros(arguments.delay_us),
                loss_per_mille: arguments.loss_per_mille,
            };
            let lossy = !link.delay.is_zero() || link.loss_per_mille > 0;
            let relay = lossy.then(|| Relay::start(receiver.address, link)).transpose()?;
            let address = relay.as_ref().map_or(receiver.address, |relay| relay.address);
            quic::send(&trust, address, bytes, arguments.streams, mtu)?
        }
    };
    let theirs = receiver.cost()?;
    let mebibytes = f64::from(u32::try_from(arguments.mebibytes)?);
    Ok(Run {
        mebibytes_per_s: mebibytes / cost.seconds,
        ratio_to_tcp: 0.0,
        receiver_cpu_s_per_gib: theirs.cpu_seconds * 1024.0 / mebibytes,
        sender_cpu_s_per_gib: cost.cpu_seconds * 1024.0 / mebibytes,
        mtu,
        packets_lost,
    })
}

/// The other process; killed if it outlives its use.
struct Receiver {
    child: Child,
    output: BufReader<ChildStdout>,
    address: std::net::SocketAddr,
}

impl Receiver {
    fn start(
        protocol: Protocol,
        ca: &FleetCa,
        arguments: &Arguments,
        mtu: u16,
        core: usize,
    ) -> anyhow::Result<Self> {
        let name = match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Tls => "tls",
            Protocol::Quic => "quic",
        };
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--receive", name, "--mtu", &mtu.to_string(), "--core", &core.to_string()])
            .args(["--mebibytes", &arguments.mebibytes.to_string()])
            .args(["--streams", &arguments.streams.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut receiver = Self { child, output, address: ([0, 0, 0, 0], 0).into() };
        hand_over(stdin, ca)?;
        receiver.address = receiver.line()?.parse().context("the receiver's address")?;
        Ok(receiver)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the receiver ended early: {}", self.child.wait()?);
        }
        Ok(line.trim().to_owned())
    }

    fn cost(&mut self) -> anyhow::Result<Cost> {
        Ok(serde_json::from_str(&self.line()?)?)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hand_over(mut stdin: ChildStdin, ca: &FleetCa) -> anyhow::Result<()> {
    let identity = ca.issue("receiver", Kind::Host)?;
    let secrets = (ca.cert_pem(), (identity.cert_chain_pem, identity.key_pem));
    stdin.write_all(serde_json::to_string(&secrets)?.as_bytes())?;
    Ok(())
}

fn trust(ca: &str, (cert_chain_pem, key_pem): (String, String)) -> anyhow::Result<Trust> {
    Ok(Trust::new(ca, &pki::Identity { cert_chain_pem, key_pem })?)
}

fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set)?;
    Ok(())
}

/// Memory whose every page is touched and different.
fn region() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut memory = Vec::with_capacity(REGION);
    while memory.len() < REGION {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.extend_from_slice(&state.to_le_bytes());
    }
    memory
}

fn median(runs: &[Run]) -> Run {
    let middle = |figure: fn(&Run) -> f64| {
        let mut figures: Vec<f64> = runs.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or(0.0)
    };
    Run {
        mebibytes_per_s: middle(|run| run.mebibytes_per_s),
        ratio_to_tcp: middle(|run| run.ratio_to_tcp),
        receiver_cpu_s_per_gib: middle(|run| run.receiver_cpu_s_per_gib),
        sender_cpu_s_per_gib: middle(|run| run.sender_cpu_s_per_gib),
        mtu: runs.iter().map(|run| run.mtu).max().unwrap_or(0),
        packets_lost: runs.iter().map(|run| run.packets_lost).max().unwrap_or(0),
    }
}

fn machine(cores: usize) -> String {
    let system = rustix::system::uname();
    format!("{} {}, {cores} cores", system.sysname().to_string_lossy(), system.release().to_string_lossy())
}

fn print_table(report: &Report) {
    println!("{}; {} MiB, median of {} runs", report.machine, report.mebibytes, report.runs);
    println!(
        "{:>10} {:>8} {:>6} {:>14} {:>14} {:>6} {:>6}",
        "scenario", "MiB/s", "ratio", "recv CPU s/GiB", "send CPU s/GiB", "mtu", "lost"
    );
    for (name, run) in &report.scenarios {
        println!(
            "{name:>10} {:>8.0} {:>6.2} {:>14.2} {:>14.2} {:>6} {:>6}",
            run.mebibytes_per_s,
            run.ratio_to_tcp,
            run.receiver_cpu_s_per_gib,
            run.sender_cpu_s_per_gib,
            run.mtu,
            run.packets_lost
        );
    }
}
