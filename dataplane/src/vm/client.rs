//! The control socket on the machine's home shard: everything that a running machine is asked.
//!
//! A task reads answers and notices and hands each answer to whoever waits for it. When the stream ends, every wait
//! ends with [`VmmError::Gone`], and the watcher is told, once.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _};
use glommio::net::UnixStream;
use glommio::timer::timeout;
use rkyv::util::AlignedVec;
use tokio::sync::oneshot;
use wire::frame::{self, HEADER_BYTES, Header};
use wire::ids::{Epoch, MachineId};
use wire::units::PageIndex;
use wire::vmm::{Disowned, FromVmm, Notice, Reply, Request, ToVmm, VERSION};

use super::{VmmError, accepted};

/// Longest wait for an answer. The slowest request, switching the dirty log off, takes some 50 ms; beyond this the VMM hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What a pause took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pause {
    /// Until vCPUs and devices had stopped, in microseconds.
    pub stop_us: u64,
    /// Harvesting the dirty log, in microseconds.
    pub harvest_us: u64,
    /// Pages set in the shared bitmap.
    pub dirty_pages: u64,
}

/// What a machine's VMM says unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmEvent {
    /// A notice.
    Notice(Notice),
    /// The process has ended, or hung up.
    Gone,
}

/// The client. Cheap to clone; all clones share one connection.
#[derive(Clone)]
pub struct VmmClient {
    shared: Rc<Shared>,
}

struct Shared {
    machine: MachineId,
    /// For writing; a second descriptor of the same socket than the reader's, because glommio lends a stream to one at a time.
    writer: RefCell<Option<UnixStream>>,
    turn: glommio::sync::Semaphore,
    seq: Cell<u32>,
    waiting: RefCell<VecDeque<(u32, oneshot::Sender<Reply>)>>,
    gone: Cell<bool>,
}

impl VmmClient {
    /// Takes over the socket on the current shard. `watcher` is told what the VMM says unasked.
    ///
    /// # Errors
    /// Duplicating the descriptor.
    pub fn start(
        machine: MachineId,
        socket: OwnedFd,
        watcher: impl Fn(VmmEvent) + 'static,
    ) -> std::io::Result<Self> {
        let reader = stream(socket.try_clone()?);
        let shared = Rc::new(Shared {
            machine,
            writer: RefCell::new(Some(stream(socket))),
            turn: glommio::sync::Semaphore::new(1),
            seq: Cell::new(0),
            waiting: RefCell::default(),
            gone: Cell::new(false),
        });
        let for_reader = shared.clone();
        glommio::spawn_local(async move {
            let error = read_all(&for_reader, reader, &watcher).await;
            tracing::debug!(machine = %for_reader.machine, ?error, "VMM socket ended");
            for_reader.gone.set(true);
            for_reader.waiting.borrow_mut().clear();
            for_reader.writer.borrow_mut().take();
            watcher(VmmEvent::Gone);
        })
        .detach();
        Ok(Self { shared })
    }

    /// Whether the VMM has hung up.
    pub fn is_gone(&self) -> bool {
        self.shared.gone.get()
    }

    /// Runs the guest under `epoch`.
    ///
    /// # Errors
    /// [`VmmError`]; refused when the machine was given away.
    pub async fn run(&self, epoch: Epoch) -> Result<(), VmmError> {
        self.done("Run", Request::Run { epoch }).await
    }

