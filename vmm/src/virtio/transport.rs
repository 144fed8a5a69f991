//! The virtio-mmio transport, version 2: registers, feature negotiation, queue set-up, status, interrupts.
//!
//! ```text
//!  reset --ACKNOWLEDGE, DRIVER--> features --FEATURES_OK--> queues --DRIVER_OK--> works --rule broken--> NEEDS_RESET
//!    ^-----------------------------------------status = 0----------------------------------------------------'
//! ```
//!
//! Writes that do not belong in the current state are ignored, as the specification lets a device do. Queues are notified through
//! ioeventfds, interrupts raised through an irqfd; both bypass this file's registers.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueState as RawQueue, QueueT};
use vmm_sys_util::eventfd::EventFd;
use wire::state::{QueueState, TransportState, VirtioState};

use super::{Device, F_VERSION_1, Progress, queue};
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4853_414d;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const STATUS_BITS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

const CONFIG: u64 = 0x100;

/// A saved state that does not fit the device.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The driver uses features that this device does not offer.
    #[error("the driver of `{device}` uses features {missing:#x}, which this release does not offer")]
    Features {
        /// The device.
        device: &'static str,
        /// The features.
        missing: u64,
    },
    /// Another number of queues.
    #[error("`{device}` has {want} queues, its saved state {have}")]
    Queues {
        /// The device.
        device: &'static str,
        /// In the state.
        have: usize,
        /// Here.
        want: usize,
    },
    /// A queue that cannot be.
    #[error("queue {index} of `{device}` has an impossible saved state")]
    Queue {
        /// The device.
        device: &'static str,
        /// Which of its queues.
        index: usize,
    },
}

/// What connects a transport to the guest and the event loop.
#[derive(Debug)]
pub struct Resources {
    /// Raises the device's interrupt.
    pub interrupt: EventFd,
    /// One per queue, written when the driver notifies it.
    pub notify: Vec<EventFd>,
}

impl Resources {
    /// Event descriptors for a device with `queues` queues.
    ///
    /// # Errors
    /// The operating system's, when it has no descriptors left.
    pub fn new(queues: usize) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self { interrupt: event()?, notify: (0..queues).map(|_| event()).collect::<Result<_, _>>()? })
    }
}

/// A queue's registers and, once it is ready, the queue.
struct QueueSlot {
    size_max: u16,
    registers: RawQueue,
}

/// A device's transport.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Arc<GuestMemory>,
    resources: Resources,
    status: u32,
    interrupt_status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    config_generation: u32,
    slots: Vec<QueueSlot>,
    /// By queue number; `None` is not ready.
    queues: Vec<Option<Queue>>,
}

fn reset_queue(size_max: u16) -> RawQueue {
    RawQueue { max_size: size_max, size: size_max, ..Default::default() }
}

fn set_low(word: &mut u64, low: u32) {
    *word = *word & !0xffff_ffff | u64::from(low);
}

fn set_high(word: &mut u64, high: u32) {
    *word = *word & 0xffff_ffff | u64::from(high) << 32;
}

