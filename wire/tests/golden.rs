//! Golden bytes: every message of the migration protocol as the frame it is today. A change here is a change of the format and needs a new version
//! (and an entry in its list). `MASHINES_BLESS=1 cargo test -p wire --test golden` writes the file anew.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fmt::Write as _;

use common::{EPOCH, MIGRATION, TO_EPOCH, source_config, spec};
use wire::fleet::RefusalCode;
use wire::frame::{Message, decode_whole, encode};
use wire::migration::lane::{Batch, LaneOpen, LaneRecord, RoundEnd, WireRun};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, Final, LanePoint, Offer, Resume, Running, SourceMessage, TargetMessage,
    VERSION,
};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/migration.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A line for one message, which is also read back.
fn line<M: Message + PartialEq + std::fmt::Debug>(name: &str, message: M) -> String {
    let frame = encode(VERSION, &message, 0).unwrap();
    assert_eq!(decode_whole::<M>(&frame), Ok((VERSION, message)));
    format!("{name} {}\n", hex(&frame))
}

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
        line("source.offer", SourceMessage::Offer(Box::new(offer))),
        line("source.console", SourceMessage::Console(console.clone())),
        line("source.final", SourceMessage::Final(Final { round: 9, state: vec![1, 2, 3], console })),
        line("source.commit", SourceMessage::Commit(commit)),
        line("source.finished", SourceMessage::Finished),
        line("source.cancel", SourceMessage::Cancel),
        line("source.abort", abort),
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
        line("target.accept", TargetMessage::Accept(Accept { resume: None, ..accept.clone() })),
        line("target.accept.resume", TargetMessage::Accept(accept)),
        line("target.refuse", TargetMessage::Refuse { code, detail: "avx512f".into() }),
        line("target.round_received", TargetMessage::RoundReceived { round: 3 }),
        line("target.ready", TargetMessage::Ready { round: 9, digest: 0xdead_beef }),
        line("target.running", TargetMessage::Running(running)),
        line("target.abort", TargetMessage::Abort { code: RefusalCode::PeerLost, detail: "late".into() }),
    ]
    .concat()
}

fn lane_lines() -> String {
    let run = |first, count| WireRun { first, count };
    let batch = Batch { round: 3, content: vec![run(1, 2), run(8, 1)], zero: vec![run(600, 5)] };
    [
        line("lane.open", LaneRecord::Open(LaneOpen { migration: MIGRATION, attempt: 2, lane: 1 })),
        line("lane.batch", LaneRecord::Batch(batch)),
        line("lane.round_end", LaneRecord::RoundEnd(RoundEnd { round: 3, batches: 1, digest: 0x0a0b_0c0d })),
    ]
    .concat()
}

#[test]
fn every_message_is_written_as_ever() {
    let now = [source_lines(), target_lines(), lane_lines()].concat();
    if std::env::var_os("MASHINES_BLESS").is_some() {
        std::fs::write(FILE, &now).unwrap();
    }
    let then = std::fs::read_to_string(FILE).unwrap();
    for (now, then) in now.lines().zip(then.lines()) {
        assert_eq!(now, then);
    }
    assert_eq!(now.lines().count(), then.lines().count());
}