    /// Stops vCPUs and devices; with `harvest` the dirty bitmap is complete afterwards.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn pause(&self, harvest: bool) -> Result<Pause, VmmError> {
        match self.call("Pause", Request::Pause { harvest }).await? {
            Reply::Paused { stop_us, harvest_us, dirty_pages } => {
                Ok(Pause { stop_us, harvest_us, dirty_pages })
            }
            _ => Err(VmmError::Protocol("Pause")),
        }
    }

    /// Saves the state of a paused machine.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn save(&self) -> Result<Vec<u8>, VmmError> {
        match self.call("Save", Request::Save).await? {
            Reply::State(archive) => Ok(archive),
            _ => Err(VmmError::Protocol("Save")),
        }
    }

    /// Loads state into a created machine.
    ///
    /// # Errors
    /// [`VmmError`]; refused when the archive does not fit.
    pub async fn restore(&self, archive: Vec<u8>) -> Result<(), VmmError> {
        self.done("Restore", Request::Restore(archive)).await
    }

    /// Switches dirty logging; switched on, all pages count as dirty.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn dirty_log(&self, on: bool) -> Result<(), VmmError> {
        self.done("DirtyLog", Request::DirtyLog { on }).await
    }

    /// Begins a round with a snapshot of the log; returns how many pages are dirty.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn dirty_sync(&self) -> Result<u64, VmmError> {
        self.dirty("DirtySync", Request::DirtySync).await
    }

    /// Publishes the snapshot's bits of a range in the shared bitmap, after write-protecting those pages.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn dirty_take(&self, first: PageIndex, count: u64) -> Result<u64, VmmError> {
        self.dirty("DirtyTake", Request::DirtyTake { first, count }).await
    }

    /// Gives the machine away: from here on it does not run here.
    ///
    /// # Errors
    /// [`VmmError`]; without an answer nobody knows, and the caller must take it as given away.
    pub async fn disown(&self, record: Disowned) -> Result<(), VmmError> {
        self.done("Disown", Request::Disown(record)).await
    }

    /// Takes the machine back under a higher epoch.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn reclaim(&self, epoch: Epoch) -> Result<(), VmmError> {
        self.done("Reclaim", Request::Reclaim { epoch }).await
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// [`VmmError`]; refused when the guest does not run.
    pub async fn power_button(&self) -> Result<(), VmmError> {
        self.done("PowerButton", Request::PowerButton).await
    }

    /// Ends the process.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn quit(&self) -> Result<(), VmmError> {
        self.done("Quit", Request::Quit).await
    }

    async fn done(&self, what: &'static str, request: Request) -> Result<(), VmmError> {
        match self.call(what, request).await? {
            Reply::Done => Ok(()),
            _ => Err(VmmError::Protocol(what)),
        }
    }

    async fn dirty(&self, what: &'static str, request: Request) -> Result<u64, VmmError> {
        match self.call(what, request).await? {
            Reply::Dirty { pages } => Ok(pages),
            _ => Err(VmmError::Protocol(what)),
        }
    }

    async fn call(&self, what: &'static str, request: Request) -> Result<Reply, VmmError> {
        let gone = || VmmError::Gone { waiting_for: what, source: None };
        let seq = self.shared.seq.get().wrapping_add(1).max(1);
        self.shared.seq.set(seq);
        let bytes =
            frame::encode(VERSION, &ToVmm { seq, request }, 0).map_err(|_| VmmError::Protocol(what))?;
        let (answer, answered) = oneshot::channel();
        {
            // One writer at a time: a frame must not be cut by another one.
            let _turn = self.shared.turn.acquire_permit(1).await.map_err(|_| gone())?;
            let mut writer = self.shared.writer.borrow_mut().take().ok_or_else(gone)?;
            self.shared.waiting.borrow_mut().push_back((seq, answer));
            let written = writer.write_all(&bytes).await;
            if !self.shared.gone.get() {
                self.shared.writer.borrow_mut().replace(writer);
            }
            written.map_err(|source| VmmError::Gone { waiting_for: what, source: Some(source) })?;
        }
        let reply = timeout(ANSWER_LIMIT, async move { Ok(answered.await) }).await;
        accepted(reply.map_err(|_| VmmError::Silent(what))?.map_err(|_| gone())?)
    }
}

/// Reads frames until the stream ends or breaks; says how.
async fn read_all(
    shared: &Shared,
    mut stream: UnixStream,
    watcher: &impl Fn(VmmEvent),
) -> Option<std::io::Error> {
    loop {
        match read_frame(&mut stream).await {
            Ok(FromVmm::Notice(notice)) => watcher(VmmEvent::Notice(notice)),
            Ok(FromVmm::Reply { seq, reply }) => {
                let waiter = shared.waiting.borrow_mut().pop_front();
                match waiter {
                    // Answers come in the order of the requests.
                    Some((expected, sender)) if expected == seq => drop(sender.send(reply)),
                    _ => return Some(std::io::ErrorKind::InvalidData.into()),
                }
            }
            Err(error) => return Some(error),
        }
    }
}

async fn read_frame(stream: &mut UnixStream) -> std::io::Result<FromVmm> {
    let invalid = |e| std::io::Error::new(std::io::ErrorKind::InvalidData, e);
    let mut fixed = [0; HEADER_BYTES];
    stream.read_exact(&mut fixed).await?;
    let header = Header::parse(&fixed).map_err(invalid)?;
    let mut body = AlignedVec::with_capacity(header.body_bytes as usize);
    body.resize(header.body_bytes as usize, 0);
    stream.read_exact(&mut body).await?;
    header.decode(&body).map_err(invalid)
}

fn stream(socket: OwnedFd) -> UnixStream {
    // SAFETY: the descriptor is a connected Unix stream socket whose ownership passes to the stream.
    unsafe { UnixStream::from_raw_fd(socket.into_raw_fd()) }
}
