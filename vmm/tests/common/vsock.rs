//! A guest of a virtio-vsock device, driven by hand, with clients on the other side.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm::virtio::vsock::Vsock;
use wire::vmm::VSOCK_OPEN;

use super::driver::{Driver, WRITE, rings};

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

pub const TO_GUEST: u16 = 0;
pub const FROM_GUEST: u16 = 1;
pub const EVENTS: u16 = 2;
/// Buffers of each queue: eight of 8 KiB.
pub const BUFFER_BYTES: u64 = 0x2000;
/// What the device buffers for a client.
pub const DEVICE_BUFFER: usize = 128 << 10;

pub fn buffer(queue: u16, index: u16) -> u64 {
    0x10_0000 + u64::from(queue) * 0x2_0000 + u64::from(index) * BUFFER_BYTES
}

/// A packet as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub host_port: u32,
    pub guest_port: u32,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub data: Vec<u8>,
}

pub struct Guest {
    pub driver: Driver,
    pub socket: PathBuf,
    pub dir: tempfile::TempDir,
    pub seen: u16,
    /// What every packet of the guest says about its buffer.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

pub fn device() -> (Vsock, PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    (Vsock::new(Some(listener)).unwrap(), socket, dir)
}

impl Guest {
    /// With all receive and event buffers on offer.
    pub fn start() -> Self {
        let (vsock, socket, dir) = device();
        let driver = Driver::new(Box::new(vsock)).start(3);
        let mut guest = Self { driver, socket, dir, seen: 0, buf_alloc: 256 << 10, fwd_cnt: 0 };
        for index in 0..8 {
            guest.offer(TO_GUEST, index, 0x2000);
        }
        for index in 0..4 {
            guest.offer(EVENTS, index, 8);
        }
        guest
    }

    pub fn offer(&mut self, queue: u16, index: u16, bytes: u32) {
        self.driver.descriptor(queue, index, (buffer(queue, index), bytes), WRITE, 0);
        self.driver.offer(queue, index);
    }

    pub fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.socket).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client
    }

    /// What the event loop does as long as there is something to do.
    pub fn serve(&mut self) {
        loop {
            let Some(fd) = self.driver.transport.host_fd() else { return };
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut fds, Some(&at_once)).unwrap() == 0 {
                return;
            }
            self.driver.transport.host_event();
        }
    }

    /// The next packet for the guest, whose buffer is offered again at once.
    pub fn next(&mut self) -> Option<Packet> {
        self.serve();
        let packet = self.peek()?;
        let index = (self.seen - 1) % 8;
        let at = rings(TO_GUEST) + 0x2000 + 4 + 8 * u64::from(index);
        let head: u32 = self.driver.ram.memory().read_obj(GuestAddress(at)).unwrap();
        self.offer(TO_GUEST, u16::try_from(head).unwrap(), 0x2000);
        self.driver.notify(TO_GUEST);
        Some(packet)
    }

    /// As `next`, but keeps the buffer.
    pub fn peek(&mut self) -> Option<Packet> {
        let memory = self.driver.ram.memory();
        if self.driver.used(TO_GUEST).0 == self.seen {
            return None;
        }
        let at = rings(TO_GUEST) + 0x2000 + 4 + 8 * u64::from(self.seen % 8);
        self.seen += 1;
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let bytes: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut raw = vec![0; usize::try_from(bytes).unwrap()];
        let from = buffer(TO_GUEST, u16::try_from(head).unwrap());
        memory.read_slice(&mut raw, GuestAddress(from)).unwrap();
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(raw[at..at + 2].try_into().unwrap());
        assert_eq!((word(0), word(4), word(8), word(12)), (2, 0, 3, 0), "addresses");
        assert_eq!(half(28), 1, "stream");
        assert_eq!(usize::try_from(word(24)).unwrap(), raw.len() - 44);
        Some(Packet {
            host_port: word(16),
            guest_port: word(20),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: raw[44..].to_vec(),
        })
    }

    pub fn expect(&mut self, op: u16) -> Packet {
        let packet = self.next().unwrap_or_else(|| panic!("operation {op} was expected, nothing came"));
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    pub fn raw(&self, ports: (u32, u32), kind_op: (u16, u16), flags: u32, data: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        raw.extend(3u64.to_le_bytes());
        raw.extend(2u64.to_le_bytes());
        raw.extend(ports.1.to_le_bytes());
        raw.extend(ports.0.to_le_bytes());
        raw.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        raw.extend(kind_op.0.to_le_bytes());
        raw.extend(kind_op.1.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(self.buf_alloc.to_le_bytes());
        raw.extend(self.fwd_cnt.to_le_bytes());
        raw.extend(data);
        raw
    }

    /// Sends a chain of one descriptor.
    pub fn send_raw(&mut self, raw: &[u8]) {
        let slot = self.driver.made_available[1] % 8;
        let at = 0x20_0000 + u64::from(slot) * 0x2_0000;
        self.driver.ram.memory().write_slice(raw, GuestAddress(at)).unwrap();
        self.driver.descriptor(FROM_GUEST, slot, (at, u32::try_from(raw.len()).unwrap()), 0, 0);
        self.driver.offer(FROM_GUEST, slot);
        self.driver.notify(FROM_GUEST);
    }

    pub fn send(&mut self, ports: (u32, u32), op: u16, data: &[u8]) {
        let raw = self.raw(ports, (1, op), 0, data);
        self.send_raw(&raw);
    }

    pub fn send_shutdown(&mut self, ports: (u32, u32), flags: u32) {
        let raw = self.raw(ports, (1, SHUTDOWN), flags, &[]);
        self.send_raw(&raw);
    }

    /// A client connected to `port`, and both ports.
    pub fn connect(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client();
        client.write_all(&port.to_le_bytes()).unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.guest_port, port);
        let ports = (request.host_port, port);
        self.send(ports, RESPONSE, &[]);
        let mut open = [0xff];
        client.read_exact(&mut open).unwrap();
        assert_eq!(open, [VSOCK_OPEN]);
        (client, ports)
    }

    pub fn status(&mut self) -> u32 {
        self.driver.status()
    }
}

/// Reads until the end of file.
pub fn rest(mut client: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    all
}
