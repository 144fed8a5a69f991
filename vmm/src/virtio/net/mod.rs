//! virtio-net on a tap: queue 0 receives, queue 1 sends.
//!
//! The tap was opened by `mashined` with `IFF_VNET_HDR` and a header of 12 bytes. Checksum and segmentation offloads
//! are as the driver agrees to ([`offload`]), down to none at all.
//!
//! A packet is only read from the tap when a receive buffer is there for it, and is delivered in the same step. So no packet
//! is ever held by the VMM: what has not reached the guest when it pauses is in the tap's queue, where `mashined` finds it.

mod offload;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use virtio_queue::Queue;

use self::offload::{Agreed, HEADER_BYTES};
use super::queue::{self, BUDGET, Chain, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
const STATUS_LINK_UP: u8 = 1;
/// A frame: an IP packet of up to 65,535 bytes, which segments may be put together to, and an Ethernet header with a VLAN tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// An Ethernet header: anything shorter is no frame.
const FRAME_BYTES_MIN: usize = 14;

const RECEIVE: usize = 0;
const SEND: usize = 1;

/// Receive buffers that were taken and not yet used.
#[derive(Default)]
struct Spare<'a> {
    /// With the bytes that each holds.
    chains: VecDeque<(Chain<'a>, usize)>,
    bytes: usize,
}

impl<'a> Spare<'a> {
    fn add(&mut self, chain: Chain<'a>) -> Result<(), QueueError> {
        let bytes = queue::capacity(chain.clone(), HEADER_BYTES + FRAME_BYTES_MAX)?;
        self.bytes += bytes;
        self.chains.push_back((chain, bytes));
        Ok(())
    }

    fn take(&mut self) -> Option<(Chain<'a>, usize)> {
        let (chain, bytes) = self.chains.pop_front()?;
        self.bytes -= bytes;
        Some((chain, bytes))
    }
}

/// The interface.
#[derive(Debug)]
pub struct Net {
    tap: File,
    mac: [u8; 6],
    buffer: Box<[u8]>,
    /// The driver has given no buffer; its next notification will say that it has.
    starved: bool,
    agreed: Agreed,
}

impl Net {
    /// An interface on `tap`, which must be non-blocking.
    pub fn new(tap: File, mac: [u8; 6]) -> Self {
        Self {
            tap,
            mac,
            buffer: vec![0; HEADER_BYTES + FRAME_BYTES_MAX].into(),
            starved: false,
            agreed: Agreed::default(),
        }
    }

    /// Packets from the tap for the guest. `notified`: the driver has just given buffers.
    fn receive(
        &mut self,
        notified: bool,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let Some(Some(buffers)) = queues.get_mut(RECEIVE) else {
            self.starved = true;
            return Ok(Progress::default());
        };
        let mut spare = Spare::default();
        let done = self.receive_into(notified, buffers, &mut spare, memory);
        // Those that no packet came for wait for the next one.
        for _ in 0..spare.chains.len() {
            queue::unpop(buffers);
        }
        done
    }

    fn receive_into<'a>(
        &mut self,
        notified: bool,
        buffers: &mut Queue,
        spare: &mut Spare<'a>,
        memory: &'a GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let merges = self.agreed.merges();
        // Where a packet may be large and lie in several buffers, there have to be enough of them before it is read, because its length is not known
        // until then. A driver that has just given all it has gets what fits.
        let needed = if merges && self.agreed.receives_large() { self.buffer.len() } else { 1 };
        for _ in 0..BUDGET {
            while spare.bytes < needed && (merges || spare.chains.is_empty()) {
                let Some(chain) = queue::pop(buffers, memory)? else { break };
                spare.add(chain)?;
            }
            if spare.chains.is_empty() || (spare.bytes < needed && !notified) {
                self.starved = true;
                return Ok(progress);
            }
            let bytes = match self.tap.read(&mut self.buffer) {
                Ok(bytes) if bytes >= HEADER_BYTES + FRAME_BYTES_MIN => bytes,
                // Nothing there, or a tap that is down.
                Ok(_) | Err(_) => return Ok(progress),
            };
            progress.used |= self.deliver(bytes, buffers, spare, memory)?;
        }
        // The descriptor is still readable if there is more.
        Ok(progress)
    }

    /// Puts the packet in the buffer into the guest's. True when the driver is to be interrupted.
    fn deliver<'a>(
        &mut self,
        bytes: usize,
        buffers: &mut Queue,
        spare: &mut Spare<'a>,
        memory: &'a GuestMemory,
    ) -> Result<bool, QueueError> {
        let merges = self.agreed.merges();
        if merges && spare.bytes < bytes {
            while let Some(chain) = queue::pop(buffers, memory)? {
                spare.add(chain)?;
                if spare.bytes >= bytes {
                    break;
                }
            }
            if spare.bytes < bytes {
                // The packet is lost, the buffers are not.
                return Ok(false);
            }
        }
        let mut taken = Vec::new();
        let mut filled = 0;
        while filled < bytes || taken.is_empty() {
            let Some((chain, room)) = spare.take() else { break };
            let part = room.min(bytes - filled);
            taken.push((chain, filled..filled + part));
            filled += part;
            if !merges {
                break;
            }
        }
        if let Some((header, _)) = self.buffer.split_first_chunk_mut::<HEADER_BYTES>() {
            self.agreed.to_guest(header, u16::try_from(taken.len()).unwrap_or(u16::MAX));
        }
        let mut used = Vec::with_capacity(taken.len());
        for (chain, part) in taken {
            let head = chain.head_index();
            let written = queue::scatter(chain, memory, &self.buffer[part])?;
            // A buffer too small for the packet is the driver's fault; it gets it back empty and the packet is lost.
            let written = if filled == bytes { u32::try_from(written).unwrap_or(0) } else { 0 };
            used.push((head, written));
        }
        queue::push_all(buffers, memory, &used)?;
        Ok(queue::wants_interrupt(buffers, memory))
    }

    fn send(&mut self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(packets)) = queues.get_mut(SEND) else { return Ok(progress) };
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(packets, memory)? else { return Ok(progress) };
            let head = chain.head_index();
            let bytes = queue::gather(chain, memory, &mut self.buffer)?;
            if bytes >= HEADER_BYTES + FRAME_BYTES_MIN {
                let header = self.buffer.first_chunk_mut::<HEADER_BYTES>();
                if header.is_some_and(|header| self.agreed.to_tap(header)) {
                    self.transmit(bytes);
                }
            }
            queue::push(packets, memory, head, 0)?;
            progress.used |= queue::wants_interrupt(packets, memory);
        }
        progress.more = true;
        Ok(progress)
    }

    /// Writes the frame in the buffer to the tap. A tap that takes none (down, or its queue is full) loses it, as a wire does.
    fn transmit(&mut self, bytes: usize) {
        while let Err(error) = self.tap.write(&self.buffer[..bytes]) {
            if error.kind() != ErrorKind::Interrupted {
                break;
            }
        }
    }
}

impl Device for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn id(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        F_MAC | F_STATUS | offload::OFFERED
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        config[6] = STATUS_LINK_UP;
        let rest = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        match index {
            RECEIVE => {
                self.starved = false;
                self.receive(true, queues, memory)
            }
            _ => self.send(queues, memory),
        }
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.receive(false, queues, memory)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn wants_host_event(&self) -> bool {
        !self.starved
    }

    fn started(&mut self, features: u64, _restored: bool) {
        self.agreed = Agreed::new(features);
        self.agreed.set(&self.tap);
    }

    fn reset(&mut self) {
        self.starved = false;
        self.agreed = Agreed::default();
        self.agreed.set(&self.tap);
    }
}
