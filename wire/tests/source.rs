//! The source machine, step by step.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{EPOCH, MIGRATION, TO_EPOCH, source_config};
use wire::fleet::{Outcome, RefusalCode};
use wire::ids::Epoch;
use wire::migration::lane::{ready_digest, state_digest};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, LanePoint, Resume, Running, SourceMessage, TargetMessage, VERSION,
};
use wire::migration::source::{
    ACTIONS_MAX, Illegal, Sent, Source, SourceAction, SourceConfig, SourceEvent, SourceOperation,
};
use wire::units::Instant;

/// A source and the time.
struct Rig {
    source: Source,
    now: u64,
    illegal: Option<Illegal>,
}

impl Rig {
    fn new(config: SourceConfig) -> Self {
        Self { source: Source::new(config), now: 0, illegal: None }
    }

    /// Actions of one event, without the progress reports.
    fn give(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        let mut out = Vec::new();
        self.illegal = self.source.handle(Instant(self.now), event, &mut out).err();
        assert!(out.len() <= ACTIONS_MAX);
        out.retain(|action| !matches!(action, SourceAction::Progress(_)));
        out
    }

    fn hear(&mut self, message: TargetMessage) -> Vec<SourceAction> {
        let attempt = self.source.attempt();
        self.give(SourceEvent::Message { attempt, message })
    }

    /// Up to the offer.
    fn connect(&mut self) {
        self.give(SourceEvent::Start);
        let actions = self.give(SourceEvent::Connected { attempt: 1 });
        assert!(matches!(&actions[..], [SourceAction::Send(SourceMessage::Offer(_))]), "{actions:?}");
    }

    fn accept(&mut self, resume: Option<Resume>) -> Vec<SourceAction> {
        let attempt = self.source.attempt();
        self.hear(TargetMessage::Accept(Accept {
            version: VERSION,
            state_version: 1,
            attempt,
            lanes: 2,
            resume,
        }))
    }

    /// Up to the end of the first round.
    fn precopy(&mut self) {
        self.connect();
        self.accept(None);
        assert_eq!(self.give(SourceEvent::DirtyLogStarted), [SourceAction::SendRound { round: 1 }]);
        assert_eq!(self.round_sent(1), [SourceAction::CountDirty { round: 1 }]);
    }

    fn round_sent(&mut self, round: u32) -> Vec<SourceAction> {
        let sent = Sent { round, pages: 16_000, zero_pages: 384, bytes: 64 << 20, us: 64_000 };
        self.give(SourceEvent::RoundSent(sent))
    }

    /// Up to the pause, with the lanes run empty.
    fn pause(&mut self) {
        self.precopy();
        assert_eq!(
            self.hear(TargetMessage::RoundReceived { round: 1 }),
            [SourceAction::Confirm { round: 1 }]
        );
        let actions = self.give(SourceEvent::Dirty { round: 1, pages: 10 });
        let limit = Instant(self.now + 3_000_000);
        assert_eq!(actions, [SourceAction::Pause, SourceAction::SetTimer { at: limit }]);
    }

    fn finish(&mut self) {
        self.pause();
        let actions = self.give(SourceEvent::Paused { stop_us: 60, harvest_us: 5, dirty_pages: 12 });
        // At once, both.
        let save = SourceAction::Save { console_from: 0, state_version: 1 };
        assert_eq!(actions, [SourceAction::SendFinal { round: 2 }, save]);
    }

    fn disown(&mut self) {
        self.finish();
        let console = ConsoleBytes { offset: 0, bytes: b"hi".to_vec() };
        let actions = self.give(SourceEvent::Saved { state: vec![7; 100], console, us: 80 });
        assert!(matches!(&actions[..], [SourceAction::Send(SourceMessage::Final(last))] if last.round == 2));
        let sent = Sent { round: 2, pages: 12, ..Sent::default() };
        assert_eq!(self.give(SourceEvent::FinalSent { sent, lane_digests: vec![1, 2] }), []);
        let digest = ready_digest(2, [1, 2], state_digest(&[7; 100]));
        let actions = self.hear(TargetMessage::Ready { round: 2, digest });
        assert_eq!(actions, [SourceAction::Disown { epoch: TO_EPOCH }]);
    }

