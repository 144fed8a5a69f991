//! The agent's end of a session.
//!
//! ```text
//!             attach                    exit known, streams ended, all sent
//!   Detached ────────> Attached ──────────────────────────────────────────> Attached, Exited was sent
//!      ^  │               │                                                       │ Close
//!      │  │ too long      │ connection lost                                       v
//!      │  v               │                                                     closed
//!      │ Hangup ─> Kill   │
//!      └──────────────────┘
//! ```
//!
//! The program does not notice any of this but the back-pressure: its output is taken while [`AgentSession::room`] says so.

use super::messages::{ExitStatus, FromAgent, Size, Stream, ToAgent};
use super::numbered::{Inbox, Outbox, Violation};
use super::{DETACHED_US_MAX, HANGUP_GRACE_US};
use crate::units::Instant;

/// What a message asks of the program's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Demand {
    /// Write these bytes to the program, then say so with [`AgentSession::input_written`].
    Write(Vec<u8>),
    /// End the program's input once everything is written.
    EndInput,
    /// Send the program a signal.
    Signal(u8),
    /// Set the size of its terminal.
    Resize(Size),
    /// Answer [`FromAgent::Pong`].
    Pong,
    /// Forget the session, hang up what runs.
    Close,
}

/// What is due with a session that nobody is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reap {
    /// Send SIGHUP.
    Hangup,
    /// Send SIGKILL and forget the session.
    Kill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    Attached,
    Detached { since: Instant },
    HungUp { at: Instant },
}

/// The agent's end of a session; see the module.
#[derive(Debug)]
pub struct AgentSession {
    outputs: [Outbox; 2],
    input: Inbox,
    signals: u32,
    exit: Option<ExitStatus>,
    presence: Presence,
    opened_due: bool,
    signal_ack_due: bool,
    exit_due: bool,
}

impl AgentSession {
    /// A session that has just begun, not yet attached to a connection.
    pub fn new(now: Instant) -> Self {
        Self {
            outputs: [Outbox::default(), Outbox::default()],
            input: Inbox::default(),
            signals: 0,
            exit: None,
            presence: Presence::Detached { since: now },
            opened_due: false,
            signal_ack_due: false,
            exit_due: false,
        }
    }

    /// A connection whose client has `received` of the outputs.
    ///
    /// # Errors
    /// When output after that is forgotten, or was never sent.
    pub fn attach(&mut self, received: [u64; 2]) -> Result<(), Violation> {
        for (outbox, received) in self.outputs.iter_mut().zip(received) {
            outbox.resume_from(received)?;
        }
        self.input.reconnect();
        self.presence = Presence::Attached;
        self.opened_due = true;
        self.signal_ack_due = false;
        self.exit_due = self.exit.is_some();
        Ok(())
    }

    /// The connection is gone.
    pub fn detach(&mut self, now: Instant) {
        if self.presence == Presence::Attached {
            self.presence = Presence::Detached { since: now };
        }
    }

    /// A message on the session's connection.
    ///
    /// # Errors
    /// [`Violation`]: the connection must end.
    pub fn handle(&mut self, message: ToAgent) -> Result<Option<Demand>, Violation> {
        Ok(match message {
            ToAgent::Input { offset, bytes } => {
                let new = self.input.accept(offset, &bytes)?;
                (!new.is_empty()).then(|| Demand::Write(new.to_vec()))
            }
            ToAgent::InputEnd { offset } => self.input.accept_end(offset)?.then_some(Demand::EndInput),
            ToAgent::Signal { sequence, number } => self.signal(sequence, number)?,
            ToAgent::Resize(size) => Some(Demand::Resize(size)),
            ToAgent::Ack { stream, offset } => {
                self.outputs[stream.index()].acknowledge(offset)?;
                None
            }
            ToAgent::Request(super::Request::Ping) => Some(Demand::Pong),
            ToAgent::Close => Some(Demand::Close),
            ToAgent::Request(_) => return Err(Violation::Unexpected("a request within a session")),
            ToAgent::Open { .. } | ToAgent::Resume { .. } => {
                return Err(Violation::Unexpected("a session within a session"));
            }
        })
    }

