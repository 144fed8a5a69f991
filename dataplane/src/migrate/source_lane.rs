//! One outgoing lane: takes dirty bits of its chunks, copies the pages once, and puts them on a QUIC stream.
//!
//! The order that loses nothing: bits are taken and recorded as in flight in one step ([`InFlight`]), and only then is the page
//! read. A page that the guest writes meanwhile is dirty again and goes out in a later round.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use wire::frame;
use wire::ids::MigrationId;
use wire::migration::lane::{Batch, LaneOpen, LaneRecord, LaneSender, WireRun};
use wire::pages::{CHUNK_WORDS, Lane, PageRun, chunks_of, runs_in};
use wire::units::{Instant, PAGE_BYTES_USIZE, PageIndex};

use super::buffers::BufferPool;
use super::in_flight::InFlight;
use super::source::SourceInput;
use crate::doorbell::{Doorbell, Ringer};
use crate::memory::{MachineMemory, PageContent};
use crate::quic::{Connection, SendStream};
use crate::shard::stream::{self, StreamError};
use crate::shard::{ShardContext, now};

/// Pages in one batch at most: a mebibyte. Large enough that headers and bookkeeping vanish, small enough that two lanes share the
/// work of a round evenly. Also bounds the runs of a batch, as each is a page or more.
const BATCH_PAGES: usize = 256;
/// A lane goes behind the control stream when both have something to send.
const PRIORITY: i32 = -1;

/// What a lane is to do.
pub struct SourceLaneJob {
    /// The migration.
    pub migration: MigrationId,
    /// The connection attempt it belongs to.
    pub attempt: u32,
    /// Which lane.
    pub lane: Lane,
    /// Of how many.
    pub lanes: u16,
    /// Version to write.
    pub version: u16,
    /// The target's shard.
    pub address: SocketAddr,
    /// The target.
    pub peer: pki::PeerIdentity,
    /// The machine's memory.
    pub memory: Arc<MachineMemory>,
    /// Most bytes a second before the pause, on this lane; 0 for no limit.
    pub bytes_per_s_max: u64,
    /// Shared with the session.
    pub in_flight: InFlight,
    /// What to send.
    pub commands: Doorbell<LaneCommand>,
    /// To the session.
    pub session: Ringer<SourceInput>,
}

/// What the session tells a lane.
#[derive(Debug, Clone)]
pub enum LaneCommand {
    /// Send what is dirty in these chunks, as part of the round.
    Range {
        /// The round.
        round: u32,
        /// The chunks; the lane takes its own among them.
        chunks: Range<u64>,
        /// Whether the guest is paused: then the limit on bandwidth does not hold.
        paused: bool,
    },
    /// End the round.
    EndRound {
        /// The round.
        round: u32,
    },
}

/// What a lane tells the session.
#[derive(Debug, Clone)]
pub struct LaneReport {
    /// The attempt it belongs to.
    pub attempt: u32,
    /// Which lane.
    pub lane: u16,
    /// What happened.
    pub news: LaneNews,
}

/// See [`LaneReport`].
#[derive(Debug, Clone)]
pub enum LaneNews {
    /// A range is on the stream.
    RangeDone,
    /// A round is on the stream, its end included.
    RoundDone(LaneTotals),
    /// The connection is gone, or the attempt is over.
    Lost(String),
}

/// What a lane sent in a round.
#[derive(Debug, Clone, Copy, Default)]
pub struct LaneTotals {
    /// The round.
    pub round: u32,
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes, headers included.
    pub bytes: u64,
    /// [`LaneSender::digest`].
    pub digest: u32,
}

/// Runs a lane until its session drops it or the connection is lost.
pub async fn run(context: Rc<ShardContext>, job: SourceLaneJob) {
    let (session, attempt, lane) = (job.session.clone(), job.attempt, job.lane.0);
    let why = match serve(context, job).await {
        Ok(()) => return,
        Err(error) => error.to_string(),
    };
    let report = LaneReport { attempt, lane, news: LaneNews::Lost(why) };
    let _session_gone = session.try_send(SourceInput::Lane(report));
}

async fn serve(context: Rc<ShardContext>, job: SourceLaneJob) -> Result<(), StreamError> {
    let connection = context.endpoint.connect(job.address, &job.peer).await?;
    let mut out = OutLane::open(&connection, &job).await?;
    let mut commands = job.commands.attach();
    loop {
        let command = {
            let next = commands.recv().fuse();
            let lost = connection.closed().fuse();
            futures_util::pin_mut!(next, lost);
            futures_util::select_biased! {
                command = next => command,
                lost = lost => return Err(StreamError::Quic(lost.into())),
            }
        };
        let news = match command {
            Some(LaneCommand::Range { round, chunks, paused }) => {
                out.pace.bytes_per_s_max = if paused { 0 } else { job.bytes_per_s_max };
                out.send_range(&job.memory, &job.in_flight, round, chunks).await?;
                LaneNews::RangeDone
            }
            Some(LaneCommand::EndRound { round }) => LaneNews::RoundDone(out.end_round(round).await?),
            // The session has ended or begun another attempt; everything it wanted sent was handed over.
            None => {
                connection.close(0, "lane ends");
                return Ok(());
            }
        };
        let report = LaneReport { attempt: job.attempt, lane: job.lane.0, news };
        let _session_gone = job.session.try_send(SourceInput::Lane(report));
    }
}

