//! The register window of a virtio-mmio device, and the handshake that brings it up.
//!
//! Every access is an exit, so after the handshake only two registers are touched: notify, and interrupt acknowledge.

use super::queue::{Queue, Rings};
use crate::memory::frames::Frames;
use crate::memory::window::Window;
use crate::{apic, trap};
use guest_core::cmdline::DeviceWindow;

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;
/// The least a window has.
const WINDOW_BYTES: u64 = 0x200;

const MAGIC_VALUE: u32 = 0x7472_6976;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network.
    Net,
    /// Block.
    Blk,
    /// Entropy.
    Rng,
}

/// A device that was reset and is being, or has been, brought up.
pub struct Device {
    registers: Window,
    gsi: u32,
    vector: u8,
    interrupts_seen: u32,
}

impl Device {
    /// Looks for a device that we drive; resets it.
    #[must_use]
    pub fn probe(window: DeviceWindow, index: u8) -> Option<(Kind, Self)> {
        // SAFETY: given on the command line as device registers, below 4 GiB and so mapped.
        let registers = unsafe { Window::new(window.base, WINDOW_BYTES) };
        let device = Self { registers, gsi: window.gsi, vector: trap::DEVICES + index, interrupts_seen: 0 };
        if device.read(MAGIC) != MAGIC_VALUE || device.read(VERSION) != 2 {
            return None;
        }
        let kind = match device.read(DEVICE_ID) {
            1 => Kind::Net,
            2 => Kind::Blk,
            4 => Kind::Rng,
            _ => return None,
        };
        device.write(STATUS, 0);
        Some((kind, device))
    }

    /// Agrees on features: those of `wanted` that the device has, and version 1. `None` if the device refuses.
    pub fn negotiate(&self, wanted: u64) -> Option<u64> {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.write(DEVICE_FEATURES_SEL, 0);
        let low = self.read(DEVICE_FEATURES);
        self.write(DEVICE_FEATURES_SEL, 1);
        let offered = u64::from(low) | u64::from(self.read(DEVICE_FEATURES)) << 32;
        let agreed = offered & (wanted | FEATURE_VERSION_1);
        let [b0, b1, b2, b3, b4, b5, b6, b7] = agreed.to_le_bytes();
        self.write(DRIVER_FEATURES_SEL, 0);
        self.write(DRIVER_FEATURES, u32::from_le_bytes([b0, b1, b2, b3]));
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, u32::from_le_bytes([b4, b5, b6, b7]));
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let accepted = self.read(STATUS) & FEATURES_OK != 0;
        (accepted && agreed & FEATURE_VERSION_1 != 0).then_some(agreed)
    }

    /// Sets up a queue of at most `size` entries (a power of two). `None` if the device lacks it.
    pub fn queue(&self, index: u32, size: u16, frames: &mut Frames) -> Option<Queue> {
        self.write(QUEUE_SEL, index);
        let max = u16::try_from(self.read(QUEUE_NUM_MAX)).unwrap_or(u16::MAX);
        if max == 0 || self.read(QUEUE_READY) != 0 {
            return None;
        }
        let size = if max >= size { size } else { 1 << max.ilog2() };
        let rings = Rings::new(size, frames);
        self.write(QUEUE_NUM, u32::from(size));
        self.write_address(QUEUE_DESC, rings.descriptors.at());
        self.write_address(QUEUE_DRIVER, rings.available.at());
        self.write_address(QUEUE_DEVICE, rings.used.at());
        self.write(QUEUE_READY, 1);
        Some(Queue::new(rings, size))
    }

    /// Ends the handshake; interrupts arrive from now on.
    pub fn start(&self) {
        apic::route(self.gsi, self.vector);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Tells the device that a queue has something for it.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Acknowledges interrupts that arrived since the last call. To be called before looking at the queues.
    pub fn acknowledge(&mut self) {
        let seen = trap::count(self.vector);
        if seen != self.interrupts_seen {
            self.interrupts_seen = seen;
            // Without asking which: a used buffer and a changed configuration are treated alike, and asking is an exit more.
            self.write(INTERRUPT_ACK, 3);
        }
    }

    /// A byte of the device's configuration.
    #[must_use]
    pub fn config8(&self, offset: u64) -> u8 {
        self.registers.read(CONFIG + offset)
    }

    /// A word of the device's configuration.
    #[must_use]
    pub fn config32(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    fn write_address(&self, register: u64, address: u64) {
        let [b0, b1, b2, b3, b4, b5, b6, b7] = address.to_le_bytes();
        self.write(register, u32::from_le_bytes([b0, b1, b2, b3]));
        self.write(register + 4, u32::from_le_bytes([b4, b5, b6, b7]));
    }

    fn read(&self, register: u64) -> u32 {
        self.registers.read(register)
    }

    fn write(&self, register: u64, value: u32) {
        self.registers.write(register, value);
    }
}
