//! The host's side: the listening socket, the clients' connections, and one epoll set over all of them, which is the single descriptor that the event
//! loop sees.
//!
//! Sockets are in the set edge-triggered: what an edge said is remembered in the connection until the socket has nothing more. So a
//! connection that waits for the guest (for room, for receive buffers) costs no wake-ups, and nothing has to be taken out of the set. What is left to do
//! for other reasons is called to mind by an event descriptor in the same set.
//!
//! Bounds: [`CONNECTIONS_MAX`] connections, then clients wait in the listener's backlog; as many resets for packets that belong to nothing, then
//! those are dropped, which a guest that takes no answers has to live with.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{BUFFER_BYTES, Connection, Fate};
use super::packet::{GUEST_CID, HOST_CID, Header, Op, STREAM};
use crate::event::borrow;

/// Most connections at a time, those included that only wait for the guest's last word.
pub const CONNECTIONS_MAX: usize = 256;
/// Most resets that wait for receive buffers.
const RESETS_MAX: usize = 2 * CONNECTIONS_MAX;
/// How long a client may take to name a port, and the guest to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Most clients accepted and events taken in one go.
const BATCH: usize = 64;

const LISTENER: u64 = 1 << 32;
const TIMER: u64 = 2 << 32;
const WAKE: u64 = 3 << 32;

/// All connections.
pub struct Links {
    epoll: OwnedFd,
    wake: EventFd,
    timer: OwnedFd,
    listener: Option<UnixListener>,
    /// Somebody may wait in the listener's backlog.
    waiting: bool,
    /// By the host's port.
    connections: BTreeMap<u32, Connection>,
    /// Those that may have a packet for the guest, in turn.
    queue: VecDeque<u32>,
    /// Ports of the host and of the guest.
    resets: VecDeque<(u32, u32)>,
    next_port: u32,
}