/// The sending side of a lane.
struct OutLane {
    stream: SendStream,
    version: u16,
    attempt: u32,
    lane: Lane,
    lanes: u16,
    sender: LaneSender,
    totals: LaneTotals,
    batches: u32,
    buffers: BufferPool,
    /// Chunks known to have been written at some time, which they stay.
    written: HashSet<u64>,
    pace: Pace,
}

/// Keeps a lane within a limit of bandwidth.
#[derive(Default)]
struct Pace {
    /// 0: none.
    bytes_per_s_max: u64,
    /// When the next batch may go.
    due: Instant,
}

impl Pace {
    /// Waits until it is the turn of so many bytes. The wait is the limit itself; there is no event to wait for instead.
    async fn turn(&mut self, bytes: u64) {
        if self.bytes_per_s_max == 0 {
            return;
        }
        let wait_us = self.due.us_since(now());
        if wait_us > 0 {
            glommio::timer::sleep(Duration::from_micros(wait_us)).await;
        }
        let takes_us = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_s_max);
        self.due = now().plus_us(u64::try_from(takes_us).unwrap_or(u64::MAX));
    }
}

impl OutLane {
    async fn open(connection: &Connection, job: &SourceLaneJob) -> Result<Self, StreamError> {
        let mut stream = connection.open_uni().await?;
        stream.set_priority(PRIORITY)?;
        let open = LaneOpen { migration: job.migration, attempt: job.attempt, lane: job.lane.0 };
        stream::send(&mut stream, job.version, &LaneRecord::Open(open)).await?;
        Ok(Self {
            stream,
            version: job.version,
            attempt: job.attempt,
            lane: job.lane,
            lanes: job.lanes,
            sender: LaneSender::new(),
            totals: LaneTotals::default(),
            batches: 0,
            buffers: BufferPool::default(),
            written: HashSet::new(),
            pace: Pace::default(),
        })
    }

    async fn send_range(
        &mut self,
        memory: &MachineMemory,
        in_flight: &InFlight,
        round: u32,
        chunks: Range<u64>,
    ) -> Result<(), StreamError> {
        self.enter(round);
        let mine: Vec<u64> =
            chunks_of(self.lane, self.lanes, chunks.end).filter(|c| *c >= chunks.start).collect();
        let mut cursor = Cursor { chunks: &mine, word: 0 };
        loop {
            let batch = (self.lane.0, round, self.batches);
            let Some(runs) = in_flight.take(self.attempt, batch, || cursor.take(memory)) else {
                return Ok(());
            };
            if runs.is_empty() {
                return Ok(());
            }
            self.send_batch(memory, round, &runs).await?;
            self.batches += 1;
            glommio::executor().yield_now().await;
        }
    }

    async fn send_batch(
        &mut self,
        memory: &MachineMemory,
        round: u32,
        runs: &[PageRun],
    ) -> Result<(), StreamError> {
        let mut buffer = self.buffers.take(BATCH_PAGES * PAGE_BYTES_USIZE);
        let (batch, pages) = fill(memory, round, runs, &mut buffer, &mut self.written)?;
        self.sender.batch(&batch);
        let payload_bytes = u32::try_from(pages * PAGE_BYTES_USIZE).unwrap_or(0);
        let total: u64 = runs.iter().map(|run| run.count).sum();
        let head = frame::encode(self.version, &LaneRecord::Batch(batch), payload_bytes)?;
        self.totals.bytes += head.len() as u64 + u64::from(payload_bytes);
        self.totals.pages += pages as u64;
        self.totals.zero_pages += total - pages as u64;
        self.pace.turn(head.len() as u64 + u64::from(payload_bytes)).await;
        let payload = self.buffers.lend(buffer, pages * PAGE_BYTES_USIZE);
        self.stream.write_chunks(&mut [Bytes::from_owner(head), payload]).await?;
        Ok(())
    }

    async fn end_round(&mut self, round: u32) -> Result<LaneTotals, StreamError> {
        self.enter(round);
        let end = self.sender.round_end(round);
        let bytes = frame::encode(self.version, &LaneRecord::RoundEnd(end), 0)?;
        self.totals.bytes += bytes.len() as u64;
        self.totals.digest = end.digest;
        self.stream.write_all(&bytes).await?;
        Ok(self.totals)
    }

    fn enter(&mut self, round: u32) {
        if self.totals.round != round {
            self.totals = LaneTotals { round, ..LaneTotals::default() };
            self.batches = 0;
        }
    }
}