    fn commit(&mut self) {
        self.disown();
        let commit = Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt: 1 };
        let actions = self.give(SourceEvent::Disowned);
        // First what lets the target run, then the packets.
        assert_eq!(actions, [SourceAction::Send(SourceMessage::Commit(commit)), SourceAction::SwitchForward]);
        assert!(self.source.in_doubt());
    }

    fn lost(&mut self) -> Vec<SourceAction> {
        let attempt = self.source.attempt();
        self.give(SourceEvent::LinkLost { attempt })
    }
}

const RESUME: SourceAction = SourceAction::ResumeGuest { epoch: EPOCH };

fn failed(actions: &[SourceAction]) -> Option<RefusalCode> {
    actions.iter().find_map(|action| match action {
        SourceAction::Done(Outcome::Failed { code, .. }) => Some(*code),
        _ => None,
    })
}

#[test]
fn a_machine_moves() {
    let mut rig = Rig::new(source_config());
    rig.commit();
    rig.now = 5_000;
    let running = Running { epoch: TO_EPOCH, restore_us: 90, resume_us: 150 };
    let actions = rig.hear(TargetMessage::Running(running));
    assert_eq!(actions, [SourceAction::Send(SourceMessage::Finished), SourceAction::Release]);
    let actions = rig.give(SourceEvent::Released);
    let [SourceAction::Disconnect { attempt: 1 }, SourceAction::Done(Outcome::Succeeded(timings))] =
        &actions[..]
    else {
        panic!("{actions:?}");
    };
    assert_eq!((timings.pause_us, timings.restore_us, timings.resume_us), (5_000, 90, 150));
    assert_eq!((timings.rounds, timings.final_pages, timings.pages_sent), (2, 12, 16_012));
    assert!(rig.source.ended());
}

#[test]
fn the_lanes_run_empty_before_the_pause() {
    let mut rig = Rig::new(source_config());
    rig.precopy();
    assert_eq!(rig.give(SourceEvent::Dirty { round: 1, pages: 10 }), []);
    let actions = rig.hear(TargetMessage::RoundReceived { round: 1 });
    assert_eq!(actions, [SourceAction::Confirm { round: 1 }, SourceAction::CountDirty { round: 1 }]);
    // By now too much is dirty again: one more round.
    let actions = rig.give(SourceEvent::Dirty { round: 1, pages: 9_000 });
    assert_eq!(actions, [SourceAction::ReadConsole { from: 0 }, SourceAction::SendRound { round: 2 }]);
}

#[test]
fn a_round_is_not_held_up_by_the_one_before() {
    let mut rig = Rig::new(source_config());
    rig.precopy();
    let actions = rig.give(SourceEvent::Dirty { round: 1, pages: 9_000 });
    assert!(actions.contains(&SourceAction::SendRound { round: 2 }), "{actions:?}");
}

#[test]
fn a_lost_link_in_precopy_goes_on_where_it_was() {
    let mut rig = Rig::new(source_config());
    rig.precopy();
    let actions = rig.lost();
    assert_eq!(actions[0], SourceAction::Connect { attempt: 2 });
    // Of the old connection nothing is heard any more.
    assert_eq!(rig.give(SourceEvent::Dirty { round: 1, pages: 1 }), []);
    let ready = TargetMessage::RoundReceived { round: 1 };
    assert_eq!(rig.give(SourceEvent::Message { attempt: 1, message: ready }), []);
    rig.give(SourceEvent::Connected { attempt: 2 });
    let lanes = vec![LanePoint { round: 1, batches: 7 }, LanePoint { round: 2, batches: 0 }];
    let received = Resume { round: 0, lanes, console_end: 11 };
    let actions = rig.accept(Some(received.clone()));
    let open = SourceAction::OpenLanes { attempt: 2, lanes: 2, version: VERSION };
    let console = SourceAction::ReadConsole { from: 11 };
    let back = SourceAction::GiveBackDirty { received };
    assert_eq!(actions, [open, console, back, SourceAction::SendRound { round: 2 }]);
}

