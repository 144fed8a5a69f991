//! Rounds on the lanes, and the way back of what did not arrive.

use rkyv::util::AlignedVec;
use wire::migration::lane::{Batch, LaneRecord, WireRun};
use wire::migration::messages::Resume;
use wire::migration::source::{Sent, SourceEvent};
use wire::pages::{PageRun, PageSet, lane_of};
use wire::units::PageIndex;

use super::SourceReply;
use crate::guest::{CHUNKS, PAGES_PER_CHUNK, index_of, page_of};
use crate::net::LANES;
use crate::options::Mutation;
use crate::target::LaneFrame;
use crate::world::{Event, World};

/// A round being sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    pub(super) number: u32,
    last: bool,
    chunk: usize,
    started: u64,
    sent: Sent,
}

impl World {
    pub(super) fn begin_round(&mut self, round: u32, last: bool) {
        self.source.tasks += 1;
        let number = self.source.tasks;
        let sent = Sent { round, ..Sent::default() };
        self.source.task = Some(Task { number, last, chunk: 0, started: self.now, sent });
        let at = self.now + self.rng.between(1, 50);
        let daemon = self.source.daemon;
        self.at(at, Event::SendStep { daemon, task: number });
    }

    /// Takes the dirty pages of the next chunk and sends them; after the last chunk, ends the round.
    pub fn send_step(&mut self, daemon: u32, number: u32) {
        let Some(mut task) = self.source.task else { return };
        if daemon != self.source.daemon || task.number != number {
            return;
        }
        let mask_of = |chunk: usize| 0xff_u64 << (chunk * PAGES_PER_CHUNK);
        while task.chunk < CHUNKS && self.source.vmm.dirty & mask_of(task.chunk) == 0 {
            task.chunk += 1;
        }
        if task.chunk == CHUNKS {
            self.end_round(task);
            return;
        }
        let mask = self.source.vmm.dirty & mask_of(task.chunk);
        if self.options.mutation == Some(Mutation::ReadBeforeTake) {
            let at = self.now + self.rng.between(1, 400);
            self.at(at, Event::TakeLate { mask });
        } else {
            self.source.vmm.dirty &= !mask;
        }
        self.send_chunk(&mut task, mask);
        task.chunk += 1;
        self.source.task = Some(task);
        let at = self.now + if task.last { self.rng.between(1, 10) } else { self.rng.between(5, 120) };
        self.at(at, Event::SendStep { daemon, task: number });
    }

    fn send_chunk(&mut self, task: &mut Task, mask: u64) {
        let lanes = self.source.senders.len();
        let lane = usize::from(lane_of(task.chunk as u64, u16::try_from(lanes).unwrap_or(1)).0);
        let mut batch = Batch { round: task.sent.round, ..Batch::default() };
        let (mut pages, mut runs) = (Vec::new(), Vec::new());
        for index in (0..64).filter(|i| mask & (1 << i) != 0) {
            let version = self.source.vmm.memory.pages[index];
            let first = page_of(index);
            let run = WireRun { first: u32::try_from(first.0).unwrap_or(u32::MAX), count: 1 };
            if version == 0 {
                batch.zero.push(run)
            } else {
                batch.content.push(run)
            }
            runs.push(PageRun { first, count: 1 });
            pages.push((index, version));
        }
        task.sent.pages += batch.content.len() as u64;
        task.sent.zero_pages += batch.zero.len() as u64;
        let payload = u32::try_from(batch.content.len()).unwrap_or(0) * 4096;
        task.sent.bytes += u64::from(payload) + 100;
        let number = self.source.senders[lane].batch(&batch);
        if let Some(ledger) = &mut self.source.ledger {
            ledger.record(u16::try_from(lane).unwrap_or(0), task.sent.round, number, runs);
        }
        self.send_record(lane, LaneRecord::Batch(batch), payload, pages);
    }

    fn send_record(&mut self, lane: usize, record: LaneRecord, payload: u32, pages: Vec<(usize, u32)>) {
        let Some(session) = self.source.session else { return };
        let body = rkyv::to_bytes::<rkyv::rancor::Error>(&record).unwrap_or_else(|_| AlignedVec::new());
        self.send_lane(session, lane, LaneFrame { body, payload, pages });
    }

    fn end_round(&mut self, mut task: Task) {
        let round = task.sent.round;
        let mut digests = Vec::with_capacity(LANES);
        for lane in 0..self.source.senders.len() {
            let end = self.source.senders[lane].round_end(round);
            digests.push(end.digest);
            self.send_record(lane, LaneRecord::RoundEnd(end), 0, Vec::new());
        }
        task.sent.us = self.now - task.started;
        let sent = task.sent;
        let event = if task.last {
            SourceEvent::FinalSent { sent, lane_digests: digests }
        } else {
            SourceEvent::RoundSent(sent)
        };
        self.source_reply(SourceReply::Sent(task.number, event));
    }

    /// What the target does not have is dirty again; and then nothing may be missing from the bitmap.
    pub(super) fn give_back(&mut self, received: &Resume) {
        let Some(ledger) = &mut self.source.ledger else { return };
        let mut dirty = PageSet::empty(16 << 20 >> 12);
        ledger.give_back(received, &mut dirty);
        if self.options.mutation == Some(Mutation::DirtyBitsNotGivenBack) {
            return;
        }
        for run in dirty.runs() {
            for page in run.pages() {
                self.source.vmm.dirty |= index_of(PageIndex(page.0)).map_or(0, |index| 1 << index);
            }
        }
        let same = self.target.machine_of(self.source.config.as_ref().map(|c| c.migration));
        if let Some(copy) = self.target.vmm.as_ref().filter(|_| same && self.options.mutation.is_none()) {
            let differs = self.source.vmm.memory.difference(&copy.memory);
            if differs & !self.source.vmm.dirty != 0 {
                self.violation(format!(
                    "invariant 2: dirty bits lost: {:#x}",
                    differs & !self.source.vmm.dirty
                ));
            }
        }
    }
}
