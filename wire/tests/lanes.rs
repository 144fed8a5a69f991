//! Lane records: what an honest sender makes is taken, what breaks a rule is not, and the ledger returns what is not proven.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;
use rkyv::rancor;
use rkyv::util::AlignedVec;
use wire::migration::lane::{
    ArchivedBatch, ArchivedLaneRecord, BATCH_RUNS_MAX, Batch, LaneError, LaneReceiver, LaneRecord,
    LaneSender, RoundEnd, WireRun,
};
use wire::migration::ledger::Ledger;
use wire::migration::messages::{LanePoint, Resume};
use wire::pages::{Lane, PageRun, PageSet};
use wire::units::{PageIndex, RamSize};

fn ram() -> RamSize {
    RamSize::from_bytes(16 << 20).unwrap()
}

fn archive(record: &LaneRecord) -> AlignedVec {
    rkyv::to_bytes::<rancor::Error>(record).unwrap()
}

fn with_batch<T>(batch: Batch, take: impl FnOnce(&ArchivedBatch) -> T) -> T {
    let bytes = archive(&LaneRecord::Batch(batch));
    match rkyv::access::<ArchivedLaneRecord, rancor::Error>(&bytes).unwrap() {
        ArchivedLaneRecord::Batch(batch) => take(batch),
        other => panic!("{other:?}"),
    }
}

fn end_of(receiver: &mut LaneReceiver, end: RoundEnd) -> Result<(u32, u32), LaneError> {
    let bytes = archive(&LaneRecord::RoundEnd(end));
    match rkyv::access::<ArchivedLaneRecord, rancor::Error>(&bytes).unwrap() {
        ArchivedLaneRecord::RoundEnd(end) => receiver.round_end(end),
        other => panic!("{other:?}"),
    }
}

const fn at(first: u32, count: u32) -> WireRun {
    WireRun { first, count }
}

fn take(lane: u16, lanes: u16, content: &[WireRun], zero: &[WireRun], payload: u32) -> Result<(), LaneError> {
    let batch = Batch { round: 1, content: content.to_vec(), zero: zero.to_vec() };
    with_batch(batch, |b| LaneReceiver::new(Lane(lane), lanes, ram().pages()).batch(b, payload).map(|_| ()))
}

#[test]
fn what_breaks_a_rule_is_not_taken() {
    let page = 4096;
    assert_eq!(take(0, 1, &[at(0, 512)], &[], 512 * page), Ok(()));
    assert_eq!(take(0, 2, &[at(3, 2)], &[at(5, 1), at(1024, 512)], 2 * page), Ok(()));
    assert_eq!(take(0, 1, &[], &[], 0), Ok(()));
    let run = |first, count| Err(LaneError::Run { first, count });
    assert_eq!(take(0, 1, &[at(5, 0)], &[], 0), run(5, 0));
    assert_eq!(take(0, 1, &[at(4096, 1)], &[], page), run(4096, 1), "beyond RAM");
    assert_eq!(take(0, 1, &[at(4095, 2)], &[], 2 * page), run(4095, 2), "across the end of RAM");
    assert_eq!(take(0, 1, &[at(u32::MAX, u32::MAX)], &[], 0), run(u32::MAX, u32::MAX));
    assert_eq!(take(0, 1, &[at(511, 2)], &[], 2 * page), run(511, 2), "across chunks");
    assert_eq!(take(0, 2, &[at(512, 1)], &[], page), run(512, 1), "another lane's chunk");
    assert_eq!(take(0, 1, &[at(9, 1), at(8, 1)], &[], 2 * page), run(8, 1), "out of order");
    assert_eq!(take(0, 1, &[at(8, 2), at(9, 1)], &[], 3 * page), run(9, 1), "twice");
    assert_eq!(take(0, 1, &[at(8, 4)], &[at(11, 2)], 4 * page), Err(LaneError::Overlap(PageIndex(11))));
    assert_eq!(
        take(0, 1, &[at(0, 1)], &[], page - 1),
        Err(LaneError::Payload { payload: page - 1, pages: 1 })
    );
    assert_eq!(take(0, 1, &[], &[at(0, 1)], page), Err(LaneError::Payload { payload: page, pages: 0 }));
    let two_chunks = [at(0, 512), at(512, 1)];
    assert!(matches!(take(0, 1, &two_chunks, &[], 513 * page), Err(LaneError::TooLarge { pages: 513, .. })));
    let many: Vec<_> = (0..=u32::try_from(BATCH_RUNS_MAX).unwrap()).map(|i| at(i * 2, 1)).collect();
    assert!(matches!(take(0, 1, &[], &many, 0), Err(LaneError::TooLarge { runs: 1025, .. })));
}

