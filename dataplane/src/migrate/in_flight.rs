//! What the lanes of one migration share: the connection attempt they serve, and the ledger of what is in flight.
//!
//! Lanes run on several shards. The one thing they must agree on is who answers for a dirty bit, so taking bits and recording
//! them is one step under this lock, about once in a megabyte; and a lane of an attempt that is over takes none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wire::migration::ledger::Ledger;
use wire::migration::messages::Resume;
use wire::pages::{PageRun, PageSet};

use crate::memory::DirtyBitmap;

/// Shared by the session and its lanes.
#[derive(Debug, Clone)]
pub struct InFlight {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    attempt: u32,
    ledger: Ledger,
}

impl Default for InFlight {
    fn default() -> Self {
        Self::new()
    }
}

impl InFlight {
    /// Nothing in flight, no attempt under way.
    pub fn new() -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { attempt: 0, ledger: Ledger::new(0) })) }
    }

    /// Begins an attempt with so many lanes. What earlier attempts left in the ledger stays until it is given back; their number of lanes is the
    /// same then.
    pub fn begin(&self, attempt: u32, lanes: u16) {
        let mut inner = self.lock();
        inner.attempt = attempt;
        if inner.ledger.batches() == 0 {
            inner.ledger = Ledger::new(lanes);
        }
    }

    /// Ends the attempt: from here on none of its lanes takes a bit.
    pub fn halt(&self) {
        self.lock().attempt = 0;
    }

    /// Runs `take`, which takes dirty bits and returns the runs it took, and records them for the batch; `None` if the attempt is over.
    pub fn take<T>(
        &self,
        attempt: u32,
        (lane, round, batch): (u16, u32, u32),
        take: impl FnOnce() -> (Vec<PageRun>, T),
    ) -> Option<T> {
        let mut inner = self.lock();
        if inner.attempt != attempt {
            return None;
        }
        let (runs, taken) = take();
        inner.ledger.record(lane, round, batch, runs);
        Some(taken)
    }

    /// Rounds up to this one are applied.
    pub fn confirm(&self, round: u32) {
        self.lock().ledger.confirm(round);
    }

    /// Sets the bits of everything that is not proven to be applied.
    pub fn give_back(&self, received: &Resume, pages: u64, dirty: &DirtyBitmap) {
        let mut set = PageSet::empty(pages);
        self.lock().ledger.give_back(received, &mut set);
        for (word, &bits) in set.words().iter().enumerate() {
            dirty.give_back(word, bits);
        }
    }

    /// Forgets everything: all pages are dirty anyway.
    pub fn clear(&self) {
        self.lock().ledger.clear();
    }

    /// A lane that panicked left the ledger whole: recording is its last step.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
