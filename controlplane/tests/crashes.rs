//! The control plane is killed at every single write to its disk, in the middle of every kind of work, and must finish it
//! after its restart: exactly one copy of the machine runs, and it is the one on record.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use common::{Rig, host};
use controlplane::api::{MachineState, Phase, StopRequest};
use controlplane::core::MachineRef;
use controlplane::testing::Fault;
use wire::fleet::RefusalCode;
use wire::vmm::GuestEnd;

/// Runs the scenario once undisturbed, to count the writes, and then once for each write with a crash there.
fn at_every_write(scenario: fn(&mut Rig)) {
    let mut calm = Rig::new(None, 0);
    scenario(&mut calm);
    let writes = calm.disk.operations();
    assert!(writes > 50, "only {writes} writes: the scenario does not do much");
    let mut crashes = 0;
    for at in 0..writes {
        let mut rig = Rig::new(Some(at), at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        scenario(&mut rig);
        crashes += rig.crashes;
    }
    assert!(u64::from(crashes) >= writes, "{crashes} crashes in {writes} runs");
}

#[test]
fn a_migration_succeeds() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        let migration = rig.migrate("go", "web", "b").unwrap();
        assert_eq!(rig.until_ended(migration.id).phase, Phase::Succeeded);
        rig.check_settled("web", machine.id);
        assert_eq!((rig.machine("web").host, rig.machine("web").epoch), (Some(host("b")), 2));
    });
}

#[test]
fn a_commit_that_never_arrives_is_fenced_and_reclaimed() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.world.fault(Fault::LoseCommit, true);
        let migration = rig.migrate("go", "web", "b").unwrap();
        let ended = rig.until_ended(migration.id);
        assert_eq!((ended.phase, ended.error.unwrap().code.as_str()), (Phase::Failed, "peer_lost"));
        // The lost Commit turns up after all: it must find the door shut.
        rig.world.fault(Fault::LoseCommit, false);
        rig.rounds(5);
        rig.check_settled("web", machine.id);
        assert_eq!((rig.machine("web").host, rig.machine("web").epoch), (Some(host("a")), 3));
        let again = rig.migrate("again", "web", "b").unwrap();
        assert_eq!(rig.until_ended(again.id).phase, Phase::Succeeded);
        rig.check_settled("web", machine.id);
    });
}

#[test]
fn an_answer_to_commit_that_is_lost_is_asked_for() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.world.fault(Fault::LoseRunning, true);
        let migration = rig.migrate("go", "web", "b").unwrap();
        assert_eq!(rig.until_ended(migration.id).phase, Phase::Succeeded);
        rig.check_settled("web", machine.id);
        assert_eq!((rig.machine("web").host, rig.machine("web").epoch), (Some(host("b")), 2));
    });
}

#[test]
fn a_cancel_leaves_the_machine_where_it_is() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.world.fault(Fault::HoldInPrecopy, true);
        let migration = rig.migrate("go", "web", "b").unwrap();
        rig.until("it copies", |rig| rig.migration(migration.id).progress.is_some_and(|p| p.sent_bytes > 0));
        rig.call(|core| core.cancel_migration(migration.id)).unwrap();
        assert_eq!(rig.until_ended(migration.id).phase, Phase::Cancelled);
        rig.world.fault(Fault::HoldInPrecopy, false);
        rig.check_settled("web", machine.id);
        assert_eq!(rig.machine("web").host, Some(host("a")));
    });
}

#[test]
fn a_target_that_refuses_costs_nothing() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.world.refuse_next(&host("b"), RefusalCode::NoRam, "64 MiB wanted, 1 MiB free");
        let migration = rig.migrate("go", "web", "b").unwrap();
        let ended = rig.until_ended(migration.id);
        // A crash may lose the refusal; asked again, the host takes the machine.
        assert!(matches!(ended.phase, Phase::Failed | Phase::Succeeded));
        if rig.crashes == 0 {
            assert_eq!(ended.error.unwrap().code, "no_ram");
        }
        rig.check_settled("web", machine.id);
    });
}

#[test]
fn stop_start_and_remove() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.call(|core| core.stop(&MachineRef::Id(machine.id), &StopRequest::default())).unwrap();
        rig.until_state("web", MachineState::Stopped);
        assert!(rig.world.traces(machine.id).is_empty());
        let start =
            |core: &mut controlplane::core::Core| match core.machine(&MachineRef::Id(machine.id))?.state {
                // Begun by a call whose answer a crash swallowed.
                MachineState::Starting => core.machine(&MachineRef::Id(machine.id)),
                _ => core.start(&MachineRef::Id(machine.id)),
            };
        rig.steady(start).unwrap();
        rig.until_state("web", MachineState::Started);
        rig.check_settled("web", machine.id);
        let again = rig.machine("web");
        assert_eq!((again.ip6, again.ip4, again.epoch), (machine.ip6, machine.ip4, 2));
        // It may have been removed by a call whose answer a crash swallowed.
        let _ = rig.call(|core| core.remove(&MachineRef::Id(machine.id), true));
        rig.until("it is gone", |rig| rig.world.traces(machine.id).is_empty());
        rig.until("its name is free", |rig| {
            rig.call(|core| core.machine(&MachineRef::Name(host("web")))).is_err()
        });
    });
}

#[test]
fn a_guest_that_ends_is_stopped_and_its_last_words_are_kept() {
    at_every_write(|rig| {
        let machine = rig.launch("web", "a");
        rig.until_state("web", MachineState::Started);
        rig.world.write_console(machine.id, "last words\n");
        rig.world.end_guest(machine.id, GuestEnd::PowerOff);
        rig.until_state("web", MachineState::Stopped);
        assert!(rig.world.traces(machine.id).is_empty());
        let read = rig.call(|core| core.read_log(&MachineRef::Id(machine.id), 0, 1000)).unwrap();
        let controlplane::core::LogRead::Now(answer) = read else { panic!("{read:?}") };
        assert_eq!((answer.offset, answer.live), (0, false));
        assert_eq!(String::from_utf8(answer.bytes).unwrap(), "boot under e1\nlast words\n");
    });
}
