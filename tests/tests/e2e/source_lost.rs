//! The source breaks in each phase. Its daemon comes back and takes charge of what is still its own; what it gave away it leaves alone.

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{Ground, LOADING, Subject};

/// The guest never stops; the next daemon takes charge of it, and the migration has failed.
#[test]
fn the_sources_daemon_is_killed_while_memory_is_copied() -> Result<()> {
    let Some(mut ground) = Ground::up("sprecopy") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "256M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    ground.fleet.kill(&a.name())?;
    ground.restart(a)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

/// The guest is paused when the daemon dies, and goes on under the next one.
#[test]
fn the_sources_daemon_is_killed_in_the_switch_over() -> Result<()> {
    let Some(mut ground) = Ground::up("sswitch") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let frozen = ground.freeze(b);
    moving.reaches(&ground, Stage::Switchover)?;
    ground.fleet.kill(&a.name())?;
    drop(frozen);
    ground.restart(a)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}

/// The machine was given away, and the daemon died before it could tell the target: nobody may run it on a guess, so the
/// control plane fences the target and hands the machine back to the source.
#[test]
fn the_sources_daemon_is_killed_between_giving_away_and_commit() -> Result<()> {
    let Some(mut ground) = Ground::up("sdoubt") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let target = ground.freeze(b);
    moving.reaches(&ground, Stage::Switchover)?;
    let source = ground.freeze(a);
    drop(target);
    std::thread::sleep(LOADING);
    // The source's copy has its order to let go in its socket, and does so as soon as it can, with nobody there to hear it.
    ground.fleet.kill(&a.name())?;
    drop(source);
    ground.restart(a)?;
    moving.ends_as(&ground, Phase::Failed)?;
    subject.is_well_on(&ground, a)?;
    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}