#[test]
fn a_target_that_lost_its_copy_gets_everything_again() {
    let mut rig = Rig::new(source_config());
    rig.precopy();
    rig.lost();
    rig.give(SourceEvent::Connected { attempt: 2 });
    let actions = rig.accept(None);
    assert_eq!(actions.last(), Some(&SourceAction::StartDirtyLog));
}

#[test]
fn tries_get_rarer_and_end() {
    let mut rig = Rig::new(source_config());
    rig.give(SourceEvent::Start);
    let mut waits = Vec::new();
    let ended = loop {
        let actions = rig.lost();
        if let Some(code) = failed(&actions) {
            break code;
        }
        let [SourceAction::SetTimer { at }] = actions[..] else { panic!("{actions:?}") };
        waits.push(at.0 - rig.now);
        rig.now = at.0;
        let actions = rig.give(SourceEvent::Timer);
        if let Some(code) = failed(&actions) {
            break code;
        }
    };
    assert_eq!(ended, RefusalCode::PeerLost);
    assert_eq!(waits[..4], [50_000, 100_000, 200_000, 400_000]);
    assert_eq!(rig.now, 30_000_000);
}

#[test]
fn a_lost_link_in_the_pause_resumes_the_guest_at_once() {
    let mut rig = Rig::new(source_config());
    rig.finish();
    assert_eq!(rig.lost(), [RESUME]);
    let actions = rig.give(SourceEvent::Resumed);
    assert_eq!(actions[0], SourceAction::Connect { attempt: 2 });
}

#[test]
fn a_pause_without_an_answer_is_cut_short() {
    let mut rig = Rig::new(source_config());
    rig.finish();
    rig.now = 2_999_999;
    assert_eq!(rig.give(SourceEvent::Timer), [SourceAction::SetTimer { at: Instant(3_000_000) }]);
    rig.now = 3_000_000;
    assert_eq!(rig.give(SourceEvent::Timer), [RESUME, SourceAction::Disconnect { attempt: 1 }]);
}

#[test]
fn the_third_switch_over_that_fails_is_the_last() {
    let mut rig = Rig::new(source_config());
    rig.finish();
    for attempt in 2.. {
        rig.lost();
        let actions = rig.give(SourceEvent::Resumed);
        if let Some(code) = failed(&actions) {
            assert_eq!((attempt, code), (4, RefusalCode::PeerLost));
            break;
        }
        rig.give(SourceEvent::Connected { attempt });
        let round = (attempt - 1) * 2;
        let lanes = vec![LanePoint { round, batches: 0 }; 2];
        rig.accept(Some(Resume { round: round - 1, lanes, console_end: 0 }));
        rig.round_sent(round + 1);
        rig.hear(TargetMessage::RoundReceived { round: round + 1 });
        assert_eq!(rig.give(SourceEvent::Dirty { round: round + 1, pages: 0 })[0], SourceAction::Pause);
        rig.give(SourceEvent::Paused { stop_us: 1, harvest_us: 1, dirty_pages: 0 });
    }
}

#[test]
fn once_disowned_it_never_resumes_by_itself() {
    let mut rig = Rig::new(source_config());
    rig.commit();
    for _ in 0..50 {
        let actions = rig.lost();
        let [SourceAction::SetTimer { at }] = actions[..] else { panic!("{actions:?}") };
        rig.now = at.0;
        let actions = rig.give(SourceEvent::Timer);
        let attempt = rig.source.attempt();
        assert_eq!(actions, [SourceAction::Connect { attempt }]);
        let commit = Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt };
        let actions = rig.give(SourceEvent::Connected { attempt });
        assert_eq!(actions, [SourceAction::Send(SourceMessage::Commit(commit))]);
    }
    assert_eq!(rig.give(SourceEvent::Cancel), [SourceAction::CancelRefused]);
    assert!(rig.now >= 50 * 50_000 && rig.source.in_doubt());
}

