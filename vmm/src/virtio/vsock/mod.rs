//! virtio-vsock: connections from Unix sockets on the host to ports of the guest (virtio 1.2, section 5.10).
//!
//! Whoever connects to the listening socket names a port and gets a byte when the guest has accepted; see [`wire::vmm`]. Queue 0 carries
//! packets to the guest, queue 1 from it, queue 2 events. The guest cannot connect to the host: it is refused.
//!
//! Connections do not move with the machine: their other ends are on this host. A device that was restored says so by the event
//! `TRANSPORT_RESET` as soon as the guest has a buffer for it; Linux then ends what was connected and goes on listening. No client is let in until the guest
//! has taken the event, because its reset would hit the new connection as well. A migration that fails leaves the source's device as it was, connections included.
//!
//! While the guest is paused nothing is read from or written to a client. A driver that breaks the rules of the queues stops the device; one that breaks the
//! protocol's loses the connection.

mod connection;
mod links;
mod packet;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};

use self::links::Links;
use self::packet::{DATA_BYTES_MAX, GUEST_CID, HEADER_BYTES, Header};
use super::queue::{self, BUDGET, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

pub use links::CONNECTIONS_MAX;

const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const EVENTS: usize = 2;
/// The event VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
/// For a driver that does not give the buffer of an event back.
const EVENT_WAIT: Duration = Duration::from_secs(1);

/// Whether the guest knows that its connections are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResetEvent {
    /// Nothing to tell.
    None,
    /// To be told.
    Due,
    /// Told; the guest has taken it once it has made another buffer available than this, and at the latest at that time.
    Told { available: u16, until: Instant },
}

/// The device.
pub struct Vsock {
    links: Links,
    reset_event: ResetEvent,
    buffer: Box<[u8]>,
}

impl Vsock {
    /// For clients of `listener`; without one there are none.
    ///
    /// # Errors
    /// The operating system's, when it has no descriptors left.
    pub fn new(listener: Option<UnixListener>) -> io::Result<Self> {
        Ok(Self {
            links: Links::new(listener)?,
            reset_event: ResetEvent::None,
            buffer: vec![0; HEADER_BYTES + DATA_BYTES_MAX].into(),
        })
    }

    fn take_packets(&mut self, packets: &mut Queue, memory: &GuestMemory) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(packets, memory)? else { return Ok(progress) };
            let head = chain.head_index();
            let bytes = queue::gather(chain, memory, &mut self.buffer)?;
            let (header, data) =
                self.buffer[..bytes].split_first_chunk::<HEADER_BYTES>().ok_or(QueueError::TooShort)?;
            let header = Header::parse(header);
            let data_bytes = usize::try_from(header.data_bytes).map_err(|_| QueueError::TooShort)?;
            let data = data.get(..data_bytes).ok_or(QueueError::TooShort)?;
            self.links.take(&header, data);
            queue::push(packets, memory, head, 0)?;
            progress.used |= queue::wants_interrupt(packets, memory);
        }
        progress.more = true;
        Ok(progress)
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn give_packets(&mut self, buffers: &mut Queue, memory: &GuestMemory) -> Result<bool, QueueError> {
        let mut used = false;
        for _ in 0..BUDGET {
            if !self.links.has_packets() {
                return Ok(used);
            }
            // Without a buffer, the driver's next notification goes on here.
            let Some(chain) = queue::pop(buffers, memory)? else { return Ok(used) };
            let room = queue::capacity(chain.clone(), self.buffer.len())?;
            let (header_room, data_room) =
                self.buffer[..room].split_first_chunk_mut::<HEADER_BYTES>().ok_or(QueueError::TooShort)?;
            let Some(header) = self.links.next_packet(data_room) else {
                queue::unpop(buffers);
                return Ok(used);
            };
            *header_room = header.to_bytes();
            let bytes = HEADER_BYTES + usize::try_from(header.data_bytes).unwrap_or(0);
            let head = chain.head_index();
            let written = queue::scatter(chain, memory, &self.buffer[..bytes])?;
            queue::push(buffers, memory, head, u32::try_from(written).unwrap_or(0))?;
            used |= queue::wants_interrupt(buffers, memory);
        }
        // The budget is spent; other devices have their turn first.
        self.links.wake();
        Ok(used)
    }

    /// Tells the guest that its connections are gone, and sees whether it has heard.
    fn give_event(&mut self, events: &mut Queue, memory: &GuestMemory) -> Result<bool, QueueError> {
        let available = |events: &Queue| events.avail_idx(memory, Ordering::Acquire);
        match self.reset_event {
            ResetEvent::None => Ok(false),
            ResetEvent::Told { available: then, until } => {
                if available(events)?.0 != then || Instant::now() >= until {
                    self.reset_event = ResetEvent::None;
                    self.links.wake();
                }
                Ok(false)
            }
            ResetEvent::Due => {
                let then = available(events)?.0;
                let Some(chain) = queue::pop(events, memory)? else { return Ok(false) };
                let head = chain.head_index();
                let written = queue::scatter(chain, memory, &TRANSPORT_RESET)?;
                queue::push(events, memory, head, u32::try_from(written).unwrap_or(0))?;
                self.reset_event = ResetEvent::Told { available: then, until: Instant::now() + EVENT_WAIT };
                self.links.wake_after(EVENT_WAIT);
                Ok(queue::wants_interrupt(events, memory))
            }
        }
    }

    /// The order matters: events before clients are let in, what the guest says before what it is answered.
    fn work(
        &mut self,
        from_guest: bool,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        if let Some(Some(events)) = queues.get_mut(EVENTS) {
            progress.used |= self.give_event(events, memory)?;
        }
        if from_guest && let Some(Some(packets)) = queues.get_mut(FROM_GUEST) {
            let Progress { used, more } = self.take_packets(packets, memory)?;
            progress.used |= used;
            progress.more = more;
        }
        if let Some(Some(buffers)) = queues.get_mut(TO_GUEST) {
            progress.used |= self.give_packets(buffers, memory)?;
        }
        Ok(progress)
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
        &[256, 256, 64]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = GUEST_CID.to_le_bytes();
        for (to, from) in data.iter_mut().zip(config.get(offset..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.work(index == FROM_GUEST, queues, memory)
    }

    fn host_event(
        &mut self,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        self.links.poll(self.reset_event == ResetEvent::None);
        self.work(false, queues, memory)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.links.fd())
    }

    fn wants_host_event(&self) -> bool {
        true
    }

    fn started(&mut self, _features: u64, restored: bool) {
        if restored {
            self.reset_event = ResetEvent::Due;
        }
        self.links.wake();
    }

    fn left(&mut self) {
        self.links.close_all();
        // Should the guest come back after all, it has to hear of it.
        self.reset_event = ResetEvent::Due;
        self.links.wake();
    }

    fn reset(&mut self) {
        self.links.forget_all();
        self.reset_event = ResetEvent::None;
    }
}
