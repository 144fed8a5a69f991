//! What the source has taken from the dirty bitmap and put on the lanes, until it is proven to be in the target's memory.
//!
//! The order that keeps invariant 2 is: take the dirty bits, record the batch here, read the pages, send. Whatever then
//! happens to the link, a page is dirty in the bitmap, or in here, or applied. After a broken link
//! [`Ledger::give_back`] returns what the target does not prove to have; those bits are set in the bitmap again.
//! Giving back a page that was applied after all costs its bytes and nothing else: the rule is simple because it may be.

use std::collections::VecDeque;

use super::messages::Resume;
use crate::pages::{PageRun, PageSet};

/// One lane's batches in flight.
#[derive(Debug, Clone, Default)]
struct LaneLog {
    /// Round, number within the round, and the runs of each batch, in the order sent.
    batches: VecDeque<(u32, u32, Vec<PageRun>)>,
}

/// Everything in flight. Holds at most one entry for each batch of the rounds not confirmed: at worst the first pass, 16
/// bytes for each run in it.
#[derive(Debug, Clone)]
pub struct Ledger {
    lanes: Vec<LaneLog>,
}

impl Ledger {
    /// For so many lanes.
    pub fn new(lanes: u16) -> Self {
        Self { lanes: vec![LaneLog::default(); usize::from(lanes)] }
    }

    /// A batch of `lane` (from 0) is about to be read and sent. A lane beyond the number given at first gets a log of its own, so that
    /// nothing is ever forgotten.
    pub fn record(&mut self, lane: u16, round: u32, batch: u32, runs: Vec<PageRun>) {
        let lane = usize::from(lane);
        if lane >= self.lanes.len() {
            self.lanes.resize_with(lane + 1, LaneLog::default);
        }
        if let Some(log) = self.lanes.get_mut(lane) {
            log.batches.push_back((round, batch, runs));
        }
    }

    /// Every round up to `round` is applied.
    pub fn confirm(&mut self, round: u32) {
        for log in &mut self.lanes {
            while log.batches.front().is_some_and(|(r, ..)| *r <= round) {
                log.batches.pop_front();
            }
        }
    }

    /// Empties the ledger into `dirty`, but for what `received` proves to be applied.
    pub fn give_back(&mut self, received: &Resume, dirty: &mut PageSet) {
        for (lane, log) in self.lanes.iter_mut().enumerate() {
            let point = received.lanes.get(lane).copied().unwrap_or_default();
            for (round, batch, runs) in log.batches.drain(..) {
                let applied = round <= received.round || (round, batch) < (point.round, point.batches);
                if !applied {
                    runs.into_iter().for_each(|run| dirty.insert_run(run));
                }
            }
        }
    }

    /// Forgets everything, for a start from scratch with all pages dirty.
    pub fn clear(&mut self) {
        self.lanes.iter_mut().for_each(|log| log.batches.clear());
    }

    /// Batches in flight.
    pub fn batches(&self) -> usize {
        self.lanes.iter().map(|log| log.batches.len()).sum()
    }
}
