//! The Linux story: a machine of a stock distribution, with its kernel, services and sessions, moves to and fro while it is used.
//!
//! Told in the lab by `cargo xtask lab demo`, and by `cargo xtask demo` where the machine's own KVM is complete. A PostgreSQL that serves
//! pgbench, a container, an ssh session, a session in a terminal: all of it goes on, and what the guest says about itself (boot id,
//! uptime, every process, kernel messages) is compared. With `--short` the machine is a busybox, one command runs in it and it moves once.

mod copies;
mod facts;
mod flow;
pub mod kernels;
mod pgbench;
mod result;
mod services;
mod session;
mod site;

use std::time::Instant;

use anyhow::{Context, Result, bail};

use site::Site;

pub use result::{Migration, Options, StoryResult};

use crate::fleet::layout::FleetName;
use crate::fleet::leaks::Baseline;
use crate::fleet::{self, Fleet};
use crate::lab::options::Ram;
use crate::lab::{self, Lab};
use crate::repository::{self, Binaries};
use crate::setup;

/// How many times slower than a real machine a guest of an emulated host is taken to be.
const EMULATED_SLOWNESS: u32 = 12;
/// RAM of a lab host for the long form and the short one.
const LAB_RAM: (&str, &str) = ("4G", "2G");
/// RAM that machines may use on a host that is a namespace.
const RAM_LIMIT: &str = "3G";
/// Takes a lab down.
type LabDown = Box<dyn FnOnce() -> Result<()>>;
/// Name of the fleet of namespaces.
const FLEET: &str = "story";

/// Installs what clients of the short form need, and what makes its image.
///
/// # Errors
/// When it cannot be had.
pub fn small_packages() -> Result<()> {
    setup::install(&[("ssh", "openssh-client"), ("busybox", "busybox-static"), ("mkfs.ext4", "e2fsprogs")])
}

/// Installs what clients of the story need.
///
/// # Errors
/// When it cannot be had.
pub fn packages(options: &Options) -> Result<()> {
    small_packages()?;
    if options.short {
        return Ok(());
    }
    setup::install(&[("pgbench", "postgresql-contrib"), ("mmdebstrap", "mmdebstrap"), ("tar", "tar")])
}

/// Tells the story in a lab of its own, and takes that down. An error is printed and in the result, which tells how far it came.
pub fn in_lab(options: &Options, ready: lab::Ready, say: &dyn Fn(&str)) -> StoryResult {
    tell(options, &ready.binaries.clone(), say, |image, timeline| {
        let ram = if options.short { LAB_RAM.1 } else { LAB_RAM.0 }.parse()?;
        // The short form has its small image fetched by the hosts.
        let images = if options.short { Vec::new() } else { vec![image.to_owned()] };
        lab_site(ready, ram, images, timeline)()
    })
}

/// Tells the story in a fleet of namespaces, on this machine's own KVM, which must be complete.
pub fn in_fleet(options: &Options, binaries: &Binaries, say: &dyn Fn(&str)) -> StoryResult {
    tell(options, binaries, say, |_, timeline| {
        let name: FleetName = FLEET.parse()?;
        let plan = fleet::Plan {
            name: name.clone(),
            hosts: 2,
            ram_limit: RAM_LIMIT.to_owned(),
            binaries: binaries.clone(),
        };
        let fleet = Fleet::up(plan)?;
        timeline("two hosts are up, each a namespace");
        Ok((name, 1, move || fleet.down()))
    })
}

/// Brings up a lab of two hosts with images.
fn lab_site<'a>(
    ready: lab::Ready,
    ram: Ram,
    images: Vec<String>,
    timeline: &'a dyn Fn(&str),
) -> impl FnOnce() -> Result<(FleetName, u32, LabDown)> + 'a {
    move || {
        let options = lab::options::Options { hosts: 2, ram, images };
        let lab = Lab::up(lab::Plan { options, ready }, timeline)?;
        timeline("the lab is up and both hosts have joined");
        Ok((lab.name().clone(), EMULATED_SLOWNESS, Box::new(move || lab.down()) as LabDown))
    }
}

fn tell<Down: FnOnce() -> Result<()>>(
    options: &Options,
    binaries: &Binaries,
    say: &dyn Fn(&str),
    up: impl FnOnce(&str, &dyn Fn(&str)) -> Result<(FleetName, u32, Down)>,
) -> StoryResult {
    let begun = Instant::now();
    let timeline = |what: &str| say(&format!("{:>7.2} s  {what}", begun.elapsed().as_secs_f64()));
    let mut result = StoryResult::default();
    let mut faults = Vec::new();
    let all = || -> Result<()> {
        let image = flow::provide_image(&binaries.mashines, &binaries.agent, options, &timeline)?;
        let told = |site: &Site| flow::tell(site, options, &image, &timeline, &mut result, &mut faults);
        stay(binaries, || up(&image, &timeline), &timeline, told)
    };
    if let Err(error) = all() {
        faults.push(format!("{error:#}"));
    }
    result.ok = faults.is_empty();
    for fault in faults {
        say(&format!("FAILED: {fault}"));
    }
    result
}

/// Brings a site up, does `work` there and takes it down, so that nothing of it is left. When the work fails, logs are kept.
fn stay<Down: FnOnce() -> Result<()>>(
    binaries: &Binaries,
    up: impl FnOnce() -> Result<(FleetName, u32, Down)>,
    timeline: &dyn Fn(&str),
    work: impl FnOnce(&Site) -> Result<()>,
) -> Result<()> {
    let baseline = Baseline::take();
    let (name, slowness, down) = up()?;
    let hosts = ["host-a".to_owned(), "host-b".to_owned()];
    let site = Site { name: name.clone(), mashines: binaries.mashines.clone(), hosts, slowness };
    let worked = work(&site);
    if worked.is_err() {
        keep_logs(&name, timeline);
    }
    let ended = down().context("taking everything down");
    timeline("taken down");
    let left = baseline.leaks(&name);
    worked.and(ended)?;
    if left.is_empty() { Ok(()) } else { bail!("left behind: {}", left.join(", ")) }
}

/// Copies what daemons and hosts said to where it outlives them, for whoever looks for the cause.
fn keep_logs(name: &FleetName, timeline: &dyn Fn(&str)) {
    let kept = repository::target_dir().join("story-logs");
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(&kept)?;
        for entry in std::fs::read_dir(name.state_dir())?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
            }
        }
        Ok(())
    };
    match copy() {
        Ok(()) => timeline(&format!("the logs of daemons and hosts are in {}", kept.display())),
        Err(error) => timeline(&format!("the logs of daemons and hosts cannot be kept: {error}")),
    }
}
