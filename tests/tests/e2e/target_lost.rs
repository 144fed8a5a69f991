//! The target breaks before Commit: the machine stays on the source and never stops for long.

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{Ground, Subject};

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
