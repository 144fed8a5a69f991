//! `cargo xtask test`: everything that can be tested on this machine, within the time that CI has.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::demo::DemoResult;
use crate::report::{Outcome, Report};
use crate::setup::{self, Kvm};
use crate::story::StoryResult;
use crate::suites::Suite;
use crate::{check, command, fuzz, lab, packages, repository, sim};

/// Seeds of the protocol simulator.
const SEEDS: u64 = 100_000;
/// Seconds for each fuzz target.
const FUZZ_SECONDS: u32 = 10;
/// Building and running the unit tests from nothing.
const UNIT_LIMIT: Duration = Duration::from_secs(20 * 60);
/// The same for the end-to-end tests.
const END_TO_END_LIMIT: Duration = Duration::from_secs(25 * 60);
/// The guest's smoke test; it ends itself after two minutes.
const SMOKE_LIMIT: Duration = Duration::from_secs(150);
/// The demo, its fleet included.
const DEMO_LIMIT: Duration = Duration::from_secs(3 * 60);

/// The short form of the lab's story, its lab included.
const LAB_LIMIT: Duration = Duration::from_secs(6 * 60);

/// Runs all steps and prints the table. Returns whether nothing failed.
///
/// # Errors
/// When this machine cannot be set up.
pub fn run() -> Result<bool> {
    setup::packages()?;
    setup::limits()?;
    let kvm = kvm_as_root();
    let mut report = Report::default();
    check::run(&mut report);
    report.step("build", || repository::build().map(|_| Outcome::passed("")));
    report.step("unit tests", unit_tests);
    report.step("test guest, unit tests", guest_tests);
    report.step("test guest, in QEMU", || on_kvm(&kvm, guest_in_qemu));
    report.step("simulator", || sim::outcome(SEEDS));
    report.step("end-to-end tests", || on_kvm(&kvm, end_to_end));
    report.step("demo", || on_kvm(&kvm, demo));
    report.step("lab", linux_in_lab);
    report.step("fuzz", || fuzz::run(FUZZ_SECONDS));
    print!("\n{}", report.table());
    Ok(report.ok())
}

/// Whether the devices are there; we may not be root yet, but the programs that use them will.
fn kvm_as_root() -> Kvm {
    if rustix::process::geteuid().is_root() {
        return setup::kvm();
    }
    match setup::as_root("true").and_then(|mut command| command::read(&mut command)) {
        Ok(_) if std::path::Path::new("/dev/kvm").exists() => Kvm::Usable,
        Ok(_) => setup::kvm(),
        Err(error) => Kvm::Missing(format!("{error:#}")),
    }
}

fn on_kvm(kvm: &Kvm, work: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    match kvm {
        Kvm::Usable => work(),
        Kvm::Missing(why) => Ok(Outcome::skipped(why)),
    }
}

fn unit_tests() -> Result<Outcome> {
    let suite = Suite {
        select: &["--workspace", "--exclude", "tests"],
        arguments: &[],
        parallel: true,
        limit: UNIT_LIMIT,
    };
    let guest = repository::built().map(|binaries| binaries.guest);
    let path = path_with_registry();
    suite.run(|cargo| {
        // Tests of the VMM boot it; without it they say so and count as skipped.
        if let Ok(guest) = guest {
            cargo.env("MASHINE_GUEST", guest);
        }
        match path {
            Ok(path) => drop(cargo.env("PATH", path)),
            Err(error) => eprintln!("   without docker-registry: {error:#}"),
        }
    })
}

/// The search path with Debian's docker-registry behind what the user has. To install it would start a registry on this machine.
fn path_with_registry() -> Result<OsString> {
    let root = repository::target_dir().join("packages/docker-registry");
    if command::locate("docker-registry").is_none() {
        packages::unpack("docker-registry", &root, |_| Ok(()))?;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::join_paths(std::env::split_paths(&path).chain([root.join("usr/bin")]))?)
}

fn guest_tests() -> Result<Outcome> {
    let suite = Suite {
        select: &["--manifest-path", "tests/guest/Cargo.toml", "--lib"],
        arguments: &[],
        parallel: false,
        limit: UNIT_LIMIT,
    };
    suite.run(|cargo| {
        cargo.env_remove("RUSTFLAGS").env("CARGO_TARGET_DIR", repository::guest_target_dir());
    })
}

