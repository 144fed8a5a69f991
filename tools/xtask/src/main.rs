//! `cargo xtask`: everything a developer or CI does with this repository.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use xtask::ability::Ability;
use xtask::fleet::layout::FleetName;
use xtask::fleet::{self, Fleet, Plan};
use xtask::lab::{self, Lab};
use xtask::report::Report;
use xtask::{bench, check, command, demo, fuzz, repository, setup, signals, sim, story, test};

/// Developer commands of mashines.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing and look whether this machine can run everything.
    Setup,
    /// Formatting, lints, licences, layering, sizes, the list of unsafe files.
    Check,
    /// Everything that can be tested on this machine; a table at the end says what ran.
    Test,
    /// Live-migrate a busy machine between two hosts on this machine, watched from all sides.
    Demo {
        /// Tell the Linux story instead (as `cargo xtask lab demo`): between namespaces where this machine's own KVM is complete, else in the lab.
        #[arg(long)]
        linux: bool,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Bring up a control plane and hosts on this machine, and leave them up.
    Up(Up),
    /// Take a fleet down, whatever is left of it.
    Down(Which),
    /// The same with emulated hosts that have complete KVM, on any machine.
    #[command(subcommand)]
    Lab(lab::options::Task),
    /// Run the protocol simulator; arguments are passed on (`--seeds N`, `--json`, `--seed S --trace`).
    Sim(Passed),
    /// Run each fuzz target for a while.
    Fuzz {
        /// Seconds for each target.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Run a benchmark; without a name, list them.
    Bench {
        /// Its name.
        name: Option<String>,
        #[command(flatten)]
        passed: Passed,
    },
}

#[derive(Debug, Args)]
struct Passed {
    /// Passed on.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

#[derive(Debug, Args)]
struct Which {
    /// Name of the fleet.
    #[arg(long, default_value = "play")]
    fleet: FleetName,
}

#[derive(Debug, Args)]
struct Up {
    #[command(flatten)]
    which: Which,
    /// Number of hosts.
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    /// RAM that machines on one host may use in all.
    #[arg(long, default_value = "4G")]
    ram_limit: String,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        // Its signals are the command's.
        Task::Lab(lab::options::Task::Run { host, command }) => lab::run(&host, &command),
        task => signals::install().and_then(|()| run(task)).map(|ok| u8::from(!ok)),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does it and returns whether all is well.
fn run(task: Task) -> Result<bool> {
    match task {
        Task::Setup => set_up(),
        Task::Check => Ok(reported(check::run)),
        Task::Test => test::run(),
        Task::Demo { linux: false, options } => demonstrate(&options),
        Task::Demo { linux: true, options } => tell(&linux_story(&options), Place::Probed),
        Task::Up(up) => bring_up(up),
        Task::Down(which) => take_down(&which.fleet),
        Task::Lab(task) => lab_task(task),
        Task::Sim(passed) => command::watch(&mut sim::simulator(&passed.arguments)).map(|()| true),
        Task::Fuzz { seconds } => Ok(reported(|report| report.step("fuzz", || fuzz::run(seconds)))),
        Task::Bench { name, passed } => bench::run(name.as_deref(), &passed.arguments).map(|()| true),
    }
}

fn reported(work: impl FnOnce(&mut Report)) -> bool {
    let mut report = Report::default();
    work(&mut report);
    print!("\n{}", report.table());
    report.ok()
}

fn set_up() -> Result<bool> {
    setup::packages()?;
    setup::limits()?;
    match setup::kvm() {
        setup::Kvm::Usable => println!("this machine can build and run everything"),
        setup::Kvm::Missing(why) => println!("this machine can build, but not run machines: {why}"),
    }
    Ok(true)
}

/// Builds as the user, then goes on as root, with what running machines needs.
fn prepare() -> Result<repository::Binaries> {
    setup::packages()?;
    let binaries = repository::build()?;
    setup::become_root()?;
    setup::require_kvm()?;
    setup::limits()?;
    Ok(binaries)
}

fn demonstrate(options: &demo::Options) -> Result<bool> {
    let json = options.json;
    // Data goes to stdout, and with --json the data is the object.
    let say = |line: &str| if json { eprintln!("{line}") } else { println!("{line}") };
    let shown = prepare().and_then(|binaries| {
        match Ability::of(&binaries.mashine_vmm)? {
            Ability::Complete => {
                say("this machine's KVM is complete: Linux moves with --linux, here the test guest does")
            }
            less => say(&format!("{less}: the test guest moves here; Linux moves with --linux, in the lab")),
        }
        demo::run(options, binaries, &say)
    });
    if json {
        // Programs get their object also when the demo could not begin.
        let unbegun = demo::DemoResult { dirty_pages_per_s: options.dirty, ..demo::DemoResult::default() };
        let result = shown.as_ref().unwrap_or(&unbegun);
        println!("{}", serde_json::to_string(result).context("writing the result")?);
    }
    shown.map(|result| result.ok)
}

fn bring_up(up: Up) -> Result<bool> {
    if lab::layout::is_lab(&up.which.fleet) {
        bail!("`{}` is the lab's name: `cargo xtask lab up` brings that up", up.which.fleet);
    }
    let binaries = prepare()?;
    let mashines = binaries.mashines.clone();
    let name = up.which.fleet.clone();
    if fleet::is_up(&name) {
        println!("# the fleet `{name}` is up already");
    } else {
        let plan = Plan { name: up.which.fleet, hosts: up.hosts, ram_limit: up.ram_limit, binaries };
        let fleet = Fleet::up(plan)?;
        println!(
            "# fleet `{name}`: {} hosts, state and logs in {}",
            fleet.hosts().len(),
            name.state_dir().display()
        );
        if let Some(user) = setup::user_behind_sudo() {
            fleet::give_api_to(fleet.name(), user)?;
        }
        fleet.keep();
    }
    println!("export MASHINES_URL={}", fleet::url(&name));
    println!("alias mashines={}", mashines.display());
    println!("# a client in the fleet's network: ip netns exec {} COMMAND", name.fabric_namespace());
    Ok(true)
}

fn lab_task(task: lab::options::Task) -> Result<bool> {
    use lab::options::Task;
    match task {
        Task::Up(options) => lab_up(options),
        Task::Run { host, command } => lab::run(&host, &command).map(|code| code == 0),
        Task::Down => lab_down(),
        Task::Demo(options) => tell(&options, Place::Lab),
        Task::Kernels(options) => try_kernels(&options),
        Task::DemoSkeleton(options) => {
            let ready = lab::prepare()?;
            lab::demo::run(&options, ready).map(|()| true)
        }
    }
}

/// Where the Linux story is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Lab,
    /// Between namespaces if the machine's own KVM is complete, else in the lab.
    Probed,
}

/// The story with what was said for the demo. Its own options are those of `cargo xtask lab demo`.
fn linux_story(options: &demo::Options) -> story::Options {
    story::Options {
        memory: None,
        migrations: Some(options.migrations),
        image: None,
        flavour: story::Options::FLAVOUR.to_owned(),
        vcpus: None,
        short: false,
        json: options.json,
    }
}

fn tell(options: &story::Options, place: Place) -> Result<bool> {
    let json = options.json;
    let say = |line: &str| if json { eprintln!("{line}") } else { println!("{line}") };
    let told = story::packages(options).and_then(|()| {
        if place == Place::Probed {
            let binaries = repository::build()?;
            let ability = Ability::of(&binaries.mashine_vmm)?;
            if ability == Ability::Complete {
                say(&format!("{ability}: Linux moves between namespaces on it"));
                return Ok(story::in_fleet(options, &prepare()?, &say));
            }
            say(&format!("{ability}: Linux moves between emulated hosts, the lab"));
        }
        Ok(story::in_lab(options, lab::prepare()?, &say))
    });
    if json {
        // Programs get their object also when the story could not begin.
        let unbegun = story::StoryResult::default();
        let result = told.as_ref().unwrap_or(&unbegun);
        println!("{}", serde_json::to_string(result).context("writing the result")?);
    }
    told.map(|result| result.ok)
}

fn try_kernels(options: &story::kernels::Options) -> Result<bool> {
    let say = |line: &str| if options.json { eprintln!("{line}") } else { println!("{line}") };
    story::small_packages()?;
    let result = story::kernels::in_lab(options, lab::prepare()?, &say)?;
    if options.json {
        println!("{}", serde_json::to_string(&result).context("writing the result")?);
    }
    Ok(result.ok)
}

fn lab_up(options: lab::options::Options) -> Result<bool> {
    lab::check_images(&options.images)?;
    let ready = lab::prepare()?;
    let mashines = ready.binaries.mashines.clone();
    let lab = Lab::up(lab::Plan { options, ready }, &|line| println!("# {line}"))?;
    let name = lab.name().clone();
    println!("# the lab: {} hosts, state and logs in {}", lab.hosts().len(), name.state_dir().display());
    if let Some(user) = setup::user_behind_sudo() {
        fleet::give_api_to(&name, user)?;
    }
    lab.keep();
    println!("export MASHINES_URL={}", fleet::url(&name));
    println!("alias mashines={}", mashines.display());
    println!("# on a host: cargo xtask lab run host-a -- COMMAND");
    println!("# a client in the lab's network: ip netns exec {} COMMAND", name.fabric_namespace());
    Ok(true)
}

fn lab_down() -> Result<bool> {
    setup::become_root()?;
    println!("the lab {}", if lab::down()? { "is down" } else { "was not up" });
    Ok(true)
}

fn take_down(fleet: &FleetName) -> Result<bool> {
    if lab::layout::is_lab(fleet) {
        return lab_down();
    }
    setup::become_root()?;
    let there = fleet::down(fleet)?;
    println!("the fleet `{fleet}` {}", if there { "is down" } else { "was not up" });
    Ok(true)
}
