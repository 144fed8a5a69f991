//! Messages of the migration protocol.

use wire::fleet::RefusalCode;
use wire::migration::lane::{Batch, LaneOpen, LaneRecord, RoundEnd, WireRun};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, Final, LanePoint, Offer, Resume, Running, SourceMessage, TargetMessage,
    VERSION,
};

use crate::common::{EPOCH, MIGRATION, TO_EPOCH, source_config, spec};
use crate::golden::{check, line};

fn source_lines() -> String {
    let config = source_config();
    let console = ConsoleBytes { offset: 0x0102, bytes: b"login: ".to_vec() };
    let offer = Offer {
        versions: config.versions,
        state_versions: config.state_versions,
        migration: MIGRATION,
        attempt: 2,
        incarnation: 0x1122_3344_5566_7788,
        spec: spec(),
        epoch: EPOCH,
        to_epoch: TO_EPOCH,
        lanes: 4,
        source: config.source,
        downtime_budget_us: 10_000,
    };
    let commit = Commit { migration: MIGRATION, epoch: TO_EPOCH, attempt: 2 };
    let abort = SourceMessage::Abort { code: RefusalCode::GuestEnded, detail: "gone".into() };
    [
        line(VERSION, "source.offer", SourceMessage::Offer(Box::new(offer))),
        line(VERSION, "source.console", SourceMessage::Console(console.clone())),
        line(
            VERSION,
            "source.final",
            SourceMessage::Final(Final { round: 9, state: vec![1, 2, 3], console }),
        ),
        line(VERSION, "source.commit", SourceMessage::Commit(commit)),
        line(VERSION, "source.finished", SourceMessage::Finished),
        line(VERSION, "source.cancel", SourceMessage::Cancel),
        line(VERSION, "source.abort", abort),
    ]
    .concat()
}

fn target_lines() -> String {
    let lanes = vec![LanePoint { round: 3, batches: 4 }, LanePoint { round: 4, batches: 0 }];
    let resume = Some(Resume { round: 2, lanes, console_end: 77 });
    let accept = Accept { version: VERSION, state_version: 1, attempt: 2, lanes: 2, resume };
    let code = RefusalCode::CpuFeature;
    let running = Running { epoch: TO_EPOCH, restore_us: 90, resume_us: 150 };
    [
        line(VERSION, "target.accept", TargetMessage::Accept(Accept { resume: None, ..accept.clone() })),
        line(VERSION, "target.accept.resume", TargetMessage::Accept(accept)),
        line(VERSION, "target.refuse", TargetMessage::Refuse { code, detail: "avx512f".into() }),
        line(VERSION, "target.round_received", TargetMessage::RoundReceived { round: 3 }),
        line(VERSION, "target.ready", TargetMessage::Ready { round: 9, digest: 0xdead_beef }),
        line(VERSION, "target.running", TargetMessage::Running(running)),
        line(
            VERSION,
            "target.abort",
            TargetMessage::Abort { code: RefusalCode::PeerLost, detail: "late".into() },
        ),
    ]
    .concat()
}

fn lane_lines() -> String {
    let run = |first, count| WireRun { first, count };
    let batch = Batch { round: 3, content: vec![run(1, 2), run(8, 1)], zero: vec![run(600, 5)] };
    [
        line(VERSION, "lane.open", LaneRecord::Open(LaneOpen { migration: MIGRATION, attempt: 2, lane: 1 })),
        line(VERSION, "lane.batch", LaneRecord::Batch(batch)),
        line(
            VERSION,
            "lane.round_end",
            LaneRecord::RoundEnd(RoundEnd { round: 3, batches: 1, digest: 0x0a0b_0c0d }),
        ),
    ]
    .concat()
}

#[test]
fn every_message_of_a_migration_is_written_as_ever() {
    check("migration.txt", &[source_lines(), target_lines(), lane_lines()].concat());
}
