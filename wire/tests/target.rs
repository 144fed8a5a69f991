//! The target machine, step by step.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{EPOCH, MIGRATION, TO_EPOCH, source_config, spec, target_config};
use wire::fleet::{MigrationStanding, RefusalCode};
use wire::ids::{Epoch, MigrationId};
use wire::migration::lane::{ready_digest, state_digest};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, Final, LanePoint, Offer, Resume, Running, SourceMessage, TargetMessage,
    VERSION, VersionRange,
};
use wire::migration::target::{
    ACTIONS_MAX, Illegal, Target, TargetAction, TargetEvent, TargetOperation, TargetOutcome,
};
use wire::units::{Instant, RamSize};

struct Rig {
    target: Target,
    now: u64,
    illegal: Option<Illegal>,
}

fn offer(attempt: u32) -> Offer {
    let config = source_config();
    Offer {
        versions: config.versions,
        state_versions: config.state_versions,
        migration: MIGRATION,
        attempt,
        incarnation: 3,
        spec: spec(),
        epoch: EPOCH,
        to_epoch: TO_EPOCH,
        lanes: 4,
        source: config.source,
        downtime_budget_us: 10_000,
    }
}

const fn commit(attempt: u32) -> SourceMessage {
    SourceMessage::Commit(Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt })
}

fn said(actions: &[TargetAction]) -> Vec<&TargetMessage> {
    actions
        .iter()
        .filter_map(|action| match action {
            TargetAction::Send { message, .. } => Some(message),
            _ => None,
        })
        .collect()
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self { target: Target::new(target_config()), now: 0, illegal: None };
        assert_eq!(rig.give(TargetEvent::Start), [TargetAction::SetTimer { at: Instant(60_000_000) }]);
        rig
    }

    fn give(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        let mut out = Vec::new();
        self.illegal = self.target.handle(Instant(self.now), event, &mut out).err();
        assert!(out.len() <= ACTIONS_MAX);
        out
    }

    fn hear(&mut self, session: u64, message: SourceMessage) -> Vec<TargetAction> {
        self.give(TargetEvent::Message { session, message })
    }

    fn receiving(&mut self) {
        let actions = self.hear(1, SourceMessage::Offer(Box::new(offer(1))));
        assert_eq!(actions, [TargetAction::Reserve { spec: Box::new(spec()) }]);
        let actions = self.give(TargetEvent::Reserved);
        let accept = Accept { version: VERSION, state_version: 1, attempt: 1, lanes: 2, resume: None };
        assert_eq!(said(&actions), [&TargetMessage::Accept(accept)]);
        assert_eq!(actions[0], TargetAction::AcceptLanes { attempt: 1, lanes: 2, version: VERSION });
    }

    fn round(&mut self, round: u32) -> Vec<TargetAction> {
        let mut actions = self.give(TargetEvent::LaneRoundDone { lane: 0, round, digest: 10 });
        actions.extend(self.give(TargetEvent::LaneRoundDone { lane: 1, round, digest: 11 }));
        actions
    }

    fn finishing(&mut self) {
        self.receiving();
        let actions = self.round(1);
        assert_eq!(said(&actions), [&TargetMessage::RoundReceived { round: 1 }]);
        let last = Final { round: 2, state: vec![9; 10], console: ConsoleBytes::default() };
        let actions = self.hear(1, SourceMessage::Final(last));
        // Both begin while the last pages are still on their way.
        let load = TargetAction::LoadState { round: 2, state: vec![9; 10], state_version: 1 };
        assert_eq!(actions, [load, TargetAction::InstallRoute { round: 2 }]);
    }

    fn ready(&mut self) {
        self.finishing();
        assert_eq!(self.give(TargetEvent::StateLoaded { round: 2, us: 77 }), []);
        assert_eq!(said(&self.round(2)), [&TargetMessage::RoundReceived { round: 2 }]);
        let actions = self.give(TargetEvent::RouteInstalled { round: 2 });
        let digest = ready_digest(2, [10, 11], state_digest(&[9; 10]));
        assert_eq!(said(&actions), [&TargetMessage::Ready { round: 2, digest }]);
        assert_eq!(self.target.standing(), Some(MigrationStanding::Ready));
    }

    fn owned(&mut self) {
        self.ready();
        assert_eq!(self.hear(1, commit(1)), [TargetAction::Run { epoch: TO_EPOCH }]);
        let actions = self.give(TargetEvent::Running { us: 88 });
        let running = Running { epoch: TO_EPOCH, restore_us: 77, resume_us: 88 };
        assert_eq!(said(&actions), [&TargetMessage::Running(running)]);
        assert_eq!(actions.last(), Some(&TargetAction::Done(TargetOutcome::Owned { epoch: TO_EPOCH })));
    }
}

