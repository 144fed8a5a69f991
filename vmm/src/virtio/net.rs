//! virtio-net on a tap: queue 0 receives, queue 1 sends.
//!
//! The tap was opened by `mashined` with `IFF_VNET_HDR` and a header of 12 bytes. No offloads are negotiated yet, so that the
//! header is zero in both directions; what the guest writes there is not passed on.
//!
//! A packet is only read from the tap when a receive buffer is there for it, and is delivered in the same step. So no packet
//! is ever held by the VMM: what has not reached the guest when it pauses is in the tap's queue, where `mashined` finds it.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use virtio_queue::Queue;

use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
const STATUS_LINK_UP: u8 = 1;
const HEADER_BYTES: usize = 12;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS_AT: usize = 10;
/// A frame without segmentation offload: an MTU of up to 65,535 and its Ethernet header with a VLAN tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// An Ethernet header: anything shorter is no frame.
const FRAME_BYTES_MIN: usize = 14;

const RECEIVE: usize = 0;
const SEND: usize = 1;

/// The interface.
#[derive(Debug)]
pub struct Net {
    tap: File,
    mac: [u8; 6],
    buffer: Box<[u8]>,
    /// The driver has given no buffer; its next notification will say that it has.
    starved: bool,
}

impl Net {
    /// An interface on `tap`, which must be non-blocking.
    pub fn new(tap: File, mac: [u8; 6]) -> Self {
        Self { tap, mac, buffer: vec![0; HEADER_BYTES + FRAME_BYTES_MAX].into(), starved: false }
    }

    fn receive(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(buffers)) = queues.get_mut(RECEIVE) else {
            self.starved = true;
            return Ok(progress);
        };
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(buffers, memory)? else {
                self.starved = true;
                return Ok(progress);
            };
            let packet = match self.tap.read(&mut self.buffer) {
                Ok(bytes) if bytes >= HEADER_BYTES + FRAME_BYTES_MIN => &mut self.buffer[..bytes],
                // Nothing there, or a tap that is down: the buffer waits for the next packet.
                Ok(_) | Err(_) => {
                    queue::unpop(buffers);
                    return Ok(progress);
                }
            };
            packet[..HEADER_BYTES].fill(0);
            packet[NUM_BUFFERS_AT] = 1;
            let head = chain.head_index();
            let written = queue::scatter(chain, memory, packet)?;
            // A buffer too small for the packet is the driver's fault; it gets it back empty and the packet is lost.
            let whole = if written == packet.len() { u32::try_from(written).unwrap_or(0) } else { 0 };
            queue::push(buffers, memory, head, whole)?;
            progress.used |= queue::wants_interrupt(buffers, memory);
        }
        // The descriptor is still readable if there is more.
        Ok(progress)
    }

    fn send(&mut self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(packets)) = queues.get_mut(SEND) else { return Ok(progress) };
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(packets, memory)? else { return Ok(progress) };
            let head = chain.head_index();
            let bytes = queue::gather(chain, memory, &mut self.buffer)?;
            if bytes >= HEADER_BYTES + FRAME_BYTES_MIN {
                self.buffer[..HEADER_BYTES].fill(0);
                self.transmit(bytes);
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
        F_MAC | F_STATUS
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
                self.receive(queues, memory)
            }
            _ => self.send(queues, memory),
        }
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.receive(queues, memory)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn wants_host_event(&self) -> bool {
        !self.starved
    }

    fn reset(&mut self) {
        self.starved = false;
    }
}
