//! The thread that carries out a disk's requests, one after the other, so that a slow disk keeps nobody else waiting.
//!
//! It reads and writes guest memory, but touches no queue: finished requests go back to the event loop, which gives them to the driver. The channel to it is
//! bounded by the queue's size, as the driver has no more chains than that.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;
use vm_memory::{Bytes, GuestAddress};

use super::overlay::Overlay;
use super::request::{Kind, Request, Segment};
use crate::memory::GuestMemory;

/// Most bytes copied at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Length of the answer to a request for the name (virtio 1.2, section 5.2.6.1).
const ID_BYTES: usize = 20;

/// How a request ended (virtio 1.2, section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It was carried out.
    Ok,
    /// The disk failed, or there is no such place.
    IoError,
    /// Not a request that this device knows.
    Unsupported,
}

impl Status {
    /// The byte that says so.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// A request that has been carried out.
#[derive(Debug)]
pub struct Done {
    /// Its chain's head.
    pub head: u16,
    /// Where its status goes.
    pub status_at: GuestAddress,
    /// How it ended.
    pub status: Status,
    /// Bytes written to guest memory, the status left out.
    pub written: u32,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    idle: Condvar,
    ready: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    under_way: usize,
    done: VecDeque<Done>,
}

/// A disk's thread.
#[derive(Debug)]
pub struct Worker {
    requests: Sender<Request>,
    shared: Arc<Shared>,
}

impl Worker {
    /// Starts the thread; it ends when this is dropped.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(overlay: Arc<Overlay>, name: String, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let (requests, queue) = channel();
        let ready = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::default(), idle: Condvar::new(), ready });
        let there = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("disk-{name}"));
        thread.spawn(move || work(&queue, &overlay, &name, &memory, &there))?;
        Ok(Self { requests, shared })
    }

    /// Readable when a request is done.
    pub fn ready(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }

    /// Hands a request over.
    pub fn begin(&self, request: Request) {
        self.lock().under_way += 1;
        if let Err(lost) = self.requests.send(request) {
            // The thread is gone, which only a bug can do; the driver is told rather than left waiting.
            let Request { head, status, .. } = lost.0;
            self.shared.finish(Done { head, status_at: status, status: Status::IoError, written: 0 });
        }
    }

    /// Requests that are done, in their order.
    pub fn take_done(&self) -> VecDeque<Done> {
        let mut count = [0; 8];
        let _nothing_pending = rustix::io::read(&self.shared.ready, &mut count);
        std::mem::take(&mut self.lock().done)
    }

    /// Waits until no request is under way. As long as the disk takes for what it has been given.
    pub fn wait_idle(&self) {
        let mut state = self.lock();
        while state.under_way > 0 {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, done: Done) {
        let mut state = self.lock();
        state.done.push_back(done);
        state.under_way -= 1;
        if state.under_way == 0 {
            self.idle.notify_all();
        }
        drop(state);
        // In the kernel's byte order, which on x86-64 is this one. Fails only when the counter is full, and then it is readable anyway.
        let _readable = rustix::io::write(&self.ready, &1u64.to_le_bytes());
    }
}

fn work(queue: &Receiver<Request>, overlay: &Overlay, name: &str, memory: &GuestMemory, shared: &Shared) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Ok(request) = queue.recv() {
        let (status, written) = match carry_out(&request, overlay, name, memory, &mut buffer) {
            Ok(Some(written)) => (Status::Ok, written),
            Ok(None) => (Status::Unsupported, 0),
            Err(_) => (Status::IoError, 0),
        };
        shared.finish(Done { head: request.head, status_at: request.status, status, written });
    }
}

/// Gives the number of bytes written to guest memory, nothing if the request is not one that we know.
fn carry_out(
    request: &Request,
    overlay: &Overlay,
    name: &str,
    memory: &GuestMemory,
    buffer: &mut [u8],
) -> io::Result<Option<u32>> {
    let bytes = request.bytes();
    let (Kind::Read(offset) | Kind::Write(offset)) = request.kind else {
        return match request.kind {
            Kind::Flush => overlay.sync().map(|()| Some(0)),
            Kind::Id => give_id(&request.segments, name, memory).map(Some),
            _ => Ok(None),
        };
    };
    if !overlay.contains(offset, bytes) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let reads = matches!(request.kind, Kind::Read(_));
    let mut at = offset;
    for segment in &request.segments {
        let mut done = 0u64;
        while done < u64::from(segment.bytes) {
            let left = usize::try_from(u64::from(segment.bytes) - done).unwrap_or(PIECE_BYTES);
            let piece = &mut buffer[..left.min(PIECE_BYTES)];
            let address = GuestAddress(segment.address.0.saturating_add(done));
            if reads {
                overlay.read(at, piece)?;
                memory.write_slice(piece, address).map_err(io::Error::other)?;
            } else {
                memory.read_slice(piece, address).map_err(io::Error::other)?;
                overlay.write(at, piece)?;
            }
            at += piece.len() as u64;
            done += piece.len() as u64;
        }
    }
    Ok(Some(if reads { u32::try_from(bytes).unwrap_or(u32::MAX) } else { 0 }))
}

fn give_id(segments: &[Segment], name: &str, memory: &GuestMemory) -> io::Result<u32> {
    let mut id = [0; ID_BYTES];
    let length = name.len().min(ID_BYTES);
    id[..length].copy_from_slice(&name.as_bytes()[..length]);
    let Some(segment) = segments.first() else { return Err(io::ErrorKind::InvalidInput.into()) };
    let fits = usize::try_from(segment.bytes).unwrap_or(ID_BYTES).min(ID_BYTES);
    memory.write_slice(&id[..fits], segment.address).map_err(io::Error::other)?;
    Ok(u32::try_from(fits).unwrap_or(0))
}
