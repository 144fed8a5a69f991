//! The control plane dies: the hosts finish what they have begun, and it learns how it ended when it is back.

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{Ground, Subject};

#[test]
fn the_control_plane_is_killed_while_memory_is_copied() -> Result<()> {
    let Some(mut ground) = Ground::up("cprecopy") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "256M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    ground.fleet.kill("control")?;
    ground.fleet.start_control()?;
    ground.fleet.await_hosts()?;
    moving.ends_as(&ground, Phase::Succeeded)?;
    subject.is_well_on(&ground, b)?;
    subject.can_still_move(&ground, a)?;
    subject.finish()?;
    ground.finish()
}

/// It is away while the machine changes hands.
#[test]
fn the_control_plane_is_killed_in_the_switch_over() -> Result<()> {
    let Some(mut ground) = Ground::up("cswitch") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let frozen = ground.freeze(b);
    moving.reaches(&ground, Stage::Switchover)?;
    ground.fleet.kill("control")?;
    drop(frozen);
    ground.fleet.start_control()?;
    ground.fleet.await_hosts()?;
    moving.ends_as(&ground, Phase::Succeeded)?;
    subject.is_well_on(&ground, b)?;
    subject.can_still_move(&ground, a)?;
    subject.finish()?;
    ground.finish()
}
