//! virtio-net: one receive and one transmit queue, whole frames, no offloads.
//!
//! Received frames are looked at in place; the buffer of the frame last handed out goes back to the device when the next one
//! is asked for. Transmitted frames are built in the device's buffers. Without a free buffer nothing is taken in
//! either, so the peer's TCP slows down and nothing is lost.

use super::mmio::Device;
use super::queue::{DEVICE_WRITES, Queue};
use crate::memory::frames::Frames;
use guest_core::link::Mac;

const FEATURE_MAC: u64 = 1 << 5;
const RX: u32 = 0;
const TX: u32 = 1;
const QUEUE_SIZE: u16 = 256;
/// The `virtio_net_hdr` of version 1. All zero says: nothing to compute, nothing to split.
const NET_HEADER: usize = 12;
/// Fits a frame of 1514 bytes behind the header.
const BUFFER: usize = 2048;
const BUFFER_BYTES: u32 = 2048;
/// Longest frame.
pub const FRAME: usize = 1514;

/// Used if the device has no address of its own.
const FALLBACK_MAC: Mac = [0x02, 0x6d, 0x61, 0x73, 0x00, 0x01];

/// A running network device.
pub struct Net {
    device: Device,
    /// Incoming frames.
    pub rx: Receiver,
    /// Outgoing frames.
    pub tx: Transmitter,
    /// The device's address.
    pub mac: Mac,
}

/// The receive queue.
pub struct Receiver {
    queue: Queue,
    buffers: &'static mut [[u8; BUFFER]],
    /// Buffers given back since the device was last told.
    unannounced: u16,
    /// The buffer that is being looked at.
    held: Option<u16>,
    /// Frames received.
    pub frames: u64,
}

/// The transmit queue.
pub struct Transmitter {
    queue: Queue,
    buffers: &'static mut [[u8; BUFFER]],
    /// Whether something was submitted since the device was last told.
    unannounced: bool,
    /// Buffers that are free; the first `free_len` entries count.
    free: [u16; QUEUE_SIZE as usize],
    free_len: usize,
    /// Frames sent.
    pub frames: u64,
}

impl Net {
    /// Brings the device up. `None` if it refuses.
    pub fn start(device: Device, frames: &mut Frames) -> Option<Self> {
        let features = device.negotiate(FEATURE_MAC)?;
        let mac = if features & FEATURE_MAC == 0 {
            FALLBACK_MAC
        } else {
            [0, 1, 2, 3, 4, 5].map(|i| device.config8(i))
        };
        let rx = Receiver::new(&device, frames)?;
        let tx = Transmitter::new(&device, frames)?;
        device.start();
        device.notify(RX);
        Some(Self { device, rx, tx, mac })
    }

    /// Whether received frames raise an interrupt.
    pub fn set_interrupts(&mut self, on: bool) {
        self.rx.queue.set_interrupts(on);
    }

    /// To be called once per turn before frames are received.
    pub fn acknowledge(&mut self) {
        self.device.acknowledge();
    }

    /// Tells the device what was submitted since the last call.
    pub fn announce(&mut self) {
        if self.tx.unannounced {
            self.tx.unannounced = false;
            if self.tx.queue.wants_notify() {
                self.device.notify(TX);
            }
        }
        // Half a queue at a time saves exits. A device that ran out of buffers has been given a whole queue of them
        // by the time all are back, so it is told at least once after it ran out.
        if self.rx.unannounced >= self.rx.queue.size() / 2 {
            self.rx.unannounced = 0;
            if self.rx.queue.wants_notify() {
                self.device.notify(RX);
            }
        }
    }
}

impl Receiver {
    fn new(device: &Device, frames: &mut Frames) -> Option<Self> {
        let mut queue = device.queue(RX, QUEUE_SIZE, frames)?;
        let buffers = frames.take::<[u8; BUFFER]>(usize::from(queue.size()));
        for (buffer, index) in buffers.iter().zip(0..) {
            let at = buffer.as_ptr().expose_provenance() as u64;
            // SAFETY: a buffer is only looked at by `frame`, between coming back and being submitted again.
            unsafe { queue.describe(index, at, BUFFER_BYTES, DEVICE_WRITES, 0) };
            queue.submit(index);
        }
        Some(Self { queue, buffers, unannounced: 0, held: None, frames: 0 })
    }

    /// The next received frame, as a buffer number and length for [`Self::frame`]. The one before goes back.
    pub fn receive(&mut self) -> Option<(u16, usize)> {
        if let Some(index) = self.held.take() {
            self.queue.submit(index);
            self.unannounced += 1;
        }
        let (index, bytes) = self.queue.take_used()?;
        self.held = Some(index);
        self.frames += 1;
        let bytes = usize::try_from(bytes).unwrap_or(0).clamp(NET_HEADER, BUFFER);
        Some((index, bytes - NET_HEADER))
    }

    /// A received frame, until the next [`Self::receive`].
    #[must_use]
    pub fn frame(&self, index: u16, bytes: usize) -> &[u8] {
        &self.buffers[usize::from(index)][NET_HEADER..NET_HEADER + bytes]
    }
}

impl Transmitter {
    fn new(device: &Device, frames: &mut Frames) -> Option<Self> {
        let mut queue = device.queue(TX, QUEUE_SIZE, frames)?;
        queue.set_interrupts(false);
        let buffers = frames.take::<[u8; BUFFER]>(usize::from(queue.size()));
        let mut free = [0; QUEUE_SIZE as usize];
        for (slot, index) in free.iter_mut().zip(0..) {
            *slot = index;
        }
        let free_len = usize::from(queue.size());
        Some(Self { queue, buffers, unannounced: false, free, free_len, frames: 0 })
    }

    /// Whether a frame can be sent.
    pub fn can_send(&mut self) -> bool {
        while let Some((index, _)) = self.queue.take_used() {
            if self.free_len < self.buffers.len() {
                self.free[self.free_len] = index;
                self.free_len += 1;
            }
        }
        self.free_len > 0
    }

    /// Sends the frame that `build` makes; nothing if that returns no length, or if no buffer is free.
    pub fn send(&mut self, build: impl FnOnce(&mut [u8; FRAME]) -> Option<usize>) {
        if !self.can_send() {
            return;
        }
        let index = self.free[self.free_len - 1];
        let buffer = &mut self.buffers[usize::from(index)];
        let Some(frame) = buffer[NET_HEADER..].first_chunk_mut::<FRAME>() else { return };
        let Some(bytes) = build(frame) else { return };
        let bytes = u32::try_from(NET_HEADER + bytes.min(FRAME)).unwrap_or(0);
        let at = buffer.as_ptr().expose_provenance() as u64;
        // SAFETY: the device only reads this buffer.
        unsafe { self.queue.describe(index, at, bytes, 0, 0) };
        self.free_len -= 1;
        self.queue.submit(index);
        self.unannounced = true;
        self.frames += 1;
    }
}
