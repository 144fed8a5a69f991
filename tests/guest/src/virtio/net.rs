//! virtio-net: one receive and one transmit queue, whole frames, no offloads.
//!
//! Frames are copied out of and into the buffers that the device sees, which costs less than an exit by far and
//! leaves nothing that changes under a reader. Without a free transmit buffer nothing is taken in either, so the peer's TCP slows
//! down and nothing is lost.

use super::mmio::Device;
use super::queue::{DEVICE_WRITES, Queue};
use crate::memory::frames::Frames;
use crate::memory::window::Window;
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
    buffers: Window,
    /// Buffers given back since the device was last told.
    unannounced: u16,
    /// Frames received.
    pub frames: u64,
}

/// The transmit queue.
pub struct Transmitter {
    queue: Queue,
    buffers: Window,
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
        let buffers = frames.share(usize::from(queue.size()) * BUFFER);
        for index in 0..queue.size() {
            queue.describe(index, &buffer(&buffers, index), BUFFER_BYTES, DEVICE_WRITES, 0);
            queue.submit(index);
        }
        Some(Self { queue, buffers, unannounced: 0, frames: 0 })
    }

    /// Copies out the next received frame; its length.
    pub fn receive(&mut self, frame: &mut [u8; FRAME]) -> Option<usize> {
        let (index, bytes) = self.queue.take_used()?;
        let bytes = usize::try_from(bytes).unwrap_or(0).saturating_sub(NET_HEADER).min(FRAME);
        buffer(&self.buffers, index).copy_to(NET_HEADER as u64, &mut frame[..bytes]);
        self.queue.submit(index);
        self.unannounced += 1;
        self.frames += 1;
        Some(bytes)
    }
}

impl Transmitter {
    fn new(device: &Device, frames: &mut Frames) -> Option<Self> {
        let mut queue = device.queue(TX, QUEUE_SIZE, frames)?;
        queue.set_interrupts(false);
        let buffers = frames.share(usize::from(queue.size()) * BUFFER);
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
            if self.free_len < usize::from(self.queue.size()) {
                self.free[self.free_len] = index;
                self.free_len += 1;
            }
        }
        self.free_len > 0
    }

    /// Sends a frame of at most [`FRAME`] bytes; drops it if no buffer is free.
    pub fn send(&mut self, frame: &[u8]) {
        if !self.can_send() {
            return;
        }
        self.free_len -= 1;
        let index = self.free[self.free_len];
        let frame = &frame[..frame.len().min(FRAME)];
        let buffer = buffer(&self.buffers, index);
        // The header before the frame was zero from the start and stays so.
        buffer.copy_from(NET_HEADER as u64, frame);
        let bytes = u32::try_from(NET_HEADER + frame.len()).unwrap_or(0);
        self.queue.describe(index, &buffer, bytes, 0, 0);
        self.queue.submit(index);
        self.unannounced = true;
        self.frames += 1;
    }
}

fn buffer(buffers: &Window, index: u16) -> Window {
    buffers.part(u64::from(index) * u64::from(BUFFER_BYTES), u64::from(BUFFER_BYTES))
}
