//! virtio-vsock (virtio 1.2, section 5.10): connections of the host's programs to ports of the guest.
//!
//! * [`packet`]: what travels in the queues. * [`connection`]: one connection.
//!
//! Clients come through the listening socket that the process was started with ([`wire::vmm`]). The guest opens none: a request of its own is
//! answered with a reset. The event loop sees one descriptor, an epoll set of all sockets; while the guest has no buffers for us it does not look at it.
//!
//! Connections do not move with the machine. On the target the guest is told that its transport was reset, whereupon it closes what it
//! had open and goes on listening; the source's sockets end with its process. A move that fails leaves them as they were.

mod connection;
mod packet;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use virtio_queue::Queue;

use self::connection::Connection;
use self::packet::{DATA_BYTES_MAX, FromGuest, GUEST_CID, HEADER_BYTES, Header, Operation};
use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

/// Queues: to the guest, from the guest, events.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// Most connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Most resets of packets that belong to no connection; a guest that sends more of those gets no answer to them.
const STRAYS_MAX: usize = 64;
/// The first port of the host's side; ports below mean services.
const FIRST_PORT: u32 = 1 << 20;
/// Token of the listener; connections have their ports.
const LISTENER: u64 = u64::MAX;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// The device.
pub struct Vsock {
    listener: Option<UnixListener>,
    sockets: OwnedFd,
    connections: BTreeMap<u32, Connection>,
    /// What each connection's socket is waited for.
    interests: BTreeMap<u32, EventFlags>,
    strays: VecDeque<(u32, u32)>,
    next_port: u32,
    /// The guest must be told that its connections are no more.
    reset_due: bool,
    /// The guest has given no buffer for what there is.
    starved: bool,
    packet: Vec<u8>,
}

impl Vsock {
    /// The device, with clients that come through `listener`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(listener: Option<UnixListener>) -> io::Result<Self> {
        let sockets = epoll::create(CreateFlags::CLOEXEC)?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            epoll::add(&sockets, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        Ok(Self {
            listener,
            sockets,
            connections: BTreeMap::new(),
            interests: BTreeMap::new(),
            strays: VecDeque::new(),
            next_port: FIRST_PORT,
            reset_due: false,
            starved: false,
            packet: vec![0; HEADER_BYTES + DATA_BYTES_MAX],
        })
    }

