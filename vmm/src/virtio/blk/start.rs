//! What is done about a request first: checks, and the operations it takes.

use std::io;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use wire::units::PAGE_BYTES;

use super::request::extent;
use super::split::{self, Place};
use super::{
    Active, BLOCK_SECTORS, Blk, Effect, Kind, Operation, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP,
    ZERO_SECTORS_MAX, answer, apply, clear,
};
use crate::memory::GuestMemory;
use crate::virtio::queue::QueueError;

/// Length of what a request to discard or to zero says about a range.
const ZERO_RANGE_BYTES: usize = 16;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const FLAG_UNMAP: u32 = 1;

/// How a request begins.
enum Begin {
    /// With this operation, which has this effect; a write is followed by a sync if the driver does not flush.
    Operation(Operation, Effect),
    /// With operations for the pieces of the disk from this byte on.
    Read(u64),
    /// It has ended with this status and so many bytes for the driver.
    Ended(u8, u64),
}

impl Blk {
    /// Begins a request, and ends it if there is nothing to wait for.
    pub(super) fn start(
        &mut self,
        mut request: Request,
        queue: &mut Queue,
        memory: &GuestMemory,
        used: &mut bool,
    ) -> Result<(), QueueError> {
        if let Kind::Out = request.kind
            && let Err(_failed) = self.copy_up(&request, queue, memory, used)
        {
            return answer(&request, STATUS_IOERR, 0, queue, memory, used);
        }
        let begin = match self.broken {
            true => Begin::Ended(STATUS_IOERR, 0),
            false => self.begin(&mut request, memory)?,
        };
        let (operation, effect, at) = match begin {
            Begin::Ended(status, bytes) => return answer(&request, status, bytes, queue, memory, used),
            Begin::Operation(operation, effect) => (Some(operation), effect, 0),
            Begin::Read(at) => (None, Effect::None, at),
        };
        let Some(tag) = self.free.pop() else {
            return answer(&request, STATUS_IOERR, 0, queue, memory, used);
        };
        // Only a read has bytes for the driver.
        let bytes = if operation.is_some() { 0 } else { request.data.bytes() };
        let sync = effect != Effect::None && !self.flushes;
        let mut active = Active { request, at, in_flight: 0, effect, sync, status: STATUS_OK, bytes };
        match operation.map(|operation| self.ring.push(tag, operation)) {
            Some(Ok(())) => active.in_flight = 1,
            Some(Err(_)) => (active.status, active.effect) = (STATUS_IOERR, Effect::None),
            None => {}
        }
        if let Some(place) = self.active.get_mut(tag) {
            *place = Some(active);
        }
        if bytes > 0 {
            self.read_on(tag, memory);
        }
        self.conclude_if_done(tag, Some(queue), memory, used)
    }

    fn begin(&self, request: &mut Request, memory: &GuestMemory) -> Result<Begin, QueueError> {
        let refused = Begin::Ended(STATUS_IOERR, 0);
        Ok(match request.kind {
            Kind::Flush => Begin::Operation(Operation::Sync, Effect::None),
            Kind::GetId => {
                let mut written = 0;
                for range in request.data.iter() {
                    let rest = self.id.get(written..).unwrap_or_default();
                    let part = &rest[..rest.len().min(range.bytes)];
                    memory.write_slice(part, GuestAddress(range.address))?;
                    written += part.len();
                }
                Begin::Ended(STATUS_OK, u64::try_from(written).unwrap_or(0))
            }
            Kind::Unknown => Begin::Ended(STATUS_UNSUPP, 0),
            Kind::In => match request.extent(self.overlay.bytes()) {
                Some((at, _)) => Begin::Read(at),
                None => refused,
            },
            Kind::Out => match request.extent(self.overlay.bytes()) {
                Some((_, 0)) => Begin::Ended(STATUS_OK, 0),
                Some((at, bytes)) => {
                    let (first, end) = (at / PAGE_BYTES, (at + bytes).div_ceil(PAGE_BYTES));
                    let data = request.data.take(bytes);
                    let operation = Operation::Write(self.overlay.data_start() + at, data);
                    Begin::Operation(operation, Effect::Hold(first, end - first))
                }
                None => refused,
            },
            Kind::Discard | Kind::WriteZeroes => self.begin_zeroes(request, memory)?,
        })
    }

