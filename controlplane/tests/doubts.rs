//! Hosts that fall silent at the worst moment: nobody guesses who owns the machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use common::{Rig, host};
use controlplane::api::{EventKind, MachineState, Phase, StopRequest};
use controlplane::core::MachineRef;
use controlplane::testing::Fault;
use wire::ids::{Epoch, MachineId, MigrationId};

/// A machine on `a` whose migration to `b` has lost its Commit, and `b` out of sight of the control plane.
fn in_doubt_without_target() -> (Rig, MachineId, MigrationId) {
    let mut rig = Rig::new(None, 0);
    let machine = rig.launch("web", "a");
    rig.until_state("web", MachineState::Started);
    rig.world.fault(Fault::LoseCommit, true);
    let migration = rig.migrate("go", "web", "b").unwrap();
    rig.until("Commit has left", |rig| rig.world.running(machine.id).is_empty());
    rig.cut_off(&host("b"), true);
    rig.until("it is in doubt", |rig| rig.migration(migration.id).phase == Phase::InDoubt);
    (rig, machine.id, migration.id)
}

#[test]
fn a_target_out_of_sight_keeps_the_machine_paused_until_it_answers() {
    let (mut rig, machine, migration) = in_doubt_without_target();
    rig.rounds(100);
    let stuck = rig.migration(migration);
    assert_eq!(stuck.phase, Phase::InDoubt);
    assert!(stuck.message.unwrap().starts_with("waits for b, which is not in sight"));
    assert!(rig.world.running(machine).is_empty(), "nobody may run it");
    assert!(rig.call(|core| core.stop(&MachineRef::Id(machine), &StopRequest::default())).is_err());
    rig.restart();
    rig.rounds(50);
    assert_eq!(rig.migration(migration).phase, Phase::InDoubt);
    rig.cut_off(&host("b"), false);
    assert_eq!(rig.until_ended(migration).phase, Phase::Failed);
    rig.world.fault(Fault::LoseCommit, false);
    rig.check_settled("web", machine);
    assert_eq!((rig.machine("web").host, rig.machine("web").epoch), (Some(host("a")), 3));
}

#[test]
fn a_commit_that_arrives_while_the_target_is_out_of_sight_counts() {
    let (mut rig, machine, migration) = in_doubt_without_target();
    // The source does not hear of it either.
    rig.world.fault(Fault::LoseRunning, true);
    rig.world.fault(Fault::LoseCommit, false);
    rig.until("it runs on b", |rig| rig.world.running(machine) == [(host("b"), Epoch(2))]);
    rig.rounds(50);
    assert_eq!(rig.migration(migration).phase, Phase::InDoubt);
    rig.cut_off(&host("b"), false);
    assert_eq!(rig.until_ended(migration).phase, Phase::Succeeded);
    rig.check_settled("web", machine);
}

#[test]
fn a_target_that_has_forgotten_whether_the_machine_ran_is_not_asked_for_promises() {
    let (mut rig, machine, migration) = in_doubt_without_target();
    rig.world.fault(Fault::LoseRunning, true);
    rig.world.fault(Fault::LoseCommit, false);
    rig.until("it runs on b", |rig| rig.world.running(machine) == [(host("b"), Epoch(2))]);
    rig.world.lose_power(&host("b"));
    rig.cut_off(&host("b"), false);
    assert_eq!(rig.until_ended(migration).phase, Phase::Succeeded);
    rig.until_state("web", MachineState::Failed);
    assert!(rig.world.running(machine).is_empty(), "the source's copy is older than what was seen on b");
    rig.world.fault(Fault::LoseRunning, false);
    rig.steady(|core| core.start(&MachineRef::Id(machine))).unwrap();
    rig.until_state("web", MachineState::Started);
    rig.check_settled("web", machine);
}

#[test]
fn a_source_out_of_sight_does_not_stop_a_move_that_the_hosts_have_begun() {
    let mut rig = Rig::new(None, 0);
    let machine = rig.launch("web", "a");
    rig.until_state("web", MachineState::Started);
    rig.world.fault(Fault::HoldInPrecopy, true);
    let migration = rig.migrate("go", "web", "b").unwrap();
    rig.until("it copies", |rig| rig.migration(migration.id).progress.is_some_and(|p| p.sent_bytes > 0));
    rig.cut_off(&host("a"), true);
    rig.until("the source is lost", |rig| rig.migration(migration.id).phase == Phase::InDoubt);
    rig.rounds(20);
    assert_eq!(rig.world.running(machine.id), [(host("a"), Epoch(1))], "nobody fences what may go well");
    rig.world.fault(Fault::HoldInPrecopy, false);
    assert_eq!(rig.until_ended(migration.id).phase, Phase::Succeeded);
    rig.cut_off(&host("a"), false);
    rig.check_settled("web", machine.id);
    let timings = rig.migration(migration.id).timings;
    assert_eq!(timings.map(|t| t.pause_us), Some(3400), "the source says it when it is back");
}

#[test]
fn a_source_that_dies_with_the_only_copy_leaves_a_machine_that_can_be_started() {
    let (mut rig, machine, migration) = in_doubt_without_target();
    rig.world.lose_power(&host("a"));
    rig.cut_off(&host("b"), false);
    rig.cut_off(&host("a"), true);
    rig.rounds(3);
    rig.cut_off(&host("a"), false);
    let ended = rig.until_ended(migration);
    assert_eq!((ended.phase, ended.error.unwrap().code.as_str()), (Phase::Failed, "machine_lost"));
    rig.until_state("web", MachineState::Failed);
    assert_eq!(rig.machine("web").reason.unwrap().code, "lost_with_host");
    rig.world.fault(Fault::LoseCommit, false);
    rig.steady(|core| core.start(&MachineRef::Id(machine))).unwrap();
    rig.until_state("web", MachineState::Started);
    rig.check_settled("web", machine);
}

#[test]
fn an_epoch_above_the_records_counts_and_is_told() {
    let mut rig = Rig::new(None, 0);
    let machine = rig.launch("web", "a");
    rig.until_state("web", MachineState::Started);
    // As after a store that was restored from before two moves.
    rig.world.plant(&host("c"), &host("a"), machine.id, Epoch(7));
    rig.until("one copy is left", |rig| rig.world.running(machine.id) == [(host("c"), Epoch(7))]);
    assert_eq!((rig.machine("web").host, rig.machine("web").epoch), (Some(host("c")), 7));
    let events = rig.call(|core| core.events_after(0, 1000)).unwrap();
    assert!(events.iter().any(|event| event.kind == EventKind::MachineEpochAhead));
    let next = rig.migrate("go", "web", "b").unwrap();
    assert_eq!(next.epoch, 8);
}