#[test]
fn the_link_may_be_gone_when_the_vmm_has_recorded_it() {
    let mut rig = Rig::new(source_config());
    rig.disown();
    assert_eq!(rig.lost(), []);
    let actions = rig.give(SourceEvent::Disowned);
    assert_eq!(actions, [SourceAction::Connect { attempt: 2 }, SourceAction::SwitchForward]);
}

#[test]
fn a_target_that_dropped_it_is_reported_and_the_machine_reclaimed() {
    let mut rig = Rig::new(source_config());
    rig.commit();
    let actions = rig.hear(TargetMessage::Abort { code: RefusalCode::PeerLost, detail: "late".into() });
    assert_eq!(actions, [SourceAction::TargetDropped, SourceAction::Disconnect { attempt: 1 }]);
    let stale = rig.give(SourceEvent::Reclaim { epoch: TO_EPOCH });
    assert_eq!(stale, [SourceAction::ReclaimRefused { code: RefusalCode::Stale }]);
    let epoch = Epoch(9);
    assert_eq!(rig.give(SourceEvent::Reclaim { epoch }), [SourceAction::Reclaim { epoch }]);
    assert_eq!(rig.give(SourceEvent::Reclaim { epoch }), [], "asked again, answered once");
    let actions = rig.give(SourceEvent::Reclaimed);
    assert_eq!(actions[0], SourceAction::StopDirtyLog);
    assert_eq!(failed(&actions), Some(RefusalCode::PeerLost));
}

#[test]
fn the_control_plane_may_settle_the_doubt_either_way() {
    let mut rig = Rig::new(source_config());
    rig.commit();
    assert_eq!(rig.give(SourceEvent::TargetOwns { epoch: EPOCH }), [], "another epoch proves nothing");
    assert!(rig.illegal.is_some() && rig.source.in_doubt());
    let actions = rig.give(SourceEvent::TargetOwns { epoch: TO_EPOCH });
    assert_eq!(actions.last(), Some(&SourceAction::Release));
    assert_eq!(
        rig.give(SourceEvent::Reclaim { epoch: Epoch(9) }),
        [SourceAction::ReclaimRefused { code: RefusalCode::WrongState }]
    );
}

#[test]
fn cancel_works_in_every_phase_before_the_disowning() {
    let phases: [fn(&mut Rig); 6] = [
        |_| {},
        Rig::connect,
        Rig::precopy,
        Rig::pause,
        Rig::finish,
        |rig| {
            rig.finish();
            rig.lost();
        },
    ];
    for (number, reach) in phases.into_iter().enumerate() {
        let mut rig = Rig::new(source_config());
        reach(&mut rig);
        let mut actions = rig.give(SourceEvent::Cancel);
        let paused = number >= 3;
        if paused {
            assert_eq!(actions.contains(&RESUME), number < 5, "{number}: {actions:?}");
            actions.extend(rig.give(SourceEvent::Resumed));
        }
        assert_eq!(actions.last(), Some(&SourceAction::Done(Outcome::Cancelled)), "{number}: {actions:?}");
        let told = actions.contains(&SourceAction::Send(SourceMessage::Cancel));
        assert_eq!(told, (1..5).contains(&number), "{number}: {actions:?}");
        assert_eq!(rig.give(SourceEvent::Cancel), [SourceAction::CancelRefused]);
    }
}

#[test]
fn a_refusal_ends_it_by_name_before_a_byte_is_sent() {
    let mut rig = Rig::new(source_config());
    rig.connect();
    let refuse = TargetMessage::Refuse { code: RefusalCode::CpuFeature, detail: "avx512f".into() };
    let actions = rig.hear(refuse);
    let outcome = Outcome::Failed { code: RefusalCode::CpuFeature, detail: "avx512f".into() };
    assert_eq!(actions, [SourceAction::Disconnect { attempt: 1 }, SourceAction::Done(outcome)]);
}