fn dropped(actions: &[TargetAction]) -> bool {
    actions.contains(&TargetAction::Discard)
}

#[test]
fn a_machine_arrives() {
    let mut rig = Rig::new();
    rig.owned();
    assert_eq!(rig.hear(1, SourceMessage::Finished), [TargetAction::Close { session: 1 }]);
    assert!(rig.target.owns());
    // Neither the source nor the control plane can take it away now.
    assert_eq!(rig.give(TargetEvent::Forget), [TargetAction::ForgetRefused]);
    assert_eq!(rig.give(TargetEvent::Fence { epoch: Epoch(50) }), [TargetAction::Owns { epoch: TO_EPOCH }]);
    assert_eq!(rig.hear(1, SourceMessage::Cancel), []);
}

#[test]
fn a_commit_repeated_on_a_new_connection_is_answered_again() {
    let mut rig = Rig::new();
    rig.owned();
    let actions = rig.hear(2, commit(2));
    assert_eq!(actions[0], TargetAction::Close { session: 1 });
    assert!(matches!(said(&actions)[..], [TargetMessage::Running(_)]), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, TargetAction::Run { .. })));
}

#[test]
fn nothing_runs_before_all_is_here() {
    for missing in 0..4 {
        let mut rig = Rig::new();
        rig.finishing();
        let events = [
            TargetEvent::StateLoaded { round: 2, us: 1 },
            TargetEvent::RouteInstalled { round: 2 },
            TargetEvent::LaneRoundDone { lane: 0, round: 2, digest: 10 },
            TargetEvent::LaneRoundDone { lane: 1, round: 2, digest: 11 },
        ];
        for (number, event) in events.into_iter().enumerate() {
            if number != missing {
                let actions = rig.give(event);
                assert!(!said(&actions).iter().any(|m| matches!(m, TargetMessage::Ready { .. })));
            }
        }
        let actions = rig.hear(1, commit(1));
        assert!(dropped(&actions) && rig.illegal.is_some(), "{actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, TargetAction::Run { .. })));
    }
}

#[test]
fn refusals_name_what_is_wrong() {
    let small = RamSize::from_bytes(32 << 20).unwrap();
    let cases = [
        (Offer { migration: MigrationId::from_u64(1), ..offer(1) }, RefusalCode::NotExpected),
        (Offer { source: "host-x".parse().unwrap(), ..offer(1) }, RefusalCode::NotExpected),
        (Offer { to_epoch: Epoch(7), ..offer(1) }, RefusalCode::Stale),
        (Offer { epoch: TO_EPOCH, ..offer(1) }, RefusalCode::Stale),
        (Offer { versions: VersionRange { oldest: 3, newest: 9 }, ..offer(1) }, RefusalCode::Version),
        (Offer { state_versions: VersionRange { oldest: 5, newest: 6 }, ..offer(1) }, RefusalCode::Version),
        (
            Offer { spec: wire::vmm::MachineSpec { ram: small, ..spec() }, ..offer(1) },
            RefusalCode::NotExpected,
        ),
    ];
    for (bad, wanted) in cases {
        let mut rig = Rig::new();
        let actions = rig.hear(1, SourceMessage::Offer(Box::new(bad)));
        assert!(
            matches!(said(&actions)[..], [TargetMessage::Refuse { code, .. }] if *code == wanted),
            "{actions:?}"
        );
        assert!(!actions.iter().any(|action| matches!(action, TargetAction::Reserve { .. })));
        // The one that is expected may still come.
        rig.receiving();
    }
}

#[test]
fn a_host_that_cannot_run_it_says_so() {
    let mut rig = Rig::new();
    rig.hear(1, SourceMessage::Offer(Box::new(offer(1))));
    let (operation, code) = (TargetOperation::Reserve, RefusalCode::CpuFeature);
    let actions = rig.give(TargetEvent::OperationFailed { operation, code, detail: "avx512f".into() });
    let refuse = TargetMessage::Refuse { code, detail: "avx512f".into() };
    assert_eq!(said(&actions), [&refuse]);
    assert!(dropped(&actions));
}

#[test]
fn a_reconnect_goes_on_from_what_is_here() {
    let mut rig = Rig::new();
    rig.receiving();
    rig.round(1);
    rig.give(TargetEvent::LaneRoundDone { lane: 0, round: 2, digest: 1 });
    assert_eq!(
        rig.give(TargetEvent::LinkLost { session: 1 }),
        [TargetAction::SetTimer { at: Instant(60_000_000) }]
    );
    let actions = rig.hear(2, SourceMessage::Offer(Box::new(offer(2))));
    assert_eq!(actions, [TargetAction::HaltLanes], "nothing is promised while the old lanes may write");
    let lanes = vec![LanePoint { round: 3, batches: 0 }, LanePoint { round: 2, batches: 5 }];
    let actions = rig.give(TargetEvent::LanesHalted { lanes: lanes.clone() });
    let resume = Some(Resume { round: 1, lanes, console_end: 0 });
    let accept = Accept { version: VERSION, state_version: 1, attempt: 2, lanes: 2, resume };
    assert_eq!(said(&actions), [&TargetMessage::Accept(accept)]);
}

#[test]
fn an_offer_after_ready_means_that_the_source_went_on() {
    let mut rig = Rig::new();
    rig.ready();
    let actions = rig.hear(2, SourceMessage::Offer(Box::new(offer(2))));
    assert_eq!(
        actions,
        [TargetAction::Close { session: 1 }, TargetAction::RemoveRoute, TargetAction::HaltLanes]
    );
    // What was loaded for the old pause is not what Ready speaks of the next time.
    rig.give(TargetEvent::LanesHalted { lanes: vec![] });
    rig.round(3);
    let last = Final { round: 4, state: vec![1], console: ConsoleBytes::default() };
    rig.hear(2, SourceMessage::Final(last));
    rig.give(TargetEvent::StateLoaded { round: 2, us: 1 });
    rig.give(TargetEvent::RouteInstalled { round: 2 });
    rig.round(4);
    assert_eq!(rig.target.state_name(), "Finishing");
}

#[test]
fn offers_of_old_connections_and_restarted_sources_are_refused() {
    let mut rig = Rig::new();
    rig.receiving();
    for bad in [offer(1), Offer { incarnation: 4, ..offer(2) }] {
        let actions = rig.hear(2, SourceMessage::Offer(Box::new(bad)));
        let code = RefusalCode::Stale;
        assert!(
            matches!(said(&actions)[..], [TargetMessage::Refuse { code: c, .. }] if *c == code),
            "{actions:?}"
        );
        assert_eq!(rig.target.state_name(), "Receiving");
    }
}

#[test]
fn what_nobody_comes_back_for_is_dropped_and_stays_dropped() {
    let mut rig = Rig::new();
    rig.ready();
    rig.now = 1_000;
    rig.give(TargetEvent::LinkLost { session: 1 });
    rig.now = 60_000_999;
    assert_eq!(rig.give(TargetEvent::Timer), [TargetAction::SetTimer { at: Instant(60_001_000) }]);
    rig.now = 60_001_000;
    let actions = rig.give(TargetEvent::Timer);
    assert_eq!(actions, [TargetAction::RemoveRoute, TargetAction::Discard]);
    // The Commit comes too late, before and after the copy is gone.
    for _ in 0..2 {
        let actions = rig.hear(2, commit(2));
        assert!(matches!(said(&actions)[..], [TargetMessage::Abort { .. }]), "{actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, TargetAction::Run { .. })));
        rig.give(TargetEvent::Discarded);
    }
}

#[test]
fn a_fence_is_confirmed_when_the_copy_is_gone() {
    let mut rig = Rig::new();
    rig.ready();
    assert_eq!(rig.give(TargetEvent::Fence { epoch: EPOCH }), [TargetAction::Fenced { epoch: EPOCH }]);
    assert_eq!(rig.target.state_name(), "Ready", "a fence below its epoch is none of its business");
    let actions = rig.give(TargetEvent::Fence { epoch: TO_EPOCH });
    assert!(dropped(&actions) && !actions.contains(&TargetAction::Fenced { epoch: TO_EPOCH }));
    let actions = rig.give(TargetEvent::Discarded);
    assert_eq!(actions[0], TargetAction::Fenced { epoch: TO_EPOCH });
}

#[test]
fn a_fence_that_meets_a_commit_waits_for_its_outcome() {
    let fail = TargetEvent::OperationFailed {
        operation: TargetOperation::Run,
        code: RefusalCode::HostError,
        detail: "no".into(),
    };
    for (outcome, owned) in [(TargetEvent::Running { us: 1 }, true), (fail, false)] {
        let mut rig = Rig::new();
        rig.ready();
        rig.hear(1, commit(1));
        assert_eq!(rig.give(TargetEvent::Fence { epoch: TO_EPOCH }), []);
        let mut actions = rig.give(outcome);
        actions.extend(rig.give(TargetEvent::Discarded));
        assert_eq!(actions.contains(&TargetAction::Owns { epoch: TO_EPOCH }), owned, "{actions:?}");
        assert_eq!(actions.contains(&TargetAction::Fenced { epoch: TO_EPOCH }), !owned, "{actions:?}");
    }
}

#[test]
fn messages_out_of_place_drop_the_copy() {
    let last = |round| SourceMessage::Final(Final { round, state: vec![], console: ConsoleBytes::default() });
    let huge = ConsoleBytes { offset: 0, bytes: vec![0; (1 << 20) + 1] };
    let far = ConsoleBytes { offset: u64::MAX, bytes: vec![0] };
    for bad in [last(0), SourceMessage::Finished, SourceMessage::Console(huge), SourceMessage::Console(far)] {
        let mut rig = Rig::new();
        rig.receiving();
        rig.round(1);
        let actions = rig.hear(1, bad);
        assert!(dropped(&actions) && rig.illegal.is_some(), "{actions:?}");
        assert!(matches!(said(&actions)[..], [TargetMessage::Abort { code: RefusalCode::Protocol, .. }]));
    }
    let mut rig = Rig::new();
    rig.finishing();
    assert!(dropped(&rig.hear(1, last(2))), "the end came twice");
    let mut rig = Rig::new();
    rig.receiving();
    assert!(dropped(&rig.give(TargetEvent::LaneRoundDone { lane: 2, round: 1, digest: 0 })));
}

#[test]
fn a_restarted_host_that_runs_it_says_so() {
    let mut target = Target::recover(target_config());
    let mut out = Vec::new();
    target.handle(Instant(1), TargetEvent::Start, &mut out).unwrap();
    assert_eq!(out, []);
    target.handle(Instant(2), TargetEvent::Message { session: 9, message: commit(3) }, &mut out).unwrap();
    assert!(matches!(said(&out)[..], [TargetMessage::Running(_)]), "{out:?}");
    assert_eq!(target.standing(), Some(MigrationStanding::Owns { epoch: TO_EPOCH }));
}

#[test]
fn strangers_get_an_answer_that_is_safe_to_act_on() {
    let answer = commit(1).answer_of_a_stranger();
    assert!(matches!(answer, TargetMessage::Abort { code: RefusalCode::NotExpected, .. }));
    let answer = SourceMessage::Offer(Box::new(offer(1))).answer_of_a_stranger();
    assert!(matches!(answer, TargetMessage::Refuse { code: RefusalCode::NotExpected, .. }));
}
