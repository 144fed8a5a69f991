//! Running cargo's test suites and counting what they did.
//!
//! A test that cannot run here (no `/dev/kvm`, not root) prints a line `SKIPPED: why` and returns; it counts as skipped, not as passed.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::command::{self, Watched};
use crate::report::Outcome;
use crate::repository;

/// What a test prints in front of the reason why it did not run.
const SKIP_MARK: &str = "SKIPPED: ";

/// A suite of tests.
#[derive(Debug)]
pub struct Suite<'a> {
    /// Which packages, as arguments of cargo.
    pub select: &'a [&'a str],
    /// Arguments of the test program.
    pub arguments: &'a [&'a str],
    /// Whether cargo-nextest may run it: each test in a process of its own, many at once.
    pub parallel: bool,
    /// Longest time for building and running.
    pub limit: Duration,
}

impl Suite<'_> {
    /// Builds and runs it.
    ///
    /// # Errors
    /// When cargo cannot be started.
    pub fn run(&self, adapt: impl FnOnce(&mut Command)) -> Result<Outcome> {
        let mut cargo = repository::cargo();
        if self.parallel && command::locate("cargo-nextest").is_some() {
            cargo.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass", "--success-output=final"]);
            cargo.args(self.select);
        } else {
            cargo.args(["test", "--quiet", "--no-fail-fast"]).args(self.select).args(["--", "--show-output"]);
            cargo.args(self.arguments);
        }
        adapt(&mut cargo);
        let watched = command::stream(&mut cargo, self.limit)?;
        Ok(count(&watched, self.limit))
    }
}

/// Counts tests in the output of `cargo test` or cargo-nextest.
///
/// The output of cargo-nextest has that of each test program within it: where its summary is, the results of the programs are not counted again.
fn count(watched: &Watched, limit: Duration) -> Outcome {
    let mut programs = Outcome::default();
    let mut summary = None;
    let mut skipped = 0;
    let mut reasons = BTreeSet::new();
    for line in watched.lines.iter().map(|line| line.trim_start()) {
        if let Some(rest) = line.strip_prefix("test result:") {
            programs.passed += number_before(rest, " passed");
            programs.failed += number_before(rest, " failed");
            programs.skipped += number_before(rest, " ignored");
        } else if line.starts_with("Summary [") {
            let summary: &mut Outcome = summary.get_or_insert_default();
            summary.passed += number_before(line, " passed");
            summary.failed += number_before(line, " failed") + number_before(line, " timed out");
        } else if let Some(why) = line.strip_prefix(SKIP_MARK) {
            skipped += 1;
            reasons.insert(why.to_owned());
        }
    }
    let mut outcome = summary.unwrap_or(programs);
    outcome.passed = outcome.passed.saturating_sub(skipped);
    outcome.skipped += skipped;
    let failures = failures(&watched.lines);
    outcome.note = failures.into_iter().chain(reasons).collect::<Vec<_>>().join("; ");
    if watched.timed_out {
        outcome.note = format!("not done within {limit:?}");
    } else if !watched.succeeded && outcome.failed == 0 {
        "it did not build or did not end well, see above".clone_into(&mut outcome.note);
    }
    if (watched.timed_out || !watched.succeeded) && outcome.failed == 0 {
        outcome.failed = 1;
    }
    outcome
}

/// The names of the tests that failed.
fn failures(lines: &[String]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut listed = false;
    for line in lines {
        let name = line.trim_start();
        // cargo-nextest: `FAIL [   0.202s] ( 18/487) package::program test`.
        if let Some((_, name)) = ["FAIL [", "TIMEOUT [", "ABORT ["]
            .iter()
            .find_map(|mark| name.strip_prefix(mark))
            .and_then(|rest| rest.split_once("] "))
        {
            names.insert(name.rsplit(") ").next().unwrap_or(name).to_owned());
        }
        // cargo test: the names stand indented below `failures:`, which also opens the part with their output.
        listed = line == "failures:" || (listed && line.starts_with("    ") && !name.contains(' '));
        if listed && line != "failures:" {
            names.insert(name.to_owned());
        }
    }
    names
}

/// The number that stands directly before `word`; 0 if there is none.
fn number_before(line: &str, word: &str) -> u64 {
    let Some((before, _)) = line.split_once(word) else { return 0 };
    let digits = before.rsplit(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(text: &str, succeeded: bool) -> Watched {
        Watched { lines: text.lines().map(str::to_owned).collect(), succeeded, timed_out: false }
    }

    #[test]
    fn counts_of_cargo_test_add_up() {
        let text = "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured\nSKIPPED: no /dev/kvm\n\
                    test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured";
        let outcome = count(&watched(text, false), Duration::ZERO);
        assert_eq!((outcome.passed, outcome.failed, outcome.skipped), (6, 3, 2));
        assert_eq!(outcome.note, "no /dev/kvm");
    }

    #[test]
    fn counts_of_nextest_are_read() {
        let text =
            "     Summary [   0.005s] 13 tests run: 10 passed (1 slow), 2 failed, 1 timed out, 4 skipped";
        let outcome = count(&watched(text, false), Duration::ZERO);
        assert_eq!((outcome.passed, outcome.failed, outcome.skipped), (10, 3, 0));
    }

    #[test]
    fn what_nextest_shows_of_its_programs_is_not_counted_again() {
        let text = "  PASS [   0.125s] (1/3) a::b good\nSKIPPED: no kernel\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored\n\
                    failures:\n    bad_one\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n\
                    \x20    Summary [   0.005s] 3 tests run: 2 passed, 1 failed, 1 skipped\n\
                    \x20       FAIL [   0.202s] (2/3) a::b bad_one";
        let outcome = count(&watched(text, false), Duration::ZERO);
        assert_eq!((outcome.passed, outcome.failed, outcome.skipped), (1, 1, 1));
        assert_eq!(outcome.note, "a::b bad_one; bad_one; no kernel");
    }

    #[test]
    fn failed_tests_are_named() {
        let text =
            "failures:\n\n---- broken stdout ----\nfailures:\n    broken\n    lost::too\n\n    not this";
        let names = failures(&watched(text, false).lines);
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["broken", "lost::too"]);
    }

    #[test]
    fn a_suite_that_does_not_build_has_failed() {
        assert_eq!(count(&watched("error[E0308]: mismatched types", false), Duration::ZERO).failed, 1);
        let late =
            Watched { timed_out: true, ..watched("test result: ok. 5 passed; 0 failed; 0 ignored", false) };
        assert_eq!(count(&late, Duration::ZERO).failed, 1);
    }
}