    fn accept(&mut self) -> io::Result<()> {
        while let Some(listener) = &self.listener
            && self.connections.len() < CONNECTIONS_MAX
        {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            let port = self.free_port();
            let connection = Connection::new(stream, port);
            let interest = connection.interest();
            epoll::add(&self.sockets, &connection, EventData::new_u64(u64::from(port)), interest)?;
            self.interests.insert(port, interest);
            self.connections.insert(port, connection);
        }
        Ok(())
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// Lets every socket that has something to say say it, up to its own bound.
    fn look_at_sockets(&mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(64);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.sockets, spare_capacity(&mut events), Some(&now)).is_err() {
            return;
        }
        for event in &events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == LISTENER {
                // Descriptors may have run out; the next client is tried when this one comes again.
                let _later = self.accept();
                continue;
            }
            let Some(connection) = u32::try_from(token).ok().and_then(|port| self.connections.get_mut(&port))
            else {
                continue;
            };
            if flags.contains(EventFlags::IN) {
                connection.name();
            }
            if flags.contains(EventFlags::OUT) {
                connection.flush();
            }
            if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
                connection.hung_up();
            }
        }
    }

    /// Puts packets into the guest's buffers until one of the two runs out.
    fn fill(&mut self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(receive)) = queues.get_mut(RECEIVE) else { return Ok(progress) };
        self.starved = false;
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(receive, memory)? else {
                self.starved = self.has_more();
                return Ok(progress);
            };
            let head = chain.head_index();
            let room = queue::capacity(chain.clone(), self.packet.len())?;
            let Some(length) = self.next_packet(room) else {
                queue::unpop(receive);
                return Ok(progress);
            };
            let written = queue::scatter(chain, memory, &self.packet[..length])?;
            queue::push(receive, memory, head, u32::try_from(written).unwrap_or(0))?;
            progress.used |= queue::wants_interrupt(receive, memory);
        }
        progress.more = true;
        Ok(progress)
    }

    fn has_more(&self) -> bool {
        let waits =
            |connection: &Connection| connection.has_due() || connection.interest().contains(EventFlags::IN);
        !self.strays.is_empty() || self.connections.values().any(waits)
    }

    /// Makes the next packet for a buffer of `room` bytes; its length.
    fn next_packet(&mut self, room: usize) -> Option<usize> {
        if let Some((host_port, guest_port)) = self.strays.pop_front() {
            let operation = Operation::Reset;
            let (flags, data_bytes, room_bytes, taken_bytes) = (0, 0, 0, 0);
            let header =
                Header { host_port, guest_port, data_bytes, operation, flags, room_bytes, taken_bytes };
            self.packet[..HEADER_BYTES].copy_from_slice(&header.to_guest());
            return Some(HEADER_BYTES);
        }
        let (fixed, data) = self.packet.split_at_mut(HEADER_BYTES);
        let data_room = room.saturating_sub(HEADER_BYTES).min(data.len());
        // Control packets of all before anybody's data.
        let control = self.connections.values_mut().find_map(Connection::next_due).map(|header| (header, 0));
        let next = control.or_else(|| {
            self.connections.values_mut().find_map(|connection| connection.read(&mut data[..data_room]))
        });
        if let Some((header, length)) = next {
            fixed.copy_from_slice(&header.to_guest());
            return Some(HEADER_BYTES + length);
        }
        // Reading may have found an end, which the guest is to be told.
        let header = self.connections.values_mut().find_map(Connection::next_due)?;
        fixed.copy_from_slice(&header.to_guest());
        Some(HEADER_BYTES)
    }

    fn take_from_guest(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        let Some(Some(transmit)) = queues.get_mut(TRANSMIT) else { return Ok(progress) };
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(transmit, memory)? else { return Ok(progress) };
            let head = chain.head_index();
            let length = queue::gather(chain, memory, &mut self.packet)?;
            queue::push(transmit, memory, head, 0)?;
            progress.used |= queue::wants_interrupt(transmit, memory);
            match Header::parse(&self.packet[..length]) {
                FromGuest::Packet(header, data) => match self.connections.get_mut(&header.host_port) {
                    Some(connection) if connection.is_for(header.guest_port) => {
                        connection.take(&header, data);
                    }
                    _ if header.operation == Operation::Reset => {}
                    _ => self.stray(header.host_port, header.guest_port),
                },
                FromGuest::Stray(host_port, guest_port) => self.stray(host_port, guest_port),
                FromGuest::Noise => {}
            }
        }
        progress.more = true;
        Ok(progress)
    }

    fn stray(&mut self, host_port: u32, guest_port: u32) {
        if self.strays.len() < STRAYS_MAX {
            self.strays.push_back((host_port, guest_port));
        }
    }

    fn tell_reset(&mut self, queues: &mut [Option<Queue>], memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(Some(events)) = queues.get_mut(EVENTS).filter(|_| self.reset_due) else { return Ok(false) };
        let Some(chain) = queue::pop(events, memory)? else { return Ok(false) };
        let head = chain.head_index();
        let written = queue::scatter(chain, memory, &TRANSPORT_RESET.to_le_bytes())?;
        queue::push(events, memory, head, u32::try_from(written).unwrap_or(0))?;
        self.reset_due = false;
        Ok(true)
    }

    /// Forgets connections that are over, and has the set wait for what the others want.
    fn tidy(&mut self) {
        let Self { connections, interests, sockets, .. } = self;
        connections.retain(|port, connection| {
            if connection.is_over() {
                // Closing the socket takes it out of the set.
                interests.remove(port);
                return false;
            }
            let wanted = connection.interest();
            if interests.get(port) != Some(&wanted) {
                interests.insert(*port, wanted);
                let token = EventData::new_u64(u64::from(*port));
                let _is_in_the_set = epoll::modify(&*sockets, &*connection, token, wanted);
            }
            true
        });
    }
}

impl Device for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn id(&self) -> u32 {
        19
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 16]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = GUEST_CID.to_le_bytes();
        let known = config.get(offset..).unwrap_or_default();
        let length = known.len().min(data.len());
        data[..length].copy_from_slice(&known[..length]);
    }

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = match index {
            TRANSMIT => self.take_from_guest(queues, memory)?,
            EVENTS => Progress { used: self.tell_reset(queues, memory)?, more: false },
            _ => Progress::default(),
        };
        let filled = self.fill(queues, memory)?;
        progress.used |= filled.used;
        progress.more |= filled.more;
        self.tidy();
        Ok(progress)
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.look_at_sockets();
        let progress = self.fill(queues, memory)?;
        self.tidy();
        Ok(progress)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.sockets.as_fd())
    }

    fn wants_host_event(&self) -> bool {
        // A client that comes before the guest was told of the reset would lose its connection to it.
        !self.starved && !self.reset_due
    }

    fn restored(&mut self) {
        self.reset_due = true;
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.interests.clear();
        self.strays.clear();
        self.reset_due = false;
        self.starved = false;
    }
}
