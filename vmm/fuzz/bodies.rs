//! The bodies of the fuzz targets, which `tests/hostile.rs` runs too, over pseudo-random inputs, with the stable compiler.
//!
//! A body may not panic, and what it does must be bounded by the length of its input. It gets a RAM of 16 MiB of which only the
//! first pages are interesting: rings and buffers are placed there so that the input can reach them.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm::console::ConsoleRing;
use vmm::dirty::DirtyBitmap;
use vmm::memory::Ram;
use vmm::serial::{IrqLine, SerialPort};
use vmm::virtio::balloon::Balloon;
use vmm::virtio::blk::{Blk, Overlay};
use vmm::virtio::net::Net;
use vmm::virtio::rng::Rng;
use vmm::virtio::vsock::Vsock;
use vmm::virtio::{Device, Resources, Transport};
use vmm_sys_util::eventfd::EventFd;
use wire::disk::OverlayLayout;
use wire::ids::Digest;
use wire::space::DiskSize;
use wire::state::{
    BalloonState, BlkState, ClockState, DisksState, IrqchipState, NetState, PitState, RngState, SerialState,
    ShapeState, StateArchive, VcpuState, VsockState,
};
use wire::units::RamSize;
use wire::vmm::{CONSOLE_MEMFD_BYTES, DiskSpec};

const RAM_BYTES: u64 = 16 << 20;
/// Where rings and buffers are, most of the time.
const ARENA_BYTES: u64 = 0x8000;

fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, bytes).expect("ftruncate");
    fd.into()
}

/// A source of small decisions: the input, and zeros after its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// An address: mostly in the arena, else just outside of RAM or anywhere.
    fn address(&mut self) -> u64 {
        let word = u64::from(self.word());
        match word >> 24 & 0xf {
            0 => word << 32 | word,
            1 => RAM_BYTES - word % 64,
            2 => u64::MAX - word % 4096,
            _ => word % ARENA_BYTES,
        }
    }
}

/// RAM, and the devices on it.
pub struct Fixture {
    ram: Ram,
    dirty: Arc<DirtyBitmap>,
    overlay: File,
    base: File,
    ram_file: File,
    listener: UnixListener,
    address: SocketAddr,
}

/// What is on the other side of a device.
struct Peer {
    tap: UnixDatagram,
    clients: Vec<UnixStream>,
}

const DISK_BYTES: u64 = 2 << 20;