/// Where in its chunks a lane is.
struct Cursor<'a> {
    chunks: &'a [u64],
    /// Word within the first of them.
    word: usize,
}

impl Cursor<'_> {
    /// Takes dirty bits for one batch: whole words, as long as the next one surely fits. Empty at the end.
    fn take(&mut self, memory: &MachineMemory) -> (Vec<PageRun>, Vec<PageRun>) {
        let (mut runs, mut pages) = (Vec::new(), 0);
        while let Some((&chunk, rest)) = self.chunks.split_first() {
            while self.word < CHUNK_WORDS {
                if pages + 64 > BATCH_PAGES {
                    return (runs.clone(), runs);
                }
                let word =
                    usize::try_from(chunk).unwrap_or(usize::MAX).saturating_mul(CHUNK_WORDS) + self.word;
                let bits = memory.dirty.take(word);
                pages += bits.count_ones() as usize;
                runs.extend(runs_in(&[bits], PageIndex(word as u64 * 64)));
                self.word += 1;
            }
            self.chunks = rest;
            self.word = 0;
        }
        (runs.clone(), runs)
    }
}

/// Copies the pages of `runs` into `buffer`, zero pages left out; returns the batch and the number of pages copied.
///
/// Pages of a chunk that was never written are zero without being read. That it was not is asked after their dirty bits were taken, so a
/// write that came too late for the answer has set the bit again.
fn fill(
    memory: &MachineMemory,
    round: u32,
    runs: &[PageRun],
    buffer: &mut [u8],
    written: &mut HashSet<u64>,
) -> io::Result<(Batch, usize)> {
    let mut batch = Batch { round, content: Vec::new(), zero: Vec::new() };
    let (places, _) = buffer.as_chunks_mut::<PAGE_BYTES_USIZE>();
    let mut used = 0;
    for run in runs {
        // A run lies in one word of the bitmap, so in one chunk.
        let chunk = run.first.chunk();
        let read = written.contains(&chunk) || (memory.chunk_written(chunk) && written.insert(chunk));
        for page in run.pages() {
            let Some(place) = places.get_mut(used) else { break };
            if read && memory.copy_out(page, place)? == PageContent::Data {
                used += 1;
                extend(&mut batch.content, page);
            } else {
                extend(&mut batch.zero, page);
            }
        }
    }
    Ok((batch, used))
}

/// Adds a page to the last run if it follows it in the same chunk, or begins a new run.
fn extend(runs: &mut Vec<WireRun>, page: PageIndex) {
    // Pages of the largest space fit 32 bits; see `WireRun`.
    let Ok(number) = u32::try_from(page.0) else { return };
    match runs.last_mut() {
        Some(run)
            if run.first + run.count == number && PageIndex(run.first.into()).chunk() == page.chunk() =>
        {
            run.count += 1;
        }
        _ => runs.push(WireRun { first: number, count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::units::RamSize;

    fn memory() -> MachineMemory {
        MachineMemory::create(RamSize::from_bytes(16 << 20).unwrap()).unwrap()
    }

    #[test]
    fn every_dirty_page_of_the_lane_is_taken_once_in_batches_that_fit() {
        let memory = memory();
        (0..memory.dirty.words()).for_each(|word| memory.dirty.give_back(word, u64::MAX));
        let mine: Vec<u64> = chunks_of(Lane(1), 2, 8).collect();
        let mut cursor = Cursor { chunks: &mine, word: 0 };
        let mut pages = Vec::new();
        loop {
            let (_, runs) = cursor.take(&memory);
            let taken: Vec<_> = runs.iter().flat_map(|run| run.pages()).collect();
            if taken.is_empty() {
                break;
            }
            assert!(taken.len() <= BATCH_PAGES);
            pages.extend(taken);
        }
        assert_eq!(pages.len(), 4 * 512);
        assert!(pages.is_sorted() && pages.iter().all(|p| p.chunk() % 2 == 1));
        assert_eq!(memory.dirty.count(), 4 * 512);
    }

    #[test]
    fn zero_pages_become_references_and_runs_stop_at_chunks() {
        let memory = memory();
        for page in [510_u64, 511, 512, 514] {
            assert!(memory.ram.copy_in(page * 4096 + 8, &[1]));
        }
        let mut buffer = vec![0; BATCH_PAGES * PAGE_BYTES_USIZE];
        let runs = [PageRun { first: PageIndex(510), count: 2 }, PageRun { first: PageIndex(512), count: 3 }];
        let (batch, used) = fill(&memory, 3, &runs, &mut buffer, &mut HashSet::new()).unwrap();
        assert_eq!(used, 4);
        let run = |first, count| WireRun { first, count };
        assert_eq!(batch.content, [run(510, 2), run(512, 1), run(514, 1)]);
        assert_eq!(batch.zero, [run(513, 1)]);
        assert_eq!(buffer[3 * 4096 + 8], 1);
    }
}