    /// Discarding makes held blocks zero and gives their space back; zeroing also hides what the base has.
    fn begin_zeroes(&self, request: &Request, memory: &GuestMemory) -> Result<Begin, QueueError> {
        let mut raw = [0; ZERO_RANGE_BYTES];
        if request.data.bytes() != 16 {
            return Ok(Begin::Ended(STATUS_UNSUPP, 0));
        }
        let mut filled = 0;
        for range in request.data.iter() {
            let part = raw.get_mut(filled..filled + range.bytes).unwrap_or_default();
            memory.read_slice(part, GuestAddress(range.address))?;
            filled += range.bytes;
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let zeroes = request.kind == Kind::WriteZeroes;
        let known = if zeroes { FLAG_UNMAP } else { 0 };
        let whole = sector.is_multiple_of(BLOCK_SECTORS.into()) && sectors.is_multiple_of(BLOCK_SECTORS);
        if flags & !known != 0 || !whole || sectors > ZERO_SECTORS_MAX {
            return Ok(Begin::Ended(STATUS_UNSUPP, 0));
        }
        let Some((at, bytes)) = extent(sector, u64::from(sectors) * 512, self.overlay.bytes()) else {
            return Ok(Begin::Ended(STATUS_IOERR, 0));
        };
        if bytes == 0 {
            return Ok(Begin::Ended(STATUS_OK, 0));
        }
        let (first, count) = (at / PAGE_BYTES, bytes / PAGE_BYTES);
        let hides = zeroes && at < self.overlay.base_bytes();
        let effect = if hides { Effect::Hold(first, count) } else { Effect::Change(first, count) };
        let keep_space = zeroes && flags & FLAG_UNMAP == 0;
        let offset = self.overlay.data_start() + at;
        Ok(Begin::Operation(Operation::Zero { offset, bytes, keep_space }, effect))
    }

    /// Puts operations for as much of a read into the ring as there is room for; the rest waits in `partly`.
    pub(super) fn read_on(&mut self, tag: usize, memory: &GuestMemory) {
        let Some(Some(active)) = self.active.get_mut(tag) else { return };
        while active.request.data.bytes() > 0 && active.status == STATUS_OK {
            let end = active.at + active.request.data.bytes();
            let held = self.overlay.held();
            let (place, bytes) =
                split::piece(|block| held.contains(block), self.overlay.base_bytes(), active.at, end);
            if place != Place::Nowhere && !self.ring.has_room() {
                self.partly = Some(tag);
                return;
            }
            let data = active.request.data.take(bytes);
            let pushed = match place {
                Place::Nowhere => {
                    active.at += bytes;
                    if clear(memory, &data).is_err() {
                        active.status = STATUS_IOERR;
                    }
                    continue;
                }
                Place::Overlay => {
                    let offset = self.overlay.data_start() + active.at;
                    self.ring.push(tag, Operation::ReadOverlay(offset, data))
                }
                Place::Base => self.ring.push(tag, Operation::ReadBase(active.at, data)),
            };
            active.at += bytes;
            match pushed {
                Ok(()) => active.in_flight += 1,
                Err(_) => active.status = STATUS_IOERR,
            }
        }
    }

    /// Before a write of parts of blocks: makes the overlay hold them. Waits for what is in flight first, because a write of the whole block
    /// may be, which the copy would undo.
    fn copy_up(
        &mut self,
        request: &Request,
        queue: &mut Queue,
        memory: &GuestMemory,
        used: &mut bool,
    ) -> io::Result<()> {
        let Some((at, bytes)) = request.extent(self.overlay.bytes()).filter(|&(_, bytes)| bytes > 0) else {
            return Ok(());
        };
        let end = at + bytes;
        let edges = [at, end].into_iter().filter(|edge| !edge.is_multiple_of(PAGE_BYTES));
        let mut waited = false;
        for block in edges.map(|edge| edge / PAGE_BYTES) {
            if self.overlay.held().contains(block) {
                continue;
            }
            if !waited {
                self.settle(Some(&mut *queue), memory, used).map_err(io::Error::other)?;
                waited = true;
            }
            if !self.overlay.held().contains(block) {
                self.overlay.copy_up(block)?;
                apply(&self.overlay, &self.dirty, self.first_page, Effect::Change(block, 1), true);
            }
        }
        Ok(())
    }
}