impl Fixture {
    /// Maps the RAM; once for all inputs.
    pub fn new() -> Self {
        let size = RamSize::from_bytes(RAM_BYTES).expect("size");
        let pages = size.pages() + DISK_BYTES / 4096;
        let dirty = Arc::new(DirtyBitmap::new(&memfd(pages / 8), pages).expect("bitmap"));
        dirty.set_active(true);
        let ram_file = memfd(RAM_BYTES);
        let ram = Ram::new(&ram_file, size, &dirty).expect("ram");
        let layout = OverlayLayout::new(disk().size);
        let overlay = memfd(layout.file_bytes());
        overlay.write_all_at(&layout.header(disk().base), 0).expect("header");
        let mut name = [0; 16];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty()).expect("name");
        let address = SocketAddr::from_abstract_name(name).expect("name");
        let listener = UnixListener::bind_addr(&address).expect("listener");
        let base = memfd(DISK_BYTES / 2 + 512);
        Self { ram, dirty, overlay, base, ram_file, listener, address }
    }

    /// A disk, whatever was written to it before.
    fn blk(&self) -> Transport {
        let handle = |file: &File| file.try_clone().expect("handle");
        let overlay =
            Overlay::open(&disk(), handle(&self.overlay), Some(handle(&self.base))).expect("overlay");
        let (dirty, memory) = (Arc::clone(&self.dirty), Arc::clone(self.ram.memory()));
        let blk = Blk::new("fuzz", overlay, RAM_BYTES / 4096, dirty, memory).expect("io_uring");
        self.transport(Box::new(blk))
    }

    fn transport(&self, device: Box<dyn Device>) -> Transport {
        let resources = Resources::new(device.queue_sizes().len()).expect("events");
        Transport::new(device, Arc::clone(self.ram.memory()), resources)
    }

    /// A network interface, and the other end of its tap.
    fn net(&self) -> (Transport, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        theirs.set_nonblocking(true).expect("nonblocking");
        let tap = File::from(OwnedFd::from(ours));
        (self.transport(Box::new(Net::new(tap, [2, 0, 0, 0, 0, 1]))), theirs)
    }

    /// A driver that does anything: registers, rings, notifications, packets.
    pub fn virtio(&self, data: &[u8]) {
        let mut input = Input(data);
        self.ram.memory().write_slice(&[0; 0x8000], GuestAddress(0)).expect("arena");
        let (net, tap) = self.net();
        let mut transport = match input.byte() % 5 {
            0 => net,
            1 => self.transport(Box::new(Rng)),
            2 => {
                let listener = self.listener.try_clone().expect("descriptor");
                self.transport(Box::new(Vsock::new(Some(listener)).expect("vsock")))
            }
            3 => self.blk(),
            _ => self.transport(Box::new(Balloon::new(&self.ram_file, &self.ram).expect("balloon"))),
        };
        let mut peer = Peer { tap, clients: Vec::new() };
        if input.byte() & 3 != 0 {
            negotiate(&mut transport, &mut input);
        }
        while !input.is_empty() {
            self.step(&mut transport, &mut peer, &mut input);
        }
        // Whatever it did: a reset brings the device back.
        transport.write(0x70, &0u32.to_le_bytes());
        let mut status = [0; 4];
        transport.read(0x70, &mut status);
        assert_eq!(status, [0; 4]);
    }

    fn step(&self, transport: &mut Transport, peer: &mut Peer, input: &mut Input<'_>) {
        let memory = self.ram.memory();
        match input.byte() % 16 {
            0 => {
                let (offset, value) = (u64::from(input.byte()) * 4, input.word());
                transport.write(offset, &value.to_le_bytes());
            }
            1 => {
                let mut wide = [0; 8];
                let bytes = usize::from(input.byte() % 9);
                transport.read(input.address() % 0x1000, &mut wide[..bytes]);
            }
            2 => transport.write(input.address() % 0x1000, &[0xff; 8][..usize::from(input.byte() % 9)]),
            3 => {
                transport.quiesce();
                let saved = transport.save();
                transport.restore(&saved).expect("what was saved can be restored");
                transport.resume();
            }
            4 => {
                // A packet for the guest; for a disk, a request that is one but for its place and length.
                let (kind, sector) = (u64::from(input.byte() % 16), u64::from(input.word() % 5000));
                let _outside = memory.write_obj(kind.to_le(), GuestAddress(input.address()));
                let _outside = memory.write_obj(sector.to_le(), GuestAddress(input.address()));
                let packet = vec![input.byte(); usize::from(input.byte()) * 16];
                let _full = peer.tap.send(&packet);
                if transport.name() == "vsock" {
                    self.clients(peer, &packet, input.byte());
                }
            }
            5 => negotiate(transport, input),
            6 | 7 => {
                // An entry of a descriptor table: address, length, flags, next.
                let at = u64::from(input.byte()) * 16;
                let _outside = memory.write_obj(input.address().to_le(), GuestAddress(at));
                let length = if input.byte() & 7 == 0 { input.word() } else { input.word() % 2048 };
                let _outside = memory.write_obj(length.to_le(), GuestAddress(at + 8));
                let flags = u16::from(input.byte() & 7);
                let _outside = memory.write_obj(flags.to_le(), GuestAddress(at + 12));
                let _outside = memory.write_obj(u16::from(input.byte()).to_le(), GuestAddress(at + 14));
            }
            8 | 9 => {
                // A ring's entry or index.
                let _outside = memory.write_obj(input.word(), GuestAddress(input.address()));
            }
            10 => {
                let ring = ring_of(usize::from(input.byte() & 1), AVAIL);
                let _outside = memory.write_obj(u16::from(input.byte()).to_le(), GuestAddress(ring + 2));
            }
            11 => {
                let _more = transport.host_event();
            }
            _ => {
                let _more = transport.queue_event(usize::from(input.byte() % 5));
            }
        }
        // The other side of the tap takes what comes.
        let mut packet = [0; 64];
        while peer.tap.recv(&mut packet).is_ok() {}
        for client in &mut peer.clients {
            while client.read(&mut packet).is_ok_and(|bytes| bytes > 0) {}
        }
    }

    /// Clients come, talk and go; what the guest says to them is made likely.
    fn clients(&self, peer: &mut Peer, data: &[u8], choice: u8) {
        if choice & 1 == 1
            && peer.clients.len() < 8
            && let Ok(client) = UnixStream::connect_addr(&self.address)
        {
            client.set_nonblocking(true).expect("nonblocking");
            peer.clients.push(client);
        }
        for client in &mut peer.clients {
            let _full = client.write(data);
        }
        if choice & 6 == 6 {
            peer.clients.pop();
        }
        // A header in the arena: the guest answers whoever asked last, or anybody.
        let mut raw = [0; 44];
        let _inside = self.ram.memory().read_slice(&mut raw, GuestAddress(0x6000));
        let [from, to] = [raw[16..20].to_vec(), raw[20..24].to_vec()];
        raw[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        raw[16..20].copy_from_slice(&to);
        raw[20..24].copy_from_slice(&from);
        raw[24..28].copy_from_slice(&u32::from(choice & 0x38).to_le_bytes());
        raw[28..32].copy_from_slice(&[1, 0, choice % 9, 0]);
        self.ram.memory().write_slice(&raw, GuestAddress(0x6100)).expect("arena");
    }

    /// State archives: whole, damaged, and with components that are valid archives of impossible states.
    pub fn state(&self, data: &[u8]) {
        if let Ok(archive) = StateArchive::decode(data) {
            self.take_all(archive);
        }
        let mut input = Input(data);
        let mut archive = StateArchive::new(wire::ids::MachineId::from_u64(1));
        let (mut net, _peer) = self.net();
        negotiate(&mut net, &mut input);
        let mut virtio = net.save();
        let registers = &mut virtio.transport;
        while !input.is_empty() {
            let queue = usize::from(input.byte() & 3);
            match (input.byte() % 8, registers.queues.get_mut(queue)) {
                (0, _) => registers.status = input.word(),
                (1, _) => registers.driver_features = input.address(),
                (2, Some(queue)) => queue.size = u16::from(input.byte()) << (input.byte() & 8),
                (3, Some(queue)) => queue.ready = input.byte() & 1 == 1,
                (4, Some(queue)) => queue.desc_table = input.address(),
                (5, Some(queue)) => queue.avail_ring = input.address(),
                (6, Some(queue)) => queue.used_ring = input.address(),
                (7, Some(queue)) => queue.next_avail = u16::from(input.byte()),
                _ => {
                    registers.queues.pop();
                }
            }
        }
        if net.restore(&virtio).is_ok() {
            net.resume();
            for queue in 0..2 {
                let _more = net.queue_event(queue);
            }
            let _more = net.host_event();
        }
        archive.add(0, &NetState { virtio, mac: [0; 6] }).expect("archive");
        let mut bytes = archive.encode().expect("encode");
        for chunk in data.chunks(3) {
            if let [low, high, value] = chunk {
                let at = usize::from(u16::from_le_bytes([*low, *high])) % bytes.len();
                bytes[at] ^= value;
            }
        }
        if let Ok(archive) = StateArchive::decode(&bytes) {
            self.take_all(archive);
        }
    }

    fn take_all(&self, mut archive: StateArchive) {
        let _one = archive.take::<ShapeState>(0);
        let _one = archive.take::<VcpuState>(0);
        let _one = archive.take::<IrqchipState>(0);
        let _one = archive.take::<PitState>(0);
        let _one = archive.take::<ClockState>(0);
        if let Ok(serial) = archive.take::<SerialState>(0) {
            let line = IrqLine::new(EventFd::new(libc::EFD_NONBLOCK).expect("event"));
            let console = ConsoleRing::new(&memfd(CONSOLE_MEMFD_BYTES)).expect("console");
            let _refused = SerialPort::new(line, console).restore(&serial);
        }
        if let Ok(state) = archive.take::<NetState>(0) {
            let _refused = self.net().0.restore(&state.virtio);
        }
        let _one = archive.take::<DisksState>(0);
        if let Ok(state) = archive.take::<BlkState>(0) {
            let _refused = self.blk().restore(&state.virtio);
        }
        if let Ok(state) = archive.take::<RngState>(0) {
            let _refused = self.transport(Box::new(Rng)).restore(&state.virtio);
        }
        if let Ok(state) = archive.take::<VsockState>(0) {
            let _refused = self.transport(Box::new(Vsock::new(None).expect("vsock"))).restore(&state.virtio);
        }
        if let Ok(state) = archive.take::<BalloonState>(0) {
            let balloon = Balloon::new(&self.ram_file, &self.ram).expect("balloon");
            let _refused = self.transport(Box::new(balloon)).restore(&state.virtio);
        }
        let _left_over = archive.finish();
    }
}