/// The guest's contract, tried from outside on another VMM than ours.
fn guest_in_qemu() -> Result<Outcome> {
    if command::locate("qemu-system-x86_64").is_none() {
        return Ok(Outcome::skipped("QEMU is not installed: apt-get install qemu-system-x86"));
    }
    let mut smoke = setup::as_root("bash")?;
    smoke
        .current_dir(repository::root())
        .arg("-c")
        .arg("GUEST=$0 exec tests/guest/smoke.sh")
        .arg(repository::built()?.guest);
    let watched = command::stream(&mut smoke, SMOKE_LIMIT)?;
    let checks = watched.lines.iter().filter(|line| line.starts_with("ok ")).count();
    let passed = u64::try_from(checks)?;
    Ok(Outcome { passed, failed: u64::from(!watched.succeeded), ..Outcome::default() })
}

/// Real processes on real KVM. One test after the other: each has a fleet that wants the machine's cores.
fn end_to_end() -> Result<Outcome> {
    let suite = Suite {
        select: &["--package", "tests"],
        arguments: &["--test-threads=1"],
        parallel: false,
        limit: END_TO_END_LIMIT,
    };
    suite.run(|cargo| {
        if !rustix::process::geteuid().is_root() {
            cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo -E");
        }
    })
}

/// The demo as a user runs it: a process of its own, judged by its last line.
fn demo() -> Result<Outcome> {
    // Not by this program's own path: building the tests has replaced that file.
    let mut demo = repository::cargo();
    demo.args(["run", "--quiet", "--package", "xtask", "--", "demo", "--memory", "256M", "--json"]);
    let watched = command::stream(&mut demo, DEMO_LIMIT)?;
    let last = watched.lines.iter().rev().find(|line| line.starts_with('{'));
    let result: DemoResult = serde_json::from_str(last.context("the demo printed no result")?)
        .context("reading the demo's result")?;
    let pauses: Vec<String> = result.migrations.iter().map(|one| format!("{} us", one.pause_us)).collect();
    let note = format!("{} migrations, pauses {}", pauses.len(), pauses.join(", "));
    Ok(if result.ok && watched.succeeded { Outcome::passed(note) } else { Outcome::failed(note) })
}

/// The short form of the Linux story, as a user runs it. Needs no `/dev/kvm`, but packages, which it installs. Emulated hosts share this
/// machine with whatever else runs here, and stand still at times: a story that fails is told once more, and the first failure is in the table.
fn linux_in_lab() -> Result<Outcome> {
    if let (Some(why), None) = (lab::missing(), command::locate("apt-get")) {
        return Ok(Outcome::skipped(why));
    }
    let faults = match short_story()? {
        Ok(note) => return Ok(Outcome::passed(note)),
        Err(faults) => faults,
    };
    Ok(match short_story()? {
        Ok(note) => Outcome::passed(format!("{note}; at the second try, the first: {faults}")),
        Err(again) => Outcome::failed(format!("{faults}; and again: {again}")),
    })
}

/// What to say of it: its figures, or its faults.
fn short_story() -> Result<Result<String, String>> {
    let mut story = repository::cargo();
    story.args(["run", "--quiet", "--package", "xtask", "--", "lab", "demo", "--short", "--json"]);
    let watched = command::stream(&mut story, LAB_LIMIT)?;
    let last = watched.lines.iter().rev().find(|line| line.starts_with('{'));
    let result: StoryResult = serde_json::from_str(last.context("the story printed no result")?)
        .context("reading the story's result")?;
    if result.ok && watched.succeeded {
        let pauses: Vec<String> =
            result.migrations.iter().map(|one| format!("{} us", one.pause_us)).collect();
        return Ok(Ok(format!("Linux {}, pause {}", result.kernel, pauses.join(", "))));
    }
    let faults: Vec<&str> = watched.lines.iter().filter_map(|line| line.strip_prefix("FAILED: ")).collect();
    Ok(Err(faults.join("; ")))
}