    fn signal(&mut self, sequence: u32, number: u8) -> Result<Option<Demand>, Violation> {
        let next = self.signals.saturating_add(1);
        if sequence > next {
            return Err(Violation::Gap { offset: sequence.into(), expected: next.into() });
        }
        self.signal_ack_due = true;
        let is_new = sequence == next;
        if is_new {
            self.signals = sequence;
        }
        Ok(is_new.then_some(Demand::Signal(number)))
    }

    /// The program has taken `bytes` of what [`Demand::Write`] gave, or will never take them.
    pub fn input_written(&mut self, bytes: usize) {
        self.input.deliver(bytes);
    }

    /// How many bytes of output are taken now.
    pub fn room(&self, stream: Stream) -> usize {
        self.outputs[stream.index()].room()
    }

    /// Output of the program, at most [`AgentSession::room`]; says how much was taken.
    pub fn push(&mut self, stream: Stream, bytes: &[u8]) -> usize {
        self.outputs[stream.index()].push(bytes)
    }

    /// The program will write no more to this stream.
    pub fn end_output(&mut self, stream: Stream) {
        self.outputs[stream.index()].end_stream();
    }

    /// Whether the stream has ended.
    pub fn is_output_ended(&self, stream: Stream) -> bool {
        self.outputs[stream.index()].is_ended()
    }

    /// The program has ended.
    pub fn exited(&mut self, status: ExitStatus) {
        if self.exit.is_none() {
            self.exit = Some(status);
            self.exit_due = true;
        }
    }

    /// Whether the program has ended.
    pub fn has_exited(&self) -> bool {
        self.exit.is_some()
    }

    /// The next message for the connection, or nothing for now. Asked only when the connection can take one.
    pub fn next_message(&mut self) -> Option<FromAgent> {
        if self.presence != Presence::Attached {
            return None;
        }
        if std::mem::take(&mut self.opened_due) {
            return Some(FromAgent::Opened {
                input_received: self.input.received(),
                signals_received: self.signals,
            });
        }
        // `Exited` is the last word on a connection; input that comes after it is not acknowledged any more.
        if self.exit.is_some() && !self.exit_due {
            return None;
        }
        if std::mem::take(&mut self.signal_ack_due) {
            return Some(FromAgent::SignalAck { sequence: self.signals });
        }
        if let Some(offset) = self.input.next_ack() {
            return Some(FromAgent::InputAck { offset });
        }
        // The shorter stream first: what a program says on its standard error is not held up by a flood on the other.
        for stream in [Stream::Err, Stream::Out] {
            if let Some((offset, bytes)) = self.outputs[stream.index()].next_chunk() {
                return Some(FromAgent::Output { stream, offset, bytes });
            }
        }
        let over = self.outputs.iter().all(|outbox| outbox.is_ended() && outbox.is_all_sent());
        match self.exit {
            Some(status) if over && std::mem::take(&mut self.exit_due) => {
                Some(FromAgent::Exited { status, ends: [self.outputs[0].end(), self.outputs[1].end()] })
            }
            _ => None,
        }
    }

    /// When [`AgentSession::reap`] wants to be asked.
    pub fn deadline(&self) -> Option<Instant> {
        match self.presence {
            Presence::Attached => None,
            Presence::Detached { since } => Some(since.plus_us(DETACHED_US_MAX)),
            Presence::HungUp { at } => Some(at.plus_us(HANGUP_GRACE_US)),
        }
    }

    /// What is due now. A session that was hung up can still be taken up, until it is killed.
    pub fn reap(&mut self, now: Instant) -> Option<Reap> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        match self.presence {
            Presence::Detached { .. } if self.exit.is_none() => {
                self.presence = Presence::HungUp { at: now };
                Some(Reap::Hangup)
            }
            _ => Some(Reap::Kill),
        }
    }
}
