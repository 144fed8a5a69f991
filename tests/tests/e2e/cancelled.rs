//! Cancelling works until Commit, and takes effect at once.

use anyhow::Result;
use controlplane::api::{Migration, Phase, Stage};
use tests::{Ground, Subject};

#[test]
fn a_migration_can_be_cancelled_in_each_phase_before_commit() -> Result<()> {
    let Some(ground) = Ground::up("cancel") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "128M")?;

    let moving = subject.move_to(&ground, b)?;
    let _: Migration = ground.ask(&["migrations", "cancel", &moving.id()])?;
    moving.ends_as(&ground, Phase::Cancelled)?;
    subject.is_well_on(&ground, a)?;

    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let _: Migration = ground.ask(&["migrations", "cancel", &moving.id()])?;
    moving.ends_as(&ground, Phase::Cancelled)?;
    subject.is_well_on(&ground, a)?;

    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    let frozen = ground.freeze(b);
    moving.reaches(&ground, Stage::Switchover)?;
    let _: Migration = ground.ask(&["migrations", "cancel", &moving.id()])?;
    moving.ends_as(&ground, Phase::Cancelled)?;
    drop(frozen);
    subject.is_well_on(&ground, a)?;

    subject.can_still_move(&ground, b)?;
    subject.finish()?;
    ground.finish()
}