/// Half `sel` of 64 feature bits; none beyond.
const fn half(features: u64, sel: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match sel {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

impl Transport {
    /// A transport for `device` after power-on.
    pub fn new(device: Box<dyn Device>, memory: Arc<GuestMemory>, resources: Resources) -> Self {
        let slot = |&size_max| QueueSlot { size_max, registers: reset_queue(size_max) };
        let slots: Vec<_> = device.queue_sizes().iter().map(slot).collect();
        let queues = slots.iter().map(|_| None).collect();
        Self {
            device,
            memory,
            resources,
            status: 0,
            interrupt_status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            config_generation: 0,
            slots,
            queues,
        }
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.device.name()
    }

    /// The events that connect it.
    pub const fn resources(&self) -> &Resources {
        &self.resources
    }

    /// The descriptor that makes work for the device.
    pub fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.host_fd()
    }

    /// Whether [`Transport::host_event`] can do anything now.
    pub fn wants_host_event(&self) -> bool {
        self.works() && self.device.wants_host_event()
    }

    /// Whether driver and device have agreed to work, and neither has given up.
    const fn works(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    /// The driver notified queue `index`. True when work is left.
    pub fn queue_event(&mut self, index: usize) -> bool {
        if !self.works() || !matches!(self.queues.get(index), Some(Some(_))) {
            return false;
        }
        let done = self.device.notified(index, &mut self.queues, &self.memory);
        self.conclude(done)
    }

    /// The device's descriptor is readable. True when work is left.
    pub fn host_event(&mut self) -> bool {
        if !self.wants_host_event() {
            return false;
        }
        let done = self.device.host_event(&mut self.queues, &self.memory);
        self.conclude(done)
    }

    /// The machine pauses: nothing of the device is under way when this returns.
    pub fn quiesce(&mut self) {
        if self.works() {
            let done = self.device.quiesce(&mut self.queues, &self.memory);
            // What is still in the queues is seen again when the guest runs on.
            let _more = self.conclude(done);
        }
    }

    fn conclude(&mut self, done: Result<Progress, queue::QueueError>) -> bool {
        match done {
            Ok(progress) => {
                if progress.used {
                    self.raise(INTERRUPT_USED);
                }
                progress.more
            }
            Err(_) => {
                self.give_up();
                false
            }
        }
    }

    /// The driver broke the rules: the device stops until it is reset.
    fn give_up(&mut self) {
        self.status |= NEEDS_RESET;
        if self.status & DRIVER_OK != 0 {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    fn raise(&mut self, why: u32) {
        self.interrupt_status |= why;
        // Fails only when the counter is full, and then the interrupt is pending anyway.
        let _pending = self.resources.interrupt.write(1);
    }

    /// After a restore: what may have been on its way when the source paused (a notification not yet seen, an interrupt
    /// not yet delivered) is done once more. Drivers take both as spurious when they were not lost.
    pub fn resume(&mut self) {
        if self.interrupt_status != 0 {
            let _pending = self.resources.interrupt.write(1);
        }
        if self.works() {
            for notify in &self.resources.notify {
                let _pending = notify.write(1);
            }
        }
    }

    /// The guest reads. `data` is filled with ones beforehand.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            data.fill(0);
            if let Ok(offset) = usize::try_from(offset) {
                self.device.read_config(offset, data);
            }
            return;
        }
        if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let slot = usize::try_from(self.queue_sel).ok().and_then(|at| self.slots.get(at));
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.id(),
            0x00c => VENDOR,
            0x010 => half(self.features(), self.device_features_sel),
            0x034 => slot.map_or(0, |slot| u32::from(slot.size_max)),
            0x044 => slot.map_or(0, |slot| u32::from(slot.registers.ready)),
            0x060 => self.interrupt_status,
            0x070 => self.status,
            // There are no shared memory regions: length and address are all ones.
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.config_generation,
            _ => 0,
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // Configuration space is read-only in all our devices, and registers are 32 bits wide.
        let Ok(raw) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(raw);
        match offset {
            0x014 => self.device_features_sel = value,
            0x020 if self.negotiating() => match self.driver_features_sel {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            },
            0x024 => self.driver_features_sel = value,
            0x030 => self.queue_sel = value,
            0x038..=0x044 | 0x080..=0x0a4 => self.write_queue(offset, value),
            0x050 => {
                if let Some(notify) = usize::try_from(value).ok().and_then(|at| self.resources.notify.get(at))
                {
                    let _pending = notify.write(1);
                }
            }
            0x064 => self.interrupt_status &= !value,
            0x070 => self.write_status(value),
            _ => {}
        }
    }

    const fn negotiating(&self) -> bool {
        self.status & (DRIVER | FEATURES_OK) == DRIVER
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & STATUS_BITS & !self.status;
        if added & FEATURES_OK != 0 {
            let known = self.driver_features & !self.features() == 0;
            if !known || self.driver_features & F_VERSION_1 == 0 {
                // Left unset, which tells the driver that its features are not accepted.
                self.status |= added & !(FEATURES_OK | DRIVER_OK);
                return;
            }
        }
        if added & DRIVER_OK != 0 && (self.status | added) & FEATURES_OK == 0 {
            self.give_up();
            return;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 {
            // Buffers that the driver made available before; and the event loop looks at the host's side again.
            self.resume();
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.status = 0;
        self.interrupt_status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for slot in &mut self.slots {
            slot.registers = reset_queue(slot.size_max);
        }
        self.queues.fill_with(|| None);
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let Ok(index) = usize::try_from(self.queue_sel) else { return };
        let configurable = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        let Some(slot) = self.slots.get_mut(index) else { return };
        let registers = &mut slot.registers;
        if offset == 0x044 {
            match value {
                0 => {
                    registers.ready = false;
                    self.queues[index] = None;
                }
                1 if configurable && !registers.ready => self.make_ready(index),
                _ => {}
            }
            return;
        }
        if !configurable || registers.ready {
            return;
        }
        match offset {
            0x038 => registers.size = u16::try_from(value).unwrap_or(0),
            0x080 => set_low(&mut registers.desc_table, value),
            0x084 => set_high(&mut registers.desc_table, value),
            0x090 => set_low(&mut registers.avail_ring, value),
            0x094 => set_high(&mut registers.avail_ring, value),
            0x0a0 => set_low(&mut registers.used_ring, value),
            0x0a4 => set_high(&mut registers.used_ring, value),
            _ => {}
        }
    }

    /// Makes a queue of its registers, if they describe one: a power of two in size, aligned, within RAM.
    fn make_ready(&mut self, index: usize) {
        let registers = RawQueue { ready: true, next_avail: 0, next_used: 0, ..self.slots[index].registers };
        match Queue::try_from(registers) {
            Ok(queue) if queue.is_valid(&*self.memory) => {
                self.slots[index].registers.ready = true;
                self.queues[index] = Some(queue);
            }
            _ => self.give_up(),
        }
    }

    /// Its state.
    pub fn save(&self) -> VirtioState {
        let queue = |(slot, queue): (&QueueSlot, &Option<Queue>)| {
            let raw = queue.as_ref().map_or(slot.registers, Queue::state);
            QueueState {
                size: raw.size,
                ready: raw.ready,
                desc_table: raw.desc_table,
                avail_ring: raw.avail_ring,
                used_ring: raw.used_ring,
                next_avail: raw.next_avail,
                next_used: raw.next_used,
            }
        };
        let transport = TransportState {
            status: self.status,
            interrupt_status: self.interrupt_status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            config_generation: self.config_generation,
            queues: self.slots.iter().zip(&self.queues).map(queue).collect(),
        };
        VirtioState { transport, device_features: self.features() }
    }

    /// Takes on a saved state. [`Transport::resume`] is due before the guest runs.
    ///
    /// # Errors
    /// [`TransportError`] when the state does not fit; the transport is then reset.
    pub fn restore(&mut self, state: &VirtioState) -> Result<(), TransportError> {
        self.reset();
        let device = self.device.name();
        let saved = &state.transport;
        let missing = saved.driver_features & !self.features();
        if saved.status & FEATURES_OK != 0 && missing != 0 {
            return Err(TransportError::Features { device, missing });
        }
        if saved.queues.len() != self.slots.len() {
            return Err(TransportError::Queues { device, have: saved.queues.len(), want: self.slots.len() });
        }
        for (index, queue) in saved.queues.iter().enumerate() {
            if self.restore_queue(index, queue).is_none() {
                self.reset();
                return Err(TransportError::Queue { device, index });
            }
        }
        self.status = saved.status & (STATUS_BITS | NEEDS_RESET);
        self.interrupt_status = saved.interrupt_status;
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = saved.driver_features;
        self.queue_sel = saved.queue_sel;
        self.config_generation = saved.config_generation;
        self.device.restored();
        Ok(())
    }

    fn restore_queue(&mut self, index: usize, saved: &QueueState) -> Option<()> {
        let slot = &mut self.slots[index];
        let raw = RawQueue {
            max_size: slot.size_max,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: false,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        };
        slot.registers = raw;
        if saved.ready {
            let queue = Queue::try_from(raw).ok().filter(|queue| queue.is_valid(&*self.memory))?;
            self.queues[index] = Some(queue);
        }
        Some(())
    }
}
