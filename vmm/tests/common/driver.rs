//! A virtio driver that is driven by hand, without KVM.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm::dirty::DirtyBitmap;
use vmm::memory::{GuestMemory, Ram};
use vmm::virtio::{Device, Resources, Transport};
use wire::units::RamSize;

pub const RAM: u64 = 16 << 20;
pub const NEEDS_RESET: u32 = 64;
pub const SIZE: u16 = 8;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd.into()
}

/// A driver with a device of its own.
pub struct Driver {
    pub ram: Ram,
    pub dirty: Arc<DirtyBitmap>,
    pub transport: Transport,
    pub made_available: [u16; 5],
    pub ram_file: File,
}

/// First page of a queue's rings: descriptors, available ring and used ring, a page each.
pub fn rings(queue: u16) -> u64 {
    0x1_0000 + u64::from(queue) * 0x1_0000
}

impl Driver {
    pub fn new(device: Box<dyn Device>) -> Self {
        Self::with(0, |_, _| device)
    }

    /// A driver of what `make` makes over its memory, and a dirty bitmap with room for so many pages besides RAM.
    pub fn with(
        pages: u64,
        make: impl FnOnce(&Arc<GuestMemory>, &Arc<DirtyBitmap>) -> Box<dyn Device>,
    ) -> Self {
        Self::made(pages, |ram, _, dirty| make(ram.memory(), dirty))
    }

    /// For a device that is made for the RAM and its memfd.
    pub fn with_file(make: impl FnOnce(&Ram, &File) -> Box<dyn Device>) -> Self {
        Self::made(0, |ram, file, _| make(ram, file))
    }

    fn made(pages: u64, make: impl FnOnce(&Ram, &File, &Arc<DirtyBitmap>) -> Box<dyn Device>) -> Self {
        let size = RamSize::from_bytes(RAM).unwrap();
        let pages = size.pages() + pages;
        let dirty = Arc::new(DirtyBitmap::new(&memfd(pages / 8), pages).unwrap());
        let ram_file = memfd(RAM);
        let ram = Ram::new(&ram_file, size, &dirty).unwrap();
        let device = make(&ram, &ram_file, &dirty);
        let resources = Resources::new(device.queue_sizes().len()).unwrap();
        let transport = Transport::new(device, Arc::clone(ram.memory()), resources);
        Self { ram, dirty, transport, made_available: [0; 5], ram_file }
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut raw = [0xff; 4];
        self.transport.read(offset, &mut raw);
        u32::from_le_bytes(raw)
    }

    pub fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub fn features(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        let [low, high] = [features & 0xffff_ffff, features >> 32].map(|half| u32::try_from(half).unwrap());
        for (sel, half) in [(0, low), (1, high)] {
            self.write(0x24, sel);
            self.write(0x20, half);
        }
        self.write(0x70, 11);
    }

    pub fn queue(&mut self, queue: u16, at: u64) {
        let at = u32::try_from(at).unwrap();
        let registers = [
            (0x30, queue.into()),
            (0x38, SIZE.into()),
            (0x80, at),
            (0x90, at.wrapping_add(0x1000)),
            (0xa0, at.wrapping_add(0x2000)),
            (0x44, 1),
        ];
        for (offset, value) in registers {
            self.write(offset, value);
        }
    }

    /// Sets everything up by the rules.
    pub fn start(self, queues: u16) -> Self {
        self.start_with(queues, 0)
    }

    /// As [`Driver::start`], with some of the device's features.
    pub fn start_with(mut self, queues: u16, features: u64) -> Self {
        self.features(1 << 32 | features);
        assert_eq!(self.status(), 11);
        for queue in 0..queues {
            self.queue(queue, rings(queue));
        }
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
        self
    }

    pub fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn descriptor(&self, queue: u16, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let at = rings(queue) + 16 * u64::from(index);
        self.put(at, buffer.0.to_le_bytes());
        self.put(at + 8, buffer.1.to_le_bytes());
        self.put(at + 12, flags.to_le_bytes());
        self.put(at + 14, next.to_le_bytes());
    }

    /// Makes the chain that begins at descriptor `head` available.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let count = &mut self.made_available[usize::from(queue)];
        let at = rings(queue) + 0x1000 + 4 + 2 * u64::from(*count % SIZE);
        *count += 1;
        let count = *count;
        self.put(at, head.to_le_bytes());
        self.set_index(queue, count);
    }

    pub fn set_index(&self, queue: u16, index: u16) {
        self.put(rings(queue) + 0x1000 + 2, index.to_le_bytes());
    }

    pub fn notify(&mut self, queue: u16) -> bool {
        self.transport.queue_event(queue.into())
    }

    /// The used ring's index, and its last element: head and length.
    pub fn used(&self, queue: u16) -> (u16, u32, u32) {
        let at = rings(queue) + 0x2000;
        let memory = self.ram.memory();
        let index = u16::from_le(memory.read_obj(GuestAddress(at + 2)).unwrap());
        let last = at + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        let word = |at| u32::from_le(memory.read_obj(GuestAddress(at)).unwrap());
        (index, word(last), word(last + 4))
    }

    pub fn interrupts(&self) -> u64 {
        self.transport.resources().interrupt.read().unwrap_or(0)
    }
}
