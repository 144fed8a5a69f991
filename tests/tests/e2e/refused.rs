//! Migrations that must not begin: each is refused by name, and not a page leaves the source.

use anyhow::{Context, Result, bail};
use controlplane::api::Phase;
use tests::{Ground, Subject};

/// Exit codes of `mashines`: the state of things forbids it; somebody refused.
const CONFLICT: i32 = 4;
const REFUSED: i32 = 5;

/// Tries to migrate to host-b, which must be refused with `code` and all of `names` in what the user is told.
fn is_refused(ground: &Ground, subject: &mut Subject, code: i32, names: &[&str]) -> Result<()> {
    let words = ["migrate", subject.name.as_str(), "--to", &ground.b.name()];
    let (exit, said) = ground.refused(&words)?;
    if exit != code || names.iter().any(|name| !said.contains(name)) {
        bail!("expected exit code {code} and {names:?}, got {exit}: {said}");
    }
    subject.is_well_on(ground, ground.a).context("after the refusal")
}

#[test]
fn a_host_that_cannot_take_the_machine_refuses_by_name() -> Result<()> {
    let Some(mut ground) = Ground::up("refused") else { return Ok(()) };
    let mut subject = Subject::launch(&ground, ground.a, "128M")?;
    let (a, b) = (ground.a, ground.b);

    ground.restart_with(b, &[("--ram-limit", "64M")])?;
    is_refused(&ground, &mut subject, REFUSED, &["host-b", "RAM"]).context("too little RAM")?;

    let features = ground.host_view(a)?.cpu_features;
    let feature =
        features.iter().find(|name| *name == "avx2").or(features.last()).context("a CPU without features")?;
    ground.restart_with(b, &[("--without-cpu-feature", feature)])?;
    is_refused(&ground, &mut subject, REFUSED, &["host-b", feature]).context("a missing CPU feature")?;

    ground.restart_with(b, &[("--migration-version-max", "0")])?;
    is_refused(&ground, &mut subject, REFUSED, &["version"]).context("an old protocol")?;

    ground.restart_with(b, &[])?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

#[test]
fn a_migration_that_makes_no_sense_is_refused() -> Result<()> {
    let Some(ground) = Ground::up("senseless") else { return Ok(()) };
    let mut subject = Subject::launch(&ground, ground.b, "128M")?;
    let (exit, said) = ground.refused(&["migrate", "subject", "--to", "host-b"])?;
    assert!(exit == CONFLICT && said.contains("host-b already"), "to where it is: {exit}: {said}");
    let (exit, said) = ground.refused(&["migrate", "subject", "--to", "host-z"])?;
    assert!(exit == 3 && said.contains("host-z"), "to an unknown host: {exit}: {said}");

    let first = subject.move_to(&ground, ground.a)?;
    let (exit, said) = ground.refused(&["migrate", "subject", "--to", "host-a"])?;
    assert!(exit == CONFLICT && said.contains(&first.id()), "two at once: {exit}: {said}");
    first.ends_as(&ground, Phase::Succeeded)?;
    subject.is_well_on(&ground, ground.a)?;

    subject.can_still_move(&ground, ground.b)?;
    subject.finish()?;
    ground.finish()
}
