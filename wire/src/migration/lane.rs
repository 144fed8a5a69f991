//! What travels on a lane: frames of kind [`Kind::Lane`], the pages themselves as the frame's payload.
//!
//! A lane begins with [`LaneRecord::Open`]. Each round is any number of [`LaneRecord::Batch`] and then one
//! [`LaneRecord::RoundEnd`]; round numbers only rise. A batch lists runs of pages whose content follows in that order, and
//! runs of pages that are zero. The receiver checks a batch once, as a whole ([`LaneReceiver::batch`]), and what it gets is
//! a [`CheckedBatch`] whose runs can be trusted: inside RAM, on this lane, in order, without overlap, and with a payload of
//! exactly their length. Anything else ends the migration; guest memory was not touched by it.

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]

use rkyv::{Archive, Deserialize, Serialize};

use super::messages::LanePoint;
use crate::frame::{Kind, Message};
use crate::ids::MigrationId;
use crate::pages::{Lane, PageRun, lane_of};
use crate::units::{CHUNK_PAGES, PAGE_BYTES, PageIndex};

/// Most pages with content in one batch: one chunk, what a lane frame's payload may hold.
pub const BATCH_PAGES_MAX: u64 = CHUNK_PAGES;
/// Most runs in one batch, of both sorts together.
pub const BATCH_RUNS_MAX: usize = 1024;

/// One record of a lane.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum LaneRecord {
    /// First: whose lane this is.
    Open(LaneOpen),
    /// Pages.
    Batch(Batch),
    /// All batches of the round are before this.
    RoundEnd(RoundEnd),
}

/// Whose lane this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct LaneOpen {
    /// The migration.
    pub migration: MigrationId,
    /// The connection attempt; see [`super::messages::Offer::attempt`].
    pub attempt: u32,
    /// Which lane, from 0.
    pub lane: u16,
}

/// Pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Batch {
    /// The round.
    pub round: u32,
    /// Runs whose content is the payload, ascending, each within one chunk.
    pub content: Vec<WireRun>,
    /// Runs of zero pages, ascending, each within one chunk.
    pub zero: Vec<WireRun>,
}

/// A run of pages. 32 bits number all pages of the largest space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct WireRun {
    /// The first page.
    pub first: u32,
    /// How many, at least 1.
    pub count: u32,
}

/// A round ends on this lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct RoundEnd {
    /// The round.
    pub round: u32,
    /// Batches it had on this lane.
    pub batches: u32,
    /// Digest of those batches.
    pub digest: u32,
}

impl Message for LaneRecord {
    const KIND: Kind = Kind::Lane;
}

/// A lane that broke its rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// A run is empty, leaves RAM or its chunk, belongs on another lane, or is not behind the one before.
    #[error("run of {count} pages from {first} is empty, out of range, out of order or on the wrong lane")]
    Run {
        /// The first page.
        first: u32,
        /// How many.
        count: u32,
    },
    /// A page is in two runs.
    #[error("batch lists {0} twice")]
    Overlap(PageIndex),
    /// More runs or pages than a batch may have.
    #[error("batch of {runs} runs and {pages} pages is too large")]
    TooLarge {
        /// Runs.
        runs: usize,
        /// Pages with content.
        pages: u64,
    },
    /// The payload is not as long as the pages listed.
    #[error("payload of {payload} bytes for {pages} pages")]
    Payload {
        /// Bytes that came.
        payload: u32,
        /// Pages with content.
        pages: u64,
    },
    /// A round that is over, or another than the one begun.
    #[error("record of round {got} while round {current} is under way")]
    Round {
        /// The record's.
        got: u32,
        /// The lane's.
        current: u32,
    },
    /// The number or digest of the batches is not the sender's.
    #[error("round {round} ended with another number of batches, or other ones, than were sent")]
    Digest {
        /// The round.
        round: u32,
    },
    /// [`LaneRecord::Open`] came again.
    #[error("lane was opened twice")]
    Reopened,
}

/// Digest of one lane's round: which pages it carried, in which order. The content is authenticated by the transport.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Digest(u32);

impl Digest {
    fn run(&mut self, first: u32, count: u32) {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&first.to_le_bytes());
        bytes[4..].copy_from_slice(&count.to_le_bytes());
        self.0 = crc32c::crc32c_append(self.0, &bytes);
    }

    /// Separates content from zero runs, and batches from each other.
    fn mark(&mut self, round: u32, content: usize, zero: usize) {
        self.run(round, u32::try_from(content << 16 | zero).unwrap_or(u32::MAX));
    }
}

