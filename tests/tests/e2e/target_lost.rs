//! The target breaks. Before Commit the machine stays on the source and never stops for long; after it, the machine is the target's,
//! unless the target promises that it never ran there.

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{is_lost, survives};

#[test]
fn the_targets_daemon_is_killed_while_memory_is_copied() -> Result<()> {
    survives("tprecopy", "256M", |scene| {
        let moving = scene.moves_until(Stage::Precopy)?;
        scene.ground.fleet.kill(&scene.b.name())?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

#[test]
fn the_target_loses_power_while_memory_is_copied() -> Result<()> {
    survives("tpower", "256M", |scene| {
        let moving = scene.moves_until(Stage::Precopy)?;
        scene.ground.fleet.kill_with_machines(&scene.b)?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

#[test]
fn the_targets_daemon_is_killed_in_the_switch_over() -> Result<()> {
    survives("tswitch", "128M", |scene| {
        let (moving, copy) = scene.moves_until_paused()?;
        assert_eq!(copy.count(), 1, "the target has no copy while it receives one");
        scene.ground.fleet.kill(&scene.b.name())?;
        drop(copy);
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

/// The copy has its order to run in its socket, and runs with nobody there to hear of it. The next daemon finds it running.
#[test]
fn the_targets_daemon_is_killed_right_after_commit() -> Result<()> {
    survives("tcommit", "128M", |scene| {
        let (moving, copy) = scene.moves_until_committed()?;
        scene.ground.fleet.kill(&scene.b.name())?;
        drop(copy);
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}

/// Commit never came to the target, which promises to run no copy, so the source takes the machine back where it was paused.
#[test]
fn the_target_loses_power_while_commit_is_on_its_way() -> Result<()> {
    survives("tcpower", "128M", |scene| {
        let (moving, source) = scene.moves_until_given_away()?;
        scene.ground.fleet.cut(&scene.b)?;
        drop(source);
        moving.reaches(&scene.ground, Stage::Committing)?;
        scene.ground.fleet.kill_with_machines(&scene.b)?;
        scene.ground.fleet.mend(&scene.b)?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Failed)?;
        Ok(scene.a)
    })
}

/// Its copy had its order to run, and nobody is left who could tell whether it did. The world may have seen what it did, so the source's
/// old copy must not come to life.
#[test]
fn the_target_loses_power_after_commit_before_the_source_heard_of_it() -> Result<()> {
    is_lost("tunheard", "128M", |scene| {
        let (moving, copy) = scene.moves_until_committed()?;
        scene.ground.fleet.kill_with_machines(&scene.b)?;
        drop(copy);
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Succeeded).map(drop)
    })
}

#[test]
fn the_targets_daemon_is_killed_while_late_packets_are_forwarded() -> Result<()> {
    survives("tcomplete", "128M", |scene| {
        let moving = scene.moves_until(Stage::Completing)?;
        scene.ground.fleet.kill(&scene.b.name())?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Succeeded)?;
        Ok(scene.b)
    })
}

/// The machine ran on the target, so its memory went with the target. The source's old copy must not come to life.
#[test]
fn the_target_loses_power_while_late_packets_are_forwarded() -> Result<()> {
    is_lost("tgone", "128M", |scene| {
        let moving = scene.moves_until(Stage::Completing)?;
        scene.ground.fleet.kill_with_machines(&scene.b)?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Succeeded).map(drop)
    })
}

/// As before, but the target's state directory, on a tmpfs, goes with its power: it no longer knows that a machine was to come at all.
#[test]
fn the_target_loses_power_and_all_it_knew_after_commit() -> Result<()> {
    is_lost("tforget", "128M", |scene| {
        let (moving, copy) = scene.moves_until_committed()?;
        scene.ground.fleet.kill_with_machines(&scene.b)?;
        drop(copy);
        scene.ground.fleet.lose_state(&scene.b)?;
        scene.ground.restart(scene.b)?;
        moving.ends_as(&scene.ground, Phase::Succeeded).map(drop)
    })
}
