//! Where a guest's port and memory-mapped accesses go. Called on vCPU threads.
//!
//! What belongs to no device is harmless: reads give all ones, as an empty bus does, and writes are dropped. The locks are
//! taken by vCPU threads and the event loop for one register access or one bounded batch of queue entries at a time.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wire::vmm::GuestEnd;

use crate::platform::{self, Platform};
use crate::serial::{self, SerialPort};
use crate::virtio::balloon::Gauge;
use crate::virtio::{MMIO_BASE, MMIO_STRIDE, Transport};

/// The devices.
pub struct Bus {
    serial: Mutex<SerialPort>,
    platform: Mutex<Platform>,
    /// By slot: the device at [`MMIO_BASE`] plus slot times [`MMIO_STRIDE`].
    transports: Vec<Arc<Mutex<Transport>>>,
    balloon: Gauge,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bus({} virtio devices)", self.transports.len())
    }
}

/// A lock whose holder panicked is taken all the same: each access leaves a device in a state it can go on from.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with these devices.
    pub const fn new(
        serial: SerialPort,
        platform: Platform,
        transports: Vec<Arc<Mutex<Transport>>>,
        balloon: Gauge,
    ) -> Self {
        Self { serial: Mutex::new(serial), platform: Mutex::new(platform), transports, balloon }
    }

    /// What the guest says of its memory.
    pub const fn balloon(&self) -> &Gauge {
        &self.balloon
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        lock(&self.serial)
    }

    /// The platform's registers.
    pub fn platform(&self) -> MutexGuard<'_, Platform> {
        lock(&self.platform)
    }

    /// The virtio device in `slot`.
    pub fn transport(&self, slot: usize) -> Option<MutexGuard<'_, Transport>> {
        self.transports.get(slot).map(|transport| lock(transport))
    }

    /// Number of virtio devices.
    pub const fn slots(&self) -> usize {
        self.transports.len()
    }

    /// A write to a port; the end of the guest if it is one.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestEnd> {
        if let Some(offset) = serial_offset(port) {
            let mut chip = self.serial();
            // A string instruction gives several bytes, all for the same register.
            for &byte in data {
                chip.write(offset, byte);
            }
            return None;
        }
        platform::end_of(port, data)
    }

    /// A read from a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match serial_offset(port) {
            Some(offset) => {
                let mut chip = self.serial();
                data.fill_with(|| chip.read(offset));
            }
            None => {
                data.fill(0xff);
                if platform::is_readable(port) {
                    self.platform().read(port, data);
                }
            }
        }
    }

    /// A read from an address that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((mut transport, offset)) = self.decode(address) {
            transport.read(offset, data);
        }
    }

    /// A write to an address that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((mut transport, offset)) = self.decode(address) {
            transport.write(offset, data);
        }
    }

    fn decode(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let slot = usize::try_from(offset / MMIO_STRIDE).ok()?;
        Some((self.transport(slot)?, offset % MMIO_STRIDE))
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(serial::PORT).filter(|&offset| offset < serial::PORTS)?;
    u8::try_from(offset).ok()
}