/// Digest of a state archive, for [`ready_digest`].
pub fn state_digest(state: &[u8]) -> u32 {
    crc32c::crc32c(state)
}

/// Digest of all that a target must have before it is ready: the final round, what each lane carried in it, and the state.
pub fn ready_digest(round: u32, lane_digests: impl IntoIterator<Item = u32>, state_digest: u32) -> u32 {
    let start = crc32c::crc32c_append(state_digest, &round.to_le_bytes());
    lane_digests.into_iter().fold(start, |crc, lane| crc32c::crc32c_append(crc, &lane.to_le_bytes()))
}

/// Numbers the batches of one lane on the sending side.
#[derive(Debug, Clone, Default)]
pub struct LaneSender {
    round: u32,
    batches: u32,
    digest: Digest,
}

impl LaneSender {
    /// A lane on which nothing was sent yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch is about to be sent; returns its number within its round, from 0, as the [`super::ledger::Ledger`] wants it.
    pub fn batch(&mut self, batch: &Batch) -> u32 {
        self.enter(batch.round);
        let number = self.batches;
        self.batches += 1;
        self.digest.mark(batch.round, batch.content.len(), batch.zero.len());
        for run in batch.content.iter().chain(&batch.zero) {
            self.digest.run(run.first, run.count);
        }
        number
    }

    /// The record that ends `round`, also if no batch of it was sent on this lane.
    pub fn round_end(&mut self, round: u32) -> RoundEnd {
        self.enter(round);
        RoundEnd { round, batches: self.batches, digest: self.digest.0 }
    }

    /// Digest of the round under way, or of the last one.
    pub const fn digest(&self) -> u32 {
        self.digest.0
    }

    fn enter(&mut self, round: u32) {
        if round != self.round {
            *self = Self { round, batches: 0, digest: Digest::default() };
        }
    }
}

/// Checks the records of one lane on the receiving side, over all connections of a migration.
#[derive(Debug, Clone)]
pub struct LaneReceiver {
    lane: Lane,
    lanes: u16,
    /// Pages of the machine's space.
    pages: u64,
    /// Highest round that ended here.
    ended: u32,
    /// Round under way, and what was *checked* of it.
    round: u32,
    checked: u32,
    digest: Digest,
    /// What was *applied*.
    applied: LanePoint,
}

impl LaneReceiver {
    /// Lane number `lane` of `lanes`, for a machine whose space has `pages` pages.
    pub fn new(lane: Lane, lanes: u16, pages: u64) -> Self {
        Self {
            lane,
            lanes,
            pages,
            ended: 0,
            round: 0,
            checked: 0,
            digest: Digest::default(),
            applied: LanePoint::default(),
        }
    }

    /// Checks a batch that came with `payload_bytes` of payload. Afterwards its pages may be written, and then [`LaneReceiver::applied`] is due.
    ///
    /// # Errors
    /// [`LaneError`]: nothing of the batch may be used, and the migration is to end.
    pub fn batch<'a>(
        &mut self,
        batch: &'a ArchivedBatch,
        payload_bytes: u32,
    ) -> Result<CheckedBatch<'a>, LaneError> {
        self.enter(batch.round.to_native())?;
        let checked = CheckedBatch::check(batch, payload_bytes, self.lane, self.lanes, self.pages)?;
        self.checked = self.checked.saturating_add(1);
        self.digest.mark(batch.round.to_native(), batch.content.len(), batch.zero.len());
        for run in batch.content.iter().chain(batch.zero.iter()) {
            self.digest.run(run.first.to_native(), run.count.to_native());
        }
        Ok(checked)
    }

    /// All pages of the batch checked last are in guest memory.
    pub fn applied(&mut self) {
        self.applied = LanePoint { round: self.round, batches: self.checked };
    }

    /// Checks the end of a round; returns its number and digest for [`super::target::TargetEvent::LaneRoundDone`].
    ///
    /// # Errors
    /// [`LaneError`]: the migration is to end.
    pub fn round_end(&mut self, end: &ArchivedRoundEnd) -> Result<(u32, u32), LaneError> {
        let round = end.round.to_native();
        self.enter(round)?;
        if end.batches.to_native() != self.checked || end.digest.to_native() != self.digest.0 {
            return Err(LaneError::Digest { round });
        }
        self.ended = round;
        // Every round up to this one is applied: the point lies before the first batch of any later round.
        self.applied = LanePoint { round: round.saturating_add(1), batches: 0 };
        Ok((round, self.digest.0))
    }

    /// How far this lane got.
    pub const fn point(&self) -> LanePoint {
        self.applied
    }

    /// A new connection begins: a round that the old one cut short never ends, the next has a higher number.
    pub fn reconnected(&mut self) {
        self.ended = self.ended.max(self.round);
    }

    fn enter(&mut self, round: u32) -> Result<(), LaneError> {
        if round == self.round && round > self.ended {
            return Ok(());
        }
        let under_way = self.round > self.ended;
        if under_way || round <= self.ended {
            return Err(LaneError::Round { got: round, current: self.round });
        }
        self.round = round;
        self.checked = 0;
        self.digest = Digest::default();
        Ok(())
    }
}

