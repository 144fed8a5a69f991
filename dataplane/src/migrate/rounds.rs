//! One round of pages over all lanes.
//!
//! The dirty log is cleared in KVM range by range, just before the pages of a range go out: a page that is written between the snapshot and its
//! sending is sent once, not twice. A few ranges are under way at a time, so that no lane waits for the slowest one, and none
//! runs so far ahead that the clearing loses its point.

use std::ops::Range;

use tokio::sync::mpsc;
use wire::migration::source::Sent;
use wire::units::{CHUNK_PAGES, PageIndex};

use super::source_lane::{LaneCommand, LaneNews, LaneReport, LaneTotals};
use crate::doorbell::Ringer;
use crate::shard::now;
use crate::vm::VmmError;
use crate::vm::client::VmmClient;

/// Chunks in a range: 32 MiB.
const RANGE_CHUNKS: u64 = 16;
/// With no more dirty pages than this the whole log is cleared at once: the pages are gone before the guest could write many of them again, and
/// going range by range would take longer than sending them.
const FEW_PAGES: u64 = RANGE_CHUNKS * CHUNK_PAGES;
/// Ranges under way at a time.
const RANGES_UNDER_WAY: usize = 2;
/// Commands a lane may have waiting: the ranges under way and the end of the round.
pub const LANE_COMMANDS_MAX: usize = RANGES_UNDER_WAY + 2;

/// Why a round was not sent.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    /// The VMM did not give its dirty log.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// A lane is gone; the session knows from the lane itself.
    #[error("a lane was lost")]
    Lane,
}

/// The lanes of an attempt, as the session holds them.
pub struct Lanes {
    commands: Vec<Ringer<LaneCommand>>,
    reports: mpsc::UnboundedReceiver<LaneReport>,
    /// Ranges done that no one has waited for yet, over all lanes.
    ranges: usize,
    /// Lanes that have ended the round.
    ended: Vec<(u16, LaneTotals)>,
}

/// What a round sent.
#[derive(Debug, Clone, Default)]
pub struct RoundTotals {
    /// Sums over the lanes.
    pub sent: Sent,
    /// Digest of each lane.
    pub digests: Vec<u32>,
}

impl Lanes {
    /// Over these lanes, in their order, with what they report.
    pub fn new(commands: Vec<Ringer<LaneCommand>>, reports: mpsc::UnboundedReceiver<LaneReport>) -> Self {
        Self { commands, reports, ranges: 0, ended: Vec::new() }
    }

    /// Takes the dirty log range by range and sends every dirty page.
    ///
    /// # Errors
    /// [`RoundError`].
    pub async fn send_round(
        &mut self,
        vmm: &VmmClient,
        all_chunks: u64,
        round: u32,
    ) -> Result<RoundTotals, RoundError> {
        let started = now();
        let few = vmm.dirty_sync().await? <= FEW_PAGES;
        let range_chunks = if few { all_chunks } else { RANGE_CHUNKS };
        let mut under_way = 0;
        let mut start = 0;
        while start < all_chunks {
            let end = (start + range_chunks).min(all_chunks);
            vmm.dirty_take(PageIndex(start * CHUNK_PAGES), (end - start) * CHUNK_PAGES).await?;
            self.command(&LaneCommand::Range { round, chunks: start..end, paused: false })?;
            under_way += 1;
            if under_way == RANGES_UNDER_WAY {
                self.ranges_done(1).await?;
                under_way -= 1;
            }
            start = end;
        }
        self.ranges_done(under_way).await?;
        self.end_round(round, started.0).await
    }

    /// Sends every page whose bit is set already.
    ///
    /// # Errors
    /// [`RoundError::Lane`].
    pub async fn send_final(&mut self, all_chunks: u64, round: u32) -> Result<RoundTotals, RoundError> {
        let started = now();
        let chunks: Range<u64> = 0..all_chunks;
        self.command(&LaneCommand::Range { round, chunks, paused: true })?;
        self.command(&LaneCommand::EndRound { round })?;
        self.ranges_done(1).await?;
        self.collect(round, started.0).await
    }

    async fn end_round(&mut self, round: u32, started_us: u64) -> Result<RoundTotals, RoundError> {
        self.command(&LaneCommand::EndRound { round })?;
        self.collect(round, started_us).await
    }

    fn command(&self, command: &LaneCommand) -> Result<(), RoundError> {
        let sent = self.commands.iter().all(|lane| lane.try_send(command.clone()).is_ok());
        sent.then_some(()).ok_or(RoundError::Lane)
    }

    /// Waits until the lanes have done so many ranges more, all of them together.
    async fn ranges_done(&mut self, ranges: usize) -> Result<(), RoundError> {
        let wanted = ranges * self.commands.len();
        while self.ranges < wanted {
            self.step().await?;
        }
        self.ranges -= wanted;
        Ok(())
    }

    async fn collect(&mut self, round: u32, started_us: u64) -> Result<RoundTotals, RoundError> {
        while self.ended.len() < self.commands.len() {
            self.step().await?;
        }
        let mut digests = vec![0; self.commands.len()];
        let mut sent = Sent { round, ..Sent::default() };
        for (lane, totals) in self.ended.drain(..) {
            if let Some(digest) = digests.get_mut(usize::from(lane)) {
                *digest = totals.digest;
            }
            sent.pages += totals.pages;
            sent.zero_pages += totals.zero_pages;
            sent.bytes += totals.bytes;
        }
        sent.us = now().0.saturating_sub(started_us);
        Ok(RoundTotals { sent, digests })
    }

    /// Takes one report into account.
    async fn step(&mut self) -> Result<(), RoundError> {
        let report = self.reports.recv().await.ok_or(RoundError::Lane)?;
        match report.news {
            LaneNews::RangeDone => self.ranges += 1,
            LaneNews::RoundDone(totals) => self.ended.push((report.lane, totals)),
            LaneNews::Lost(_) => return Err(RoundError::Lane),
        }
        Ok(())
    }
}
