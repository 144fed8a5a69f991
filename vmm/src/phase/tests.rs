//! The custody record: each arrow of the diagram, and a random walk that holds the invariants against all others.

use proptest::prelude::*;
use wire::ids::{MachineId, MigrationId};
use wire::units::{PageIndex, RamSize};
use wire::vmm::{BootSpec, CpuProfile, FileRef, MachineSpec};

use super::*;

fn spec() -> MachineSpec {
    MachineSpec {
        id: MachineId::from_u64(1),
        name: "m".parse().unwrap(),
        vcpus: 1,
        ram: RamSize::from_bytes(16 << 20).unwrap(),
        mac: [2, 0, 0, 0, 0, 1],
        ip4: [198, 19, 0, 2],
        ip6: [0; 16],
        boot: BootSpec {
            kernel: FileRef::Path(String::new()),
            initrd: None,
            cmdline: String::new(),
            guest_config: Vec::new(),
        },
        cpu: CpuProfile { name: "host".to_owned(), features: Vec::new(), tsc_khz: 0 },
        disks: Vec::new(),
    }
}

fn disowned(epoch: u64) -> Disowned {
    Disowned { epoch: Epoch(epoch), migration: MigrationId::from_u64(5), target: "host-b".parse().unwrap() }
}

fn walk(requests: &[Request]) -> Custody {
    requests.iter().fold(Custody::default(), |custody, request| custody.next(request).unwrap().1)
}

fn paused() -> Custody {
    walk(&[Request::Create(spec()), Request::Boot { initrd: false, cmdline: String::new() }])
}

#[test]
fn a_disowned_machine_runs_again_only_under_a_higher_epoch() {
    let running = paused().next(&Request::Run { epoch: Epoch(1) }).unwrap().1;
    let paused = running.next(&Request::Pause { harvest: true }).unwrap().1;
    let gone = paused.next(&Request::Disown(disowned(2))).unwrap().1;
    for epoch in [1, 2, 3, u64::MAX] {
        assert_eq!(gone.next(&Request::Run { epoch: Epoch(epoch) }).unwrap_err().code(), Code::Disowned);
    }
    assert_eq!(gone.next(&Request::Save).unwrap_err().code(), Code::Disowned);
    assert_eq!(gone.next(&Request::Disown(disowned(2))).unwrap(), (Action::None, gone.clone()));
    assert_eq!(gone.next(&Request::Disown(disowned(3))).unwrap_err().code(), Code::Disowned);
    assert_eq!(gone.next(&Request::Reclaim { epoch: Epoch(2) }).unwrap_err().code(), Code::StaleEpoch);
    let back = gone.next(&Request::Reclaim { epoch: Epoch(3) }).unwrap().1;
    assert_eq!(back.next(&Request::Reclaim { epoch: Epoch(3) }).unwrap(), (Action::None, back.clone()));
    assert_eq!(back.next(&Request::Run { epoch: Epoch(2) }).unwrap_err().code(), Code::StaleEpoch);
    assert_eq!(back.next(&Request::Run { epoch: Epoch(3) }).unwrap().0, Action::Run);
}

#[test]
fn repeated_requests_are_answered_again() {
    let running = paused().next(&Request::Run { epoch: Epoch(4) }).unwrap().1;
    assert_eq!(running.next(&Request::Run { epoch: Epoch(4) }).unwrap(), (Action::None, running.clone()));
    assert_eq!(running.next(&Request::Run { epoch: Epoch(3) }).unwrap_err().code(), Code::StaleEpoch);
    let paused = running.next(&Request::Pause { harvest: false }).unwrap().1;
    assert_eq!(paused.next(&Request::Pause { harvest: false }).unwrap().0, Action::PauseAgain);
    assert_eq!(paused.next(&Request::Disown(disowned(4))).unwrap_err().code(), Code::StaleEpoch);
}

#[test]
fn an_ended_guest_stays_ended() {
    let running = paused().next(&Request::Run { epoch: Epoch(1) }).unwrap().1;
    let ended = running.guest_ended(GuestEnd::PowerOff);
    assert_eq!(ended.phase, Phase::Ended);
    assert_eq!(ended.next(&Request::Run { epoch: Epoch(2) }), Err(Refusal::Ended(GuestEnd::PowerOff)));
    assert_eq!(ended.next(&Request::Quit).unwrap().0, Action::Quit);
    assert_eq!(paused().guest_ended(GuestEnd::Reset), paused());
}

fn any_request() -> impl Strategy<Value = Request> {
    let epoch = (0u64..6).prop_map(Epoch);
    prop_oneof![
        Just(Request::Create(spec())),
        Just(Request::Boot { initrd: false, cmdline: String::new() }),
        Just(Request::Restore(Vec::new())),
        epoch.clone().prop_map(|epoch| Request::Run { epoch }),
        any::<bool>().prop_map(|harvest| Request::Pause { harvest }),
        Just(Request::Save),
        any::<bool>().prop_map(|on| Request::DirtyLog { on }),
        Just(Request::DirtySync),
        Just(Request::DirtyTake { first: PageIndex(0), count: 64 }),
        (0u64..6).prop_map(|epoch| Request::Disown(disowned(epoch))),
        epoch.prop_map(|epoch| Request::Reclaim { epoch }),
        Just(Request::Describe),
        Just(Request::SerialInput(Vec::new())),
    ]
}

proptest! {
    #[test]
    fn invariants_hold_on_every_walk(requests in proptest::collection::vec(any_request(), 0..60)) {
        let mut custody = Custody::default();
        // Highest epoch that this record ever gave away.
        let mut given_away = None;
        for request in requests {
            let Ok((action, next)) = custody.next(&request) else { continue };
            prop_assert!(next.epoch >= custody.epoch, "the epoch went down");
            prop_assert_eq!(next.disowned.is_some(), next.phase == Phase::Disowned);
            if action == Action::Run {
                prop_assert_eq!(custody.phase, Phase::Paused);
                prop_assert!(Some(next.epoch) > given_away, "ran under an epoch that was given away");
            }
            if let Some(record) = &next.disowned {
                prop_assert_ne!(next.phase, Phase::Running);
                given_away = given_away.max(Some(record.epoch));
            }
            if next.phase == Phase::Running {
                prop_assert!(Some(next.epoch) > given_away);
            }
            custody = next;
        }
    }
}