impl Links {
    /// For clients of `listener`; without one there are none.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(listener: Option<UnixListener>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        epoll::add(&epoll, borrow(&wake), EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            let flags = EventFlags::IN | EventFlags::ET;
            epoll::add(&epoll, listener, EventData::new_u64(LISTENER), flags)?;
        }
        Ok(Self {
            epoll,
            wake,
            timer,
            listener,
            waiting: true,
            connections: BTreeMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: first_port(),
        })
    }

    /// Readable when there is something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        let _full = self.wake.write(1);
    }

    /// Takes what the operating system has to say. `accept`: whether new clients are welcome now.
    pub fn poll(&mut self, accept: bool) {
        let mut events: Vec<Event> = Vec::with_capacity(BATCH);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Interrupted: what is ready stays ready.
        let _count = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&at_once));
        for event in events {
            match event.data.u64() {
                LISTENER => self.waiting = true,
                WAKE => {
                    let _drained = self.wake.read();
                }
                TIMER => self.expire(),
                token => {
                    let Ok(port) = u32::try_from(token) else { continue };
                    let Some(connection) = self.connections.get_mut(&port) else { continue };
                    let fate = connection.ready(event.flags);
                    self.settle(port, fate);
                }
            }
        }
        if accept {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let mut room = BATCH;
        while self.waiting && self.make_room() {
            let Some(listener) = &self.listener else { return };
            if room == 0 {
                self.wake();
                break;
            }
            room -= 1;
            match listener.accept() {
                Ok((socket, _)) => self.add(socket),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // None left; or the process has no descriptors left, in which case the next client is the next try.
                Err(_) => self.waiting = false,
            }
        }
        self.arm();
    }

    /// Whether there is room for one more. One that only waits for the guest's last word gives way.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < CONNECTIONS_MAX {
            return true;
        }
        let closing = self.connections.iter().find(|(_, connection)| connection.is_closing());
        match closing.map(|(&port, _)| port) {
            Some(port) => {
                self.settle(port, Fate::Drop);
                true
            }
            None => false,
        }
    }

    fn add(&mut self, socket: std::os::unix::net::UnixStream) {
        let mut port = self.next_port;
        while self.connections.contains_key(&port) {
            port = following(port);
        }
        self.next_port = following(port);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = EventData::new_u64(port.into());
        // A client that cannot be listened to is let go.
        if socket.set_nonblocking(true).is_ok() && epoll::add(&self.epoll, &socket, data, flags).is_ok() {
            self.connections.insert(port, Connection::new(socket, Instant::now() + ANSWER_WAIT));
        }
    }

    /// Does what is due with the connection at `port`.
    fn settle(&mut self, port: u32, fate: Fate) {
        match fate {
            Fate::Keep => {
                if let Some(connection) = self.connections.get_mut(&port)
                    && !std::mem::replace(&mut connection.queued, true)
                {
                    self.queue.push_back(port);
                }
            }
            Fate::Drop | Fate::Reset => {
                // Closes the socket, which also takes it out of the set. There is room for a client that waits.
                let gone = self.connections.remove(&port);
                if self.waiting && self.listener.is_some() {
                    self.wake();
                }
                if let Some(guest_port) = gone.and_then(|gone| gone.guest_port())
                    && fate == Fate::Reset
                {
                    self.reset(port, guest_port);
                }
            }
        }
    }

    fn reset(&mut self, port: u32, guest_port: u32) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back((port, guest_port));
        }
    }

    /// A packet of the guest.
    pub fn take(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != GUEST_CID {
            // There is nobody to answer.
            return;
        }
        let port = header.dst_port;
        let ours = header.dst_cid == HOST_CID && header.kind == STREAM;
        let known = self.connections.get_mut(&port).filter(|connection| {
            ours && connection.is_known() && connection.guest_port() == Some(header.src_port)
        });
        match known {
            Some(connection) => {
                let fate = connection.take(header, data);
                self.settle(port, fate);
            }
            // Nobody on this host accepts connections, and those of another host did not come along.
            None if header.op != Op::Reset => self.reset(port, header.src_port),
            None => {}
        }
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// The next packet for the guest; its data in `room`.
    pub fn next_packet(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some((port, guest_port)) = self.resets.pop_front() {
            return Some(header(port, guest_port, Op::Reset));
        }
        while let Some(port) = self.queue.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.queued = false;
            let guest_port = connection.guest_port();
            let (Some(guest_port), Some(packet)) = (guest_port, connection.next_packet(room)) else {
                continue;
            };
            // There may be more, for which it waits its turn.
            self.settle(port, Fate::Keep);
            let super::connection::Outgoing { op, flags, data_bytes, fwd_cnt } = packet;
            return Some(Header { flags, data_bytes, fwd_cnt, ..header(port, guest_port, op) });
        }
        None
    }

    /// Closes everything, and tells nobody but the clients: also those that wait in the backlog.
    pub fn close_all(&mut self) {
        self.connections.clear();
        self.queue.clear();
        self.resets.clear();
        if let Some(listener) = &self.listener {
            for _ in 0..CONNECTIONS_MAX {
                if listener.accept().is_err() {
                    break;
                }
            }
        }
    }

    /// Forgets all connections, because the driver has.
    pub fn forget_all(&mut self) {
        self.connections.clear();
        self.queue.clear();
        self.resets.clear();
        self.waiting = true;
        self.wake();
    }

    /// Gives up connections that have not come about in time.
    fn expire(&mut self) {
        let _count = rustix::io::read(&self.timer, &mut [0; 8]);
        let now = Instant::now();
        let late = |(&port, connection): (&u32, &Connection)| {
            (connection.deadline()? <= now).then(|| (port, connection.give_up()))
        };
        let late: Vec<(u32, Fate)> = self.connections.iter().filter_map(late).collect();
        for (port, fate) in late {
            self.settle(port, fate);
        }
        self.arm();
    }

    /// Sets the timer to the next deadline.
    fn arm(&self) {
        if let Some(next) = self.connections.values().filter_map(Connection::deadline).min() {
            self.wake_after(next.saturating_duration_since(Instant::now()));
        }
    }

    /// Makes the descriptor readable in a while.
    pub fn wake_after(&self, wait: Duration) {
        let wait = wait.max(Duration::from_millis(1));
        let it_value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(0),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Cannot fail for a timer and a time that are valid; without it, a client has its own patience.
        let _valid =
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value });
    }
}

/// Where the ports of this process begin: anywhere, so that a guest that has moved does not meet those of its old connections again.
fn first_port() -> u32 {
    let mut random = [0; 4];
    let _without = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
    following(u32::from_le_bytes(random))
}

/// The port after `port`. The lowest ones are for services, the highest means any.
const fn following(port: u32) -> u32 {
    if port >= u32::MAX - 1 || port < 1024 { 1024 } else { port + 1 }
}

const fn header(port: u32, guest_port: u32, op: Op) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: port,
        dst_port: guest_port,
        data_bytes: 0,
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: BUFFER_BYTES,
        fwd_cnt: 0,
    }
}
