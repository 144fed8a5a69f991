//! The target breaks in each phase. Before Commit the machine stays on the source and never stops for long; after it, the target has it.

use anyhow::{Context, Result};
use controlplane::api::{Phase, Stage};
use tests::{Ground, LOADING, Subject};

#[test]
fn the_targets_daemon_is_killed_while_memory_is_copied() -> Result<()> {
    let Some(mut ground) = Ground::up("tprecopy") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "256M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    ground.fleet.kill(&b.name())?;
    ground.restart(b)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

#[test]
fn the_target_loses_power_while_memory_is_copied() -> Result<()> {
    let Some(mut ground) = Ground::up("tpower") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "256M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    ground.fleet.kill_with_machines(&b)?;
    ground.restart(b)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

/// The copy on the target cannot load the machine's state because it is stopped: so the switch-over lasts until the kill.
#[test]
fn the_targets_daemon_is_killed_in_the_switch_over() -> Result<()> {
    let Some(mut ground) = Ground::up("tswitch") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let frozen = ground.freeze(b);
    assert_eq!(frozen.count(), 1, "the target has no copy while it receives one");
    moving.reaches(&ground, Stage::Switchover)?;
    ground.fleet.kill(&b.name())?;
    drop(frozen);
    ground.restart(b)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

/// The target has been told to run the machine and its daemon dies before it can say so. It is the target's now.
#[test]
fn the_targets_daemon_is_killed_after_commit() -> Result<()> {
    let Some(mut ground) = Ground::up("tcommit") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    // First nobody can load the state; then the source cannot give the machine away; then the target cannot run it.
    let target = ground.freeze(b);
    moving.reaches(&ground, Stage::Switchover)?;
    let source = ground.freeze(a);
    drop(target);
    std::thread::sleep(LOADING);
    let target = ground.freeze(b);
    drop(source);
    moving.reaches(&ground, Stage::Committing)?;
    ground.fleet.kill(&b.name())?;
    drop(target);
    ground.restart(b)?;
    moving.ends_as(&ground, Phase::Succeeded)?;
    subject.is_well_on(&ground, b).context("it was given to the target")?;
    subject.can_still_move(&ground, a)?;
    subject.finish()?;
    ground.finish()
}
