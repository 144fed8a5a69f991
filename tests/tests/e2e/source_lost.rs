//! The source breaks in each phase. Its daemon comes back and takes charge of what is still its own; what it gave away it leaves alone. With
//! its power it loses a machine that it still owned, and nothing else.

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{is_lost, survives};

/// The guest never stops; the next daemon takes charge of it, and the migration has failed.
#[test]
fn the_sources_daemon_is_killed_while_memory_is_copied() -> Result<()> {
    survives("sprecopy", "256M", |scene| {
        let moving = scene.moves_until(Stage::Precopy)?;
        scene.ground.fleet.kill(&scene.a.name())?;
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

#[test]
fn the_source_loses_power_while_memory_is_copied() -> Result<()> {
    is_lost("spower", "256M", |scene| {
        let moving = scene.moves_until(Stage::Precopy)?;
        scene.ground.fleet.kill_with_machines(&scene.a)?;
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Failed).map(drop)
    })
}

/// The guest is paused when the daemon dies, and goes on under the next one.
#[test]
fn the_sources_daemon_is_killed_in_the_switch_over() -> Result<()> {
    survives("sswitch", "128M", |scene| {
        let (moving, copy) = scene.moves_until_paused()?;
        scene.ground.fleet.kill(&scene.a.name())?;
        drop(copy);
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

/// The machine was given away, and the daemon died before it could tell the target: nobody may run it on a guess, so the
/// control plane fences the target and hands the machine back to the source.
#[test]
fn the_sources_daemon_is_killed_between_giving_away_and_commit() -> Result<()> {
    survives("sdoubt", "128M", |scene| {
        let (moving, copy) = scene.moves_until_given_away()?;
        // It has its order to let go in its socket, and does so as soon as it can, with nobody there to hear it.
        scene.ground.fleet.kill(&scene.a.name())?;
        drop(copy);
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

/// The target has every page and may not run the machine: it was not told to. It waits for a source that has nothing any more.
#[test]
fn the_source_loses_power_between_giving_away_and_commit() -> Result<()> {
    is_lost("sdpower", "128M", |scene| {
        let (moving, copy) = scene.moves_until_given_away()?;
        scene.ground.fleet.kill_with_machines(&scene.a)?;
        drop(copy);
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Failed).map(drop)
    })
}

/// The target runs the machine and finds nobody to tell.
#[test]
fn the_sources_daemon_is_killed_right_after_commit() -> Result<()> {
    survives("scommit", "128M", |scene| {
        let (moving, copy) = scene.moves_until_committed()?;
        scene.ground.fleet.kill(&scene.a.name())?;
        drop(copy);
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}

#[test]
fn the_source_loses_power_right_after_commit() -> Result<()> {
    survives("scpower", "128M", |scene| {
        let (moving, copy) = scene.moves_until_committed()?;
        scene.ground.fleet.kill_with_machines(&scene.a)?;
        drop(copy);
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}

/// Its forward route and its old copy stand when the daemon dies; the control plane has the next one clear them away.
#[test]
fn the_sources_daemon_is_killed_while_late_packets_are_forwarded() -> Result<()> {
    survives("scomplete", "128M", |scene| {
        let moving = scene.moves_until(Stage::Completing)?;
        scene.ground.fleet.kill(&scene.a.name())?;
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}

/// Its forward route outlives it in the kernel.
#[test]
fn the_source_loses_power_while_late_packets_are_forwarded() -> Result<()> {
    survives("sgone", "128M", |scene| {
        let moving = scene.moves_until(Stage::Completing)?;
        scene.ground.fleet.kill_with_machines(&scene.a)?;
        scene.ground.restart(scene.a)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}
