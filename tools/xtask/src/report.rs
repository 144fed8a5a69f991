//! What a long command did: one row a step, one closing line that programs can read.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How a step went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Tests or checks that passed.
    pub passed: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that did not run.
    pub skipped: u64,
    /// Why something failed or was skipped, or a figure worth showing.
    pub note: String,
}

impl Outcome {
    /// One check passed.
    pub fn passed(note: impl Into<String>) -> Self {
        Self { passed: 1, note: note.into(), ..Self::default() }
    }

    /// One check failed.
    pub fn failed(note: impl Into<String>) -> Self {
        Self { failed: 1, note: note.into(), ..Self::default() }
    }

    /// One check did not run. `note` says why and what would make it run.
    pub fn skipped(note: impl Into<String>) -> Self {
        Self { skipped: 1, note: note.into(), ..Self::default() }
    }
}

/// Rows so far.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<(String, Outcome, Duration)>,
}

impl Report {
    /// Runs a step and notes how it went; an error is a failure, and the next step runs all the same.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<Outcome>) {
        eprintln!("\n== {name}");
        let begun = Instant::now();
        let outcome = work().unwrap_or_else(|error| Outcome::failed(format!("{error:#}")));
        for line in outcome.note.lines() {
            eprintln!("   {line}");
        }
        self.rows.push((name.to_owned(), outcome, begun.elapsed()));
    }

    /// Whether nothing failed.
    pub fn ok(&self) -> bool {
        self.rows.iter().all(|(_, outcome, _)| outcome.failed == 0)
    }

    /// The table and the closing line `N passed, N failed, N skipped`.
    pub fn table(&self) -> String {
        let width = self.rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        let mut text = String::new();
        let mut total = Outcome::default();
        for (name, outcome, took) in &self.rows {
            total.passed += outcome.passed;
            total.failed += outcome.failed;
            total.skipped += outcome.skipped;
            let verdict = match outcome {
                Outcome { failed: 1.., .. } => "FAILED",
                Outcome { passed: 0, .. } => "SKIPPED",
                Outcome { skipped: 1.., .. } => "partly",
                Outcome { .. } => "ok",
            };
            let note = outcome.note.lines().next().unwrap_or_default();
            let counts = format!("{}/{}/{}", outcome.passed, outcome.failed, outcome.skipped);
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{name:width$}  {verdict:7}  {counts:>9}  {:>6.1} s  {note}",
                took.as_secs_f64()
            );
        }
        let _ = writeln!(text, "{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_failure_and_the_rest_still_runs() {
        let mut report = Report::default();
        report.step("one", || anyhow::bail!("broken"));
        report.step("two", || Ok(Outcome { passed: 7, skipped: 2, ..Outcome::default() }));
        report.step("three", || Ok(Outcome::skipped("no /dev/kvm")));
        assert!(!report.ok());
        let table = report.table();
        assert!(table.ends_with("\n7 passed, 1 failed, 3 skipped\n"), "{table}");
        assert!(
            table.contains("FAILED") && table.contains("SKIPPED") && table.contains("no /dev/kvm"),
            "{table}"
        );
    }
}
