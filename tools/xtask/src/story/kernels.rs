//! The kernel matrix: the short story with each kernel that Debian's packages offer, and with 1 to 8 vCPUs.
//!
//! One lab for all of them. A kernel that fails does not keep the others from being tried; it is named at the end.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::result::{Options as StoryOptions, StoryResult};
use super::site::Site;
use super::{flow, lab_site, stay};
use crate::lab::{self, options::Ram};
use crate::{command, fleet, signals};

/// Suites whose kernels are tried. The newest of each is what apt finds on the day.
const SUITES: [&str; 3] = ["bookworm", "bookworm-backports", "trixie-backports"];
/// The flavours of each suite, and the vCPUs that each is tried with: the one that users get with all numbers.
const FLAVOURS: [(&str, &str, &[u32]); 2] =
    [("cloud", "linux-image-cloud-amd64", &[1, 2, 4, 8]), ("generic", "linux-image-amd64", &[2])];
/// The suite whose cloud kernel is tried with all numbers of vCPUs; the others with two.
const THOROUGH: &str = SUITES[0];

/// What to try.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only kernels of this suite; may be repeated.
    #[arg(long = "suite", value_name = "SUITE", value_parser = SUITES)]
    suites: Vec<String>,
    /// Only this flavour.
    #[arg(long, value_parser = ["cloud", "generic"])]
    flavour: Option<String>,
    /// Only with this many vCPUs; may be repeated.
    #[arg(long = "vcpus", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    vcpus: Vec<u32>,
    /// Migrations of each.
    #[arg(long, default_value_t = 2)]
    migrations: u32,
    /// Print one JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

/// The object that `--json` prints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct KernelsResult {
    /// Whether all kernels did as they should.
    pub ok: bool,
    /// One for each kernel and number of vCPUs.
    pub kernels: Vec<KernelResult>,
}

/// What one kernel did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelResult {
    /// Suite of Debian it is from.
    pub suite: String,
    /// Package it is from.
    pub package: String,
    /// vCPUs of its machine.
    pub vcpus: u32,
    /// What went wrong; empty if nothing did.
    pub faults: Vec<String>,
    /// The story with it.
    #[serde(flatten)]
    pub story: StoryResult,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    suite: &'static str,
    flavour: &'static str,
    package: &'static str,
    vcpus: u32,
}

impl Row {
    fn image(self) -> String {
        format!("lab-kernel-{}-{}", self.suite, self.flavour)
    }
}

fn rows(options: &Options) -> Vec<Row> {
    let wanted = |row: &Row| {
        (options.suites.is_empty() || options.suites.iter().any(|suite| suite == row.suite))
            && options.flavour.as_ref().is_none_or(|flavour| flavour == row.flavour)
            && (options.vcpus.is_empty() || options.vcpus.contains(&row.vcpus))
    };
    let all = SUITES.into_iter().flat_map(|suite| FLAVOURS.into_iter().map(move |flavour| (suite, flavour)));
    let all = all.flat_map(|(suite, (flavour, package, vcpus))| {
        let tried = vcpus.iter().filter(move |&&vcpus| suite == THOROUGH || vcpus == 2);
        tried.map(move |&vcpus| Row { suite, flavour, package, vcpus })
    });
    all.filter(wanted).collect()
}

/// Tries them in a lab of its own.
///
/// # Errors
/// When no kernel could be tried; what went wrong with one is in the result.
pub fn in_lab(options: &Options, ready: lab::Ready, say: &dyn Fn(&str)) -> Result<KernelsResult> {
    let rows = rows(options);
    if rows.is_empty() {
        bail!("no kernel is left to be tried: the options exclude each other");
    }
    let begun = Instant::now();
    let timeline = |what: &str| say(&format!("{:>7.2} s  {what}", begun.elapsed().as_secs_f64()));
    let mut images: Vec<String> = Vec::new();
    for row in &rows {
        if !images.contains(&row.image()) {
            build(&ready, *row, &timeline)?;
            images.push(row.image());
        }
    }
    let ram: Ram = super::LAB_RAM.1.parse()?;
    let mut result = KernelsResult::default();
    let up = lab_site(ready.clone(), ram, images, &timeline);
    stay(&ready.binaries, up, &timeline, |site| {
        for row in &rows {
            signals::check()?;
            result.kernels.push(try_one(site, *row, options, &timeline));
        }
        Ok(())
    })?;
    result.ok = result.kernels.iter().all(|kernel| kernel.faults.is_empty());
    for line in table(&result.kernels) {
        say(&line);
    }
    Ok(result)
}

