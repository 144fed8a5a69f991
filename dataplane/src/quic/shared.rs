//! The state of one connection: what the driver, the handle and the streams all look at.
//!
//! All of them live on one thread, so a `RefCell` is enough; no borrow is ever held across an `await`.
//!
//! ```text
//!   Handshaking --Connected--> Established --+
//!        |                                   |
//!        +----- lost or closed --------------+--> Lost(reason)
//! ```

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use pki::PeerIdentity;
use quinn_proto::{Dir, Event, StreamEvent, StreamId, VarInt};
use rustls::pki_types::CertificateDer;

use super::Lost;
use super::notify::{Bell, Waiters};

/// Code of a connection that is closed because the peer's certificate names no member of the fleet.
const CODE_STRANGER: u32 = 1;

#[derive(Debug, Clone)]
pub(super) enum Phase {
    Handshaking,
    Established(PeerIdentity),
    Lost(Lost),
}

/// What has become of a stream that we send on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Open,
    /// Finished, and the peer has acknowledged every byte.
    Acknowledged,
    Stopped(VarInt),
}

pub(super) struct Sending {
    pub(super) fate: Fate,
    pub(super) waiter: Option<Waker>,
}

pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    pub(super) phase: Phase,
    /// One entry for each live `RecvStream` that waits.
    pub(super) readers: HashMap<StreamId, Waker>,
    /// One entry for each live `SendStream`.
    pub(super) sending: HashMap<StreamId, Sending>,
    opening: [Waiters; 2],
    accepting: [Waiters; 2],
    /// Tasks that wait for a change of phase.
    pub(super) phase_waiters: Waiters,
}

pub(super) struct Shared {
    pub(super) key: usize,
    pub(super) state: RefCell<State>,
    bell: Rc<Bell>,
    /// Whether the driver's list holds this connection already.
    queued: Cell<bool>,
    /// When the connection wants to be looked at again though nothing happens.
    pub(super) deadline: Cell<Option<Instant>>,
}

impl Shared {
    pub(super) fn new(key: usize, proto: quinn_proto::Connection, bell: Rc<Bell>) -> Rc<Self> {
        let state = State {
            proto,
            phase: Phase::Handshaking,
            readers: HashMap::new(),
            sending: HashMap::new(),
            opening: [Waiters::default(), Waiters::default()],
            accepting: [Waiters::default(), Waiters::default()],
            phase_waiters: Waiters::default(),
        };
        Rc::new(Self {
            key,
            state: RefCell::new(state),
            bell,
            queued: Cell::new(false),
            deadline: Cell::new(None),
        })
    }

    /// Has the driver look after this connection soon.
    pub(super) fn touch(&self) {
        if !self.queued.replace(true) {
            self.bell.touch(self.key);
        }
    }

    /// The driver has taken this connection off its list.
    pub(super) fn taken(&self) {
        self.queued.set(false);
    }

    /// Ends the connection from this side; no effect when it has ended already.
    pub(super) fn close(&self, code: VarInt, reason: &str) {
        let mut state = self.state.borrow_mut();
        if let Phase::Lost(_) = state.phase {
            return;
        }
        state.proto.close(Instant::now(), code, Bytes::copy_from_slice(reason.as_bytes()));
        state.lose(Lost::ClosedLocally);
        drop(state);
        self.touch();
    }
}

impl State {
    /// The reason, once the connection is gone.
    pub(super) fn lost(&self) -> Option<&Lost> {
        match &self.phase {
            Phase::Lost(lost) => Some(lost),
            _ => None,
        }
    }

    pub(super) fn opening(&mut self, dir: Dir) -> &mut Waiters {
        &mut self.opening[slot(dir)]
    }

    pub(super) fn accepting(&mut self, dir: Dir) -> &mut Waiters {
        &mut self.accepting[slot(dir)]
    }

    /// Takes over what the protocol has to say and wakes whom it concerns.
    pub(super) fn apply(&mut self, event: Event) {
        match event {
            Event::Connected => self.establish(),
            Event::ConnectionLost { reason } => self.lose(reason.into()),
            Event::Stream(event) => self.apply_stream(event),
            Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {}
        }
    }

    fn apply_stream(&mut self, event: StreamEvent) {
        match event {
            StreamEvent::Opened { dir } => self.accepting(dir).wake_all(),
            StreamEvent::Available { dir } => self.opening(dir).wake_all(),
            StreamEvent::Readable { id } => {
                if let Some(waker) = self.readers.remove(&id) {
                    waker.wake();
                }
            }
            StreamEvent::Writable { id } => self.wake_sender(id, None),
            StreamEvent::Finished { id } => self.wake_sender(id, Some(Fate::Acknowledged)),
            StreamEvent::Stopped { id, error_code } => self.wake_sender(id, Some(Fate::Stopped(error_code))),
        }
    }

    fn wake_sender(&mut self, id: StreamId, fate: Option<Fate>) {
        if let Some(sending) = self.sending.get_mut(&id) {
            sending.fate = fate.unwrap_or(sending.fate);
            if let Some(waker) = sending.waiter.take() {
                waker.wake();
            }
        }
    }

    fn establish(&mut self) {
        let certificates = self
            .proto
            .crypto_session()
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
            .unwrap_or_default();
        match PeerIdentity::from_chain(&certificates) {
            Ok(peer) => {
                self.phase = Phase::Established(peer);
                self.phase_waiters.wake_all();
            }
            Err(error) => {
                self.proto.close(
                    Instant::now(),
                    CODE_STRANGER.into(),
                    Bytes::from_static(b"no fleet identity"),
                );
                self.lose(Lost::Stranger(Arc::new(error)));
            }
        }
    }

    /// Enters the final phase and wakes everybody: nothing else will.
    pub(super) fn lose(&mut self, lost: Lost) {
        if self.lost().is_none() {
            self.phase = Phase::Lost(lost);
        }
        self.phase_waiters.wake_all();
        self.readers.drain().for_each(|(_, waker)| waker.wake());
        self.sending.values_mut().filter_map(|sending| sending.waiter.take()).for_each(Waker::wake);
        self.opening.iter_mut().chain(&mut self.accepting).for_each(Waiters::wake_all);
    }
}

fn slot(dir: Dir) -> usize {
    match dir {
        Dir::Bi => 0,
        Dir::Uni => 1,
    }
}