fn disk() -> DiskSpec {
    let size = DiskSize::from_bytes(DISK_BYTES).expect("size");
    DiskSpec { name: "fuzz".parse().expect("name"), size, base: Some(Digest([1; 32])) }
}

const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// Where ring `which` of queue `queue` lies when it was set up by [`negotiate`].
fn ring_of(queue: usize, which: u64) -> u64 {
    which + if queue & 1 == 0 { 0 } else { 0x4000 }
}

/// What a driver that keeps to the rules does, but for one register now and then.
fn negotiate(transport: &mut Transport, input: &mut Input<'_>) {
    let oddity = input.byte();
    let size = 1u32 << (input.byte() & 7);
    let mut offered = [0; 4];
    transport.write(0x14, &[0; 4]);
    transport.read(0x10, &mut offered);
    let features = u32::from_le_bytes(offered) & if oddity & 1 == 0 { 1 << 5 } else { input.word() };
    let mut write = |offset: u64, value: u32| {
        let odd = u64::from(oddity) * 4 == offset;
        transport.write(offset, &(if odd { !value } else { value }).to_le_bytes());
    };
    for (offset, value) in
        [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11)]
    {
        write(offset, value);
    }
    for queue in 0..5u32 {
        let base = |which| u32::try_from(ring_of(usize::try_from(queue).unwrap_or(0), which)).unwrap_or(0);
        let registers = [
            (0x30, queue),
            (0x38, size),
            (0x80, base(DESCRIPTORS)),
            (0x90, base(AVAIL)),
            (0xa0, base(USED)),
            (0x44, 1),
        ];
        for (offset, value) in registers {
            write(offset, value);
        }
    }
    write(0x70, 15);
}