/// A batch whose runs hold what the module says.
#[derive(Debug, Clone, Copy)]
pub struct CheckedBatch<'a> {
    batch: &'a ArchivedBatch,
    content_pages: u64,
    zero_pages: u64,
}

impl<'a> CheckedBatch<'a> {
    fn check(
        batch: &'a ArchivedBatch,
        payload_bytes: u32,
        lane: Lane,
        lanes: u16,
        pages: u64,
    ) -> Result<Self, LaneError> {
        let runs = batch.content.len() + batch.zero.len();
        if runs > BATCH_RUNS_MAX {
            return Err(LaneError::TooLarge { runs, pages: 0 });
        }
        let content_pages = check_runs(&batch.content, lane, lanes, pages)?;
        let zero_pages = check_runs(&batch.zero, lane, lanes, pages)?;
        if content_pages > BATCH_PAGES_MAX {
            return Err(LaneError::TooLarge { runs, pages: content_pages });
        }
        if u64::from(payload_bytes) != content_pages * PAGE_BYTES {
            return Err(LaneError::Payload { payload: payload_bytes, pages: content_pages });
        }
        check_disjoint(&batch.content, &batch.zero)?;
        Ok(Self { batch, content_pages, zero_pages })
    }

    /// The round.
    pub fn round(&self) -> u32 {
        self.batch.round.to_native()
    }

    /// Runs whose content is the payload, in its order.
    pub fn content(&self) -> impl Iterator<Item = PageRun> + 'a {
        self.batch.content.iter().map(page_run)
    }

    /// Runs of zero pages.
    pub fn zero(&self) -> impl Iterator<Item = PageRun> + 'a {
        self.batch.zero.iter().map(page_run)
    }

    /// Pages with content, at most [`BATCH_PAGES_MAX`].
    pub const fn content_pages(&self) -> u64 {
        self.content_pages
    }

    /// Zero pages.
    pub const fn zero_pages(&self) -> u64 {
        self.zero_pages
    }
}

fn page_run(run: &ArchivedWireRun) -> PageRun {
    PageRun { first: PageIndex(run.first.to_native().into()), count: run.count.to_native().into() }
}

/// Checks each run of a list against the space, its chunk, the lane and the run before; returns how many pages they are.
fn check_runs(runs: &[ArchivedWireRun], lane: Lane, lanes: u16, bound: u64) -> Result<u64, LaneError> {
    let (mut pages, mut behind) = (0, 0);
    for raw in runs {
        let run = page_run(raw);
        let (first, end) = (run.first.0, run.end().0);
        let within = run.count > 0 && first >= behind && end <= bound;
        let chunk = run.first.chunk();
        if !within || chunk != PageIndex(end - 1).chunk() || lane_of(chunk, lanes) != lane {
            return Err(LaneError::Run { first: raw.first.to_native(), count: raw.count.to_native() });
        }
        behind = end;
        pages += run.count;
    }
    Ok(pages)
}

/// Checks that two ascending lists have no page in common.
fn check_disjoint(a: &[ArchivedWireRun], b: &[ArchivedWireRun]) -> Result<(), LaneError> {
    let (mut a, mut b) = (a.iter().map(page_run).peekable(), b.iter().map(page_run).peekable());
    while let (Some(&x), Some(&y)) = (a.peek(), b.peek()) {
        if x.end() <= y.first {
            a.next();
        } else if y.end() <= x.first {
            b.next();
        } else {
            return Err(LaneError::Overlap(x.first.max(y.first)));
        }
    }
    Ok(())
}
