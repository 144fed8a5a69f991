//! The bodies of the fuzz targets over pseudo-random and mutated valid inputs: `cargo fuzz` goes further, this goes
//! everywhere.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "hostile/bodies.rs"]
mod bodies;
mod common;

use wire::agent::{Exec, FromAgent, SessionId, Stream, Task, ToAgent};
use wire::frame::encode;
use wire::migration::lane::{Batch, LaneRecord, RoundEnd, WireRun};
use wire::migration::messages::{Commit, ConsoleBytes, Final, SourceMessage, TargetMessage};

/// A small generator: the inputs are the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.byte()).collect()
    }

    /// Changes a few bytes, or the length.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            match self.below(4) {
                _ if bytes.is_empty() => bytes.push(self.byte()),
                0 => {
                    let at = self.below(bytes.len());
                    bytes[at] ^= 1 << self.below(8);
                }
                1 => {
                    let at = self.below(bytes.len());
                    bytes[at] = self.byte();
                }
                2 => bytes.truncate(self.below(bytes.len())),
                _ => bytes.push(self.byte()),
            }
        }
    }
}

fn frames() -> Vec<Vec<u8>> {
    let commit = Commit { migration: common::MIGRATION, epoch: common::TO_EPOCH, attempt: 1 };
    let console = ConsoleBytes { offset: 9, bytes: b"hello".to_vec() };
    let sources = [
        SourceMessage::Commit(commit),
        SourceMessage::Console(console.clone()),
        SourceMessage::Final(Final { round: 3, state: vec![1; 40], console }),
        SourceMessage::Cancel,
    ];
    let mut frames: Vec<Vec<u8>> = sources.iter().map(|m| encode(1, m, 0).unwrap().to_vec()).collect();
    let ready = TargetMessage::Ready { round: 3, digest: 4 };
    frames.push(encode(1, &ready, 0).unwrap().to_vec());
    let batch = Batch { round: 1, content: vec![WireRun { first: 0, count: 2 }], zero: vec![] };
    frames.push(encode(1, &LaneRecord::Batch(batch), 8192).unwrap().to_vec());
    let exec = Exec { argv: vec![b"cat".to_vec()], user: Some("web".into()), ..Exec::default() };
    let open = ToAgent::Open { session: SessionId([3; 16]), task: Task::Exec(exec) };
    frames.push(encode(1, &open, 0).unwrap().to_vec());
    let output = FromAgent::Output { stream: Stream::Err, offset: 7, bytes: vec![1, 2, 3] };
    frames.push(encode(1, &output, 0).unwrap().to_vec());
    frames
}

#[test]
fn any_bytes_as_frames() {
    let mut random = Random(1);
    for _ in 0..4_000 {
        bodies::frames(&random.bytes(120));
    }
    for frame in frames() {
        bodies::frames(&frame);
        for _ in 0..1_500 {
            let mut bytes = frame.clone();
            random.mutate(&mut bytes);
            bodies::frames(&bytes);
        }
        // Also with a checksum that is right: what lies behind it must hold by itself.
        for _ in 0..1_500 {
            let mut bytes = frame.clone();
            let at = 24 + random.below(bytes.len() - 24);
            bytes[at] = random.byte();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..16]), &bytes[24..]);
            bytes[16..20].copy_from_slice(&crc.to_le_bytes());
            bodies::frames(&bytes);
        }
    }
}

#[test]
fn any_bytes_on_a_lane() {
    let mut random = Random(2);
    let records: Vec<Vec<u8>> = [
        LaneRecord::Batch(Batch {
            round: 1,
            content: vec![WireRun { first: 0, count: 2 }],
            zero: vec![WireRun { first: 9, count: 1 }],
        }),
        LaneRecord::Batch(Batch {
            round: 1,
            content: vec![],
            zero: vec![WireRun { first: 100, count: 300 }],
        }),
        LaneRecord::RoundEnd(RoundEnd { round: 1, batches: 0, digest: 0 }),
    ]
    .iter()
    .map(|record| rkyv::to_bytes::<rkyv::rancor::Error>(record).unwrap().to_vec())
    .collect();
    for _ in 0..6_000 {
        bodies::lanes(&random.bytes(200));
        let mut input = vec![random.byte(), random.byte()];
        for _ in 0..1 + random.below(4) {
            let mut record = records[random.below(records.len())].clone();
            if random.below(3) > 0 {
                random.mutate(&mut record);
            }
            input.push([0, 2][random.below(2)]);
            input.push(u8::try_from(record.len()).unwrap());
            input.extend(record);
        }
        bodies::lanes(&input);
    }
}

#[test]
fn any_messages_and_answers_for_the_target() {
    let mut random = Random(3);
    let owned = (0..3_000).filter(|_| bodies::target(&random.bytes(300))).count();
    // Or the checks behind it were never reached.
    assert!(owned > 100, "{owned}");
}

#[test]
fn any_messages_and_answers_for_the_source() {
    let mut random = Random(4);
    let given_away = (0..3_000).filter(|_| bodies::source(&random.bytes(300))).count();
    assert!(given_away > 100, "{given_away}");
}

#[test]
fn any_messages_for_both_ends_of_a_session() {
    let mut random = Random(5);
    let given: u64 = (0..3_000).map(|_| bodies::sessions::agent(&random.bytes(400))).sum();
    assert!(given > 1 << 20, "{given}");
    let ended = (0..3_000).filter(|_| bodies::sessions::client(&random.bytes(400))).count();
    assert!(ended > 100, "{ended}");
}