/// Always built: which kernel is the newest changes from day to day, and packages are kept.
fn build(ready: &lab::Ready, row: Row, timeline: &dyn Fn(&str)) -> Result<()> {
    timeline(&format!("building an image with {} of {}", row.package, row.suite));
    let mut build = Command::new(&ready.binaries.mashines);
    build.args(["image", "build", "busybox", "--name", &row.image()]);
    build.args(["--kernel-package", row.package, "--kernel-suite", row.suite]);
    build.arg("--agent").arg(&ready.binaries.agent).arg("--store").arg(fleet::images());
    command::read_told(&mut build, timeline).map(drop)
}

fn try_one(site: &Site, row: Row, options: &Options, timeline: &dyn Fn(&str)) -> KernelResult {
    timeline(&format!("{} of {} with {} vCPUs", row.package, row.suite, row.vcpus));
    let story = StoryOptions {
        image: Some(row.image()),
        flavour: StoryOptions::FLAVOUR.to_owned(),
        memory: None,
        vcpus: Some(row.vcpus),
        migrations: Some(options.migrations),
        short: true,
        json: false,
    };
    let (mut told, mut faults) = (StoryResult::default(), Vec::new());
    if let Err(error) = flow::tell(site, &story, &row.image(), timeline, &mut told, &mut faults) {
        faults.push(format!("{error:#}"));
    }
    told.ok = faults.is_empty();
    let (suite, package) = (row.suite.to_owned(), row.package.to_owned());
    KernelResult { suite, package, vcpus: row.vcpus, faults, story: told }
}

/// A line for each, and one for each fault.
fn table(kernels: &[KernelResult]) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<28} {:>5} {:>9} {:>10} {:>9}  {}",
        "KERNEL", "VCPUS", "BOOT ms", "MOVES", "PAUSE ms", "VERDICT"
    )];
    for kernel in kernels {
        let story = &kernel.story;
        let name = if story.kernel.is_empty() { &kernel.package } else { &story.kernel };
        let pause = story.migrations.iter().map(|migration| migration.pause_us).max().unwrap_or(0);
        let verdict = if kernel.faults.is_empty() { "ok" } else { "FAILED" };
        let (moves, pause) = (story.migrations.len(), pause / 1000);
        lines.push(format!(
            "{name:<28} {:>5} {:>9} {moves:>10} {pause:>9}  {verdict}",
            kernel.vcpus, story.boot_ms
        ));
        lines.extend(kernel.faults.iter().map(|fault| format!("    {fault}")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(suites: &[&str], flavour: Option<&str>, vcpus: &[u32]) -> Options {
        let suites = suites.iter().map(|&suite| suite.to_owned()).collect();
        let flavour = flavour.map(str::to_owned);
        Options { suites, flavour, vcpus: vcpus.to_vec(), migrations: 1, json: false }
    }

    #[test]
    fn every_kernel_is_tried_and_one_with_all_numbers_of_vcpus() {
        let all = rows(&options(&[], None, &[]));
        for suite in SUITES {
            for (flavour, ..) in FLAVOURS {
                assert!(
                    all.iter().any(|row| row.suite == suite && row.flavour == flavour),
                    "{suite} {flavour}"
                );
            }
        }
        let numbers: Vec<_> = all.iter().filter(|row| row.vcpus != 2).map(|row| row.vcpus).collect();
        assert_eq!(numbers, [1, 4, 8]);
        assert_eq!(rows(&options(&["trixie-backports"], Some("cloud"), &[])).len(), 1);
        assert_eq!(rows(&options(&["trixie-backports"], Some("cloud"), &[8])).len(), 0);
    }
}