#[test]
fn another_digest_than_ours_is_not_committed() {
    let mut rig = Rig::new(source_config());
    rig.finish();
    rig.give(SourceEvent::Saved { state: vec![7; 100], console: ConsoleBytes::default(), us: 80 });
    rig.give(SourceEvent::FinalSent { sent: Sent { round: 2, ..Sent::default() }, lane_digests: vec![1, 2] });
    let actions = rig.hear(TargetMessage::Ready { round: 2, digest: 1 });
    assert!(rig.illegal.is_some());
    assert!(actions.contains(&RESUME), "{actions:?}");
    assert_eq!(failed(&rig.give(SourceEvent::Resumed)), Some(RefusalCode::Protocol));
}

#[test]
fn terms_that_were_not_offered_are_a_breach() {
    let accept = |attempt| Accept { version: VERSION, state_version: 1, attempt, lanes: 2, resume: None };
    let points = |count, round| vec![LanePoint { round, batches: 0 }; count];
    let resume = |round, lanes| Some(Resume { round, lanes, console_end: 0 });
    for bad in [
        accept(2),
        Accept { version: VERSION + 1, ..accept(1) },
        Accept { state_version: 0, ..accept(1) },
        Accept { lanes: 0, ..accept(1) },
        Accept { lanes: 5, ..accept(1) },
        Accept { resume: resume(1, points(2, 0)), ..accept(1) },
        Accept { resume: resume(0, points(3, 0)), ..accept(1) },
        Accept { resume: resume(0, points(2, 2)), ..accept(1) },
    ] {
        let mut rig = Rig::new(source_config());
        rig.connect();
        let actions = rig.hear(TargetMessage::Accept(bad.clone()));
        assert_eq!(failed(&actions), Some(RefusalCode::Protocol), "{bad:?}");
    }
}

#[test]
fn failures_of_this_host_before_the_disowning_resume_the_guest() {
    let fail = |operation| SourceEvent::OperationFailed { operation, detail: "no".into() };
    type Case = (fn(&mut Rig), SourceOperation, bool);
    let cases: [Case; 5] = [
        (Rig::connect, SourceOperation::StartDirtyLog, false),
        (Rig::precopy, SourceOperation::Send, false),
        (Rig::pause, SourceOperation::Pause, true),
        (Rig::finish, SourceOperation::Save, true),
        (Rig::disown, SourceOperation::Disown, true),
    ];
    for (reach, operation, paused) in cases {
        let mut rig = Rig::new(source_config());
        reach(&mut rig);
        if operation == SourceOperation::StartDirtyLog {
            rig.accept(None);
        }
        let mut actions = rig.give(fail(operation));
        assert_eq!(actions.contains(&RESUME), paused, "{operation:?}: {actions:?}");
        if paused {
            actions = rig.give(SourceEvent::Resumed);
        }
        assert_eq!(failed(&actions), Some(RefusalCode::HostError), "{operation:?}: {actions:?}");
    }
}

#[test]
fn a_vmm_that_dies_while_it_disowns_still_commits() {
    let mut rig = Rig::new(source_config());
    rig.disown();
    let actions = rig.give(SourceEvent::GuestEnded);
    assert!(matches!(actions[0], SourceAction::Send(SourceMessage::Commit(_))), "{actions:?}");
    let refused = rig.give(SourceEvent::Reclaim { epoch: Epoch(9) });
    assert_eq!(refused, [SourceAction::ReclaimRefused { code: RefusalCode::GuestEnded }]);
}

#[test]
fn a_guest_that_ends_ends_the_migration() {
    let mut rig = Rig::new(source_config());
    rig.precopy();
    assert_eq!(failed(&rig.give(SourceEvent::GuestEnded)), Some(RefusalCode::GuestEnded));
}

#[test]
fn a_restarted_host_commits_again() {
    let mut source = Source::recover(source_config(), 1_000);
    let mut out = Vec::new();
    source.handle(Instant(5), SourceEvent::Start, &mut out).unwrap();
    assert!(out.contains(&SourceAction::Connect { attempt: 1_001 }), "{out:?}");
    out.clear();
    source.handle(Instant(6), SourceEvent::Connected { attempt: 1_001 }, &mut out).unwrap();
    let commit = Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt: 1_001 };
    assert_eq!(out[0], SourceAction::Send(SourceMessage::Commit(commit)));
}