#[test]
fn rounds_rise_and_end_as_they_were_sent() {
    let (mut sender, mut receiver) = (LaneSender::new(), LaneReceiver::new(Lane(0), 1, ram().pages()));
    let batch = |round, first| Batch { round, content: vec![], zero: vec![at(first, 1)] };
    for (round, first) in [(1, 0), (1, 7), (2, 0)] {
        if round == 2 {
            let end = sender.round_end(1);
            assert_eq!(end_of(&mut receiver, end), Ok((1, end.digest)));
            assert_eq!(receiver.point(), LanePoint { round: 2, batches: 0 });
            // A round that is over does not come back.
            let old = with_batch(batch(1, 3), |b| receiver.batch(b, 0).map(|_| ()));
            assert_eq!(old, Err(LaneError::Round { got: 1, current: 1 }));
        }
        sender.batch(&batch(round, first));
        with_batch(batch(round, first), |b| receiver.batch(b, 0).map(|_| ())).unwrap();
        receiver.applied();
    }
    assert_eq!(receiver.point(), LanePoint { round: 2, batches: 1 });
    // Another round begins before this one has ended.
    let early = with_batch(batch(3, 0), |b| receiver.batch(b, 0).map(|_| ()));
    assert_eq!(early, Err(LaneError::Round { got: 3, current: 2 }));
    // One batch less, or another one, is noticed at the end.
    let good = sender.round_end(2);
    for bad in [RoundEnd { batches: 2, ..good }, RoundEnd { digest: !good.digest, ..good }] {
        assert_eq!(end_of(&mut receiver.clone(), bad), Err(LaneError::Digest { round: 2 }));
    }
    // A reconnect ends it without an end; its number is not used again.
    receiver.reconnected();
    assert!(end_of(&mut receiver.clone(), good).is_err());
    let next = LaneSender::new().round_end(3);
    assert_eq!(end_of(&mut receiver, next), Ok((3, 0)));
}

#[test]
fn a_reserved_batch_is_not_applied_until_said() {
    let mut receiver = LaneReceiver::new(Lane(0), 1, ram().pages());
    let batch = Batch { round: 4, content: vec![], zero: vec![at(0, 1)] };
    with_batch(batch, |b| receiver.batch(b, 0).map(|_| ())).unwrap();
    assert_eq!(receiver.point(), LanePoint::default());
    receiver.applied();
    assert_eq!(receiver.point(), LanePoint { round: 4, batches: 1 });
}

#[test]
fn a_lane_that_nobody_announced_is_not_forgotten() {
    let mut ledger = Ledger::new(0);
    ledger.record(2, 1, 0, vec![PageRun { first: PageIndex(5), count: 2 }]);
    let mut dirty = PageSet::empty(4096);
    ledger.give_back(&Resume::default(), &mut dirty);
    assert_eq!(dirty.count(), 2);
}

proptest! {
    /// However the target got on, each page in flight is either given back or was before the point that the lane reached.
    #[test]
    fn the_ledger_gives_back_what_is_not_proven(
        batches in prop::collection::vec((0_u16..3, 0_u64..4096), 0..40),
        rounds in prop::collection::vec(0_usize..40, 0..4),
        confirmed in 0_u32..4,
        received_round in 0_u32..4,
        points in prop::collection::vec((0_u32..6, 0_u32..10), 0..4),
    ) {
        let mut ledger = Ledger::new(3);
        let mut numbers = [(1_u32, 0_u32); 3];
        let mut round = 1;
        let mut sent = Vec::new();
        for (index, &(lane, page)) in batches.iter().enumerate() {
            if rounds.contains(&index) {
                round += 1;
            }
            let number = &mut numbers[usize::from(lane)];
            if number.0 != round {
                *number = (round, 0);
            }
            ledger.record(lane, round, number.1, vec![PageRun { first: PageIndex(page), count: 1 }]);
            sent.push((lane, round, number.1, page));
            number.1 += 1;
        }
        prop_assert_eq!(ledger.batches(), sent.len());
        ledger.confirm(confirmed);
        let lanes: Vec<_> = points.iter().map(|&(round, batches)| LanePoint { round, batches }).collect();
        let received = Resume { round: received_round, lanes: lanes.clone(), console_end: 0 };
        let mut dirty = PageSet::empty(4096);
        ledger.give_back(&received, &mut dirty);
        prop_assert_eq!(ledger.batches(), 0);
        let mut wanted = PageSet::empty(4096);
        for (lane, round, number, page) in sent {
            let point = lanes.get(usize::from(lane)).copied().unwrap_or_default();
            let proven = round <= confirmed.max(received_round) || (round, number) < (point.round, point.batches);
            if !proven {
                wanted.insert(PageIndex(page));
            }
        }
        prop_assert_eq!(dirty, wanted);
    }
}
