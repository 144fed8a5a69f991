//! The checks in their order: the quick ones first.

use anyhow::Result;

use super::{hygiene, layering, licences, lints, size, unsafe_list};
use crate::report::{Outcome, Report};

/// Runs all checks into `report`.
pub fn run(report: &mut Report) {
    report.step("format", || found(lints::formatting()?));
    report.step("layering", || found(layering::violations()?));
    report.step("file size", || found(size::violations()?));
    report.step("unsafe list", || found(unsafe_list::violations()?));
    report.step("file hygiene", || found(hygiene::violations()?));
    report.step("licences", || found(licences::violations()?));
    report.step("cargo-deny", lints::dependencies);
    report.step("clippy", || lints::clippy(None));
    report.step("clippy, test guest", || lints::clippy(Some("tests/guest/Cargo.toml")));
}

/// An outcome from a list of violations.
fn found(violations: Vec<String>) -> Result<Outcome> {
    Ok(if violations.is_empty() { Outcome::passed("") } else { Outcome::failed(violations.join("\n")) })
}
