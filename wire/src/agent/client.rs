//! The client's end of a session.
//!
//! ```text
//!            connected                Opened                    Exited
//!   Offline ───────────> Connecting ──────────> Running ──────────────> Ended
//!      ^                     │                     │                      ^
//!      └──── disconnected ───┴─────────────────────┘        Failed ───────┘
//! ```
//!
//! Until the first `Opened` every connection begins with `Open`, from then on with `Resume`. Before `Opened` nothing else is sent.

use std::collections::VecDeque;

use super::messages::{ExitStatus, FailCode, FromAgent, SessionId, Size, Stream, Task, ToAgent};
use super::numbered::{Inbox, Outbox, Violation};
use super::{Request, SIGNALS_MAX};

/// What a message brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// The session runs on this connection.
    Opened,
    /// Output: deliver it, then say so with [`ClientSession::delivered`].
    Output(Stream, Vec<u8>),
    /// The session is over.
    Ended(Ended),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The program ended, and all of its output has been received.
    Exited(ExitStatus),
    /// The agent refused, or does not know the session any more.
    Failed {
        /// Why.
        code: FailCode,
        /// For people.
        detail: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Offline,
    Connecting,
    Running,
    Ended(Ended),
}

/// The client's end of a session; see the module.
#[derive(Debug)]
pub struct ClientSession {
    id: SessionId,
    task: Task,
    phase: Phase,
    was_opened: bool,
    hello_due: bool,
    input: Outbox,
    end_due: bool,
    outputs: [Inbox; 2],
    /// Signals that wait for their acknowledgement; the first has the number `signals_acknowledged + 1`.
    signals: VecDeque<u8>,
    signals_acknowledged: u32,
    /// How many of `signals` were sent on this connection.
    signals_sent: usize,
    size: Option<Size>,
    size_due: bool,
    ping_due: bool,
    close_due: bool,
}

impl ClientSession {
    /// A session that is to do `task`; `id` is random.
    pub fn new(id: SessionId, task: Task) -> Self {
        let size = match &task {
            Task::Exec(exec) => exec.tty,
            Task::Export { .. } | Task::Import { .. } => None,
        };
        Self {
            id,
            task,
            phase: Phase::Offline,
            was_opened: false,
            hello_due: false,
            input: Outbox::default(),
            end_due: false,
            outputs: [Inbox::default(), Inbox::default()],
            signals: VecDeque::new(),
            signals_acknowledged: 0,
            signals_sent: 0,
            size,
            size_due: false,
            ping_due: false,
            close_due: false,
        }
    }

    /// A new connection stands.
    pub fn connected(&mut self) {
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Connecting;
            self.hello_due = true;
            self.ping_due = false;
            for inbox in &mut self.outputs {
                inbox.reconnect();
            }
        }
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Offline;
        }
    }

    /// Whether the agent has ever answered.
    pub fn was_opened(&self) -> bool {
        self.was_opened
    }

    /// Whether the agent has answered on this connection.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// How the session ended, if it did.
    pub fn ended(&self) -> Option<&Ended> {
        match &self.phase {
            Phase::Ended(ended) => Some(ended),
            _ => None,
        }
    }

    /// How many bytes of input are taken now.
    pub fn room(&self) -> usize {
        self.input.room()
    }

    /// Input for the program, at most [`ClientSession::room`]; says how much was taken.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        self.input.push(bytes)
    }

    /// There is no more input.
    pub fn end_input(&mut self) {
        if !self.input.is_ended() {
            self.input.end_stream();
            self.end_due = true;
        }
    }

    /// A signal for the program. Beyond [`SIGNALS_MAX`] that wait it is dropped, and `false` is returned.
    pub fn signal(&mut self, number: u8) -> bool {
        let taken = self.signals.len() < SIGNALS_MAX;
        if taken {
            self.signals.push_back(number);
        }
        taken
    }

    /// The terminal has another size. Only the last one matters, and it is told again after each reconnect.
    pub fn resize(&mut self, size: Size) {
        self.size_due = true;
        self.size = Some(size);
    }

    /// Ask for a sign of life.
    pub fn ping(&mut self) {
        self.ping_due = true;
    }

    /// Give the session up; what runs is hung up.
    pub fn close(&mut self) {
        self.close_due = true;
    }

    /// `bytes` of output have reached whom they are for.
    pub fn delivered(&mut self, stream: Stream, bytes: usize) {
        self.outputs[stream.index()].deliver(bytes);
    }

    /// A message from the agent.
    ///
    /// # Errors
    /// [`Violation`]: the connection must end; the session may be resumed on another.
    pub fn handle(&mut self, message: FromAgent) -> Result<Option<News>, Violation> {
        match (&self.phase, message) {
            (Phase::Ended(_) | Phase::Offline, _) => {
                Err(Violation::Unexpected("a message without a session"))
            }
            (_, FromAgent::Pong) => Ok(None),
            (_, FromAgent::Failed { code: FailCode::Superseded, .. }) => {
                Err(Violation::Unexpected("another connection took the session"))
            }
            // Connections that are dead without the agent's knowledge: another attempt may find room.
            (_, FromAgent::Failed { code: FailCode::TooManyConnections, .. }) => {
                Err(Violation::Unexpected("one connection too many"))
            }
            (_, FromAgent::Failed { code, detail }) => Ok(Some(self.end(Ended::Failed { code, detail }))),
            (Phase::Connecting, FromAgent::Opened { input_received, signals_received }) => {
                self.opened(input_received, signals_received)?;
                Ok(Some(News::Opened))
            }
            (Phase::Connecting, _) => Err(Violation::Unexpected("a message before Opened")),
            (Phase::Running, FromAgent::Output { stream, offset, bytes }) => {
                let new = self.outputs[stream.index()].accept(offset, &bytes)?;
                Ok((!new.is_empty()).then(|| News::Output(stream, new.to_vec())))
            }
            (Phase::Running, FromAgent::InputAck { offset }) => {
                self.input.acknowledge(offset)?;
                Ok(None)
            }
            (Phase::Running, FromAgent::SignalAck { sequence }) => {
                self.signals_delivered(sequence)?;
                Ok(None)
            }
            (Phase::Running, FromAgent::Exited { status, ends }) => {
                for (inbox, end) in self.outputs.iter_mut().zip(ends) {
                    inbox.accept_end(end)?;
                }
                Ok(Some(self.end(Ended::Exited(status))))
            }
            (Phase::Running, FromAgent::Opened { .. } | FromAgent::Info(_) | FromAgent::Done) => {
                Err(Violation::Unexpected("an answer within a session"))
            }
        }
    }

    fn end(&mut self, ended: Ended) -> News {
        self.close_due = matches!(ended, Ended::Exited(_));
        self.phase = Phase::Ended(ended.clone());
        News::Ended(ended)
    }

    fn opened(&mut self, input_received: u64, signals_received: u32) -> Result<(), Violation> {
        self.input.resume_from(input_received)?;
        self.signals_delivered(signals_received)?;
        self.signals_sent = 0;
        self.end_due = self.input.is_ended();
        // The size in `Open` is enough for the first connection.
        self.size_due |= self.was_opened;
        self.was_opened = true;
        self.phase = Phase::Running;
        Ok(())
    }

    fn signals_delivered(&mut self, sequence: u32) -> Result<(), Violation> {
        let beyond = || Violation::Unexpected("an acknowledgement of signals that were not sent");
        let delivered = sequence.checked_sub(self.signals_acknowledged).ok_or_else(beyond)?;
        let delivered = usize::try_from(delivered).map_err(|_| beyond())?;
        if delivered > self.signals.len() {
            return Err(beyond());
        }
        self.signals.drain(..delivered);
        self.signals_sent = self.signals_sent.saturating_sub(delivered);
        self.signals_acknowledged = sequence;
        Ok(())
    }

    /// The next message for the connection, or nothing for now. Asked only when the connection can take one.
    pub fn next_message(&mut self) -> Option<ToAgent> {
        match self.phase {
            Phase::Offline => None,
            Phase::Connecting => {
                if std::mem::take(&mut self.hello_due) {
                    return Some(self.hello());
                }
                // A peer that never says Opened is found out by this.
                std::mem::take(&mut self.ping_due).then_some(ToAgent::Request(Request::Ping))
            }
            Phase::Running => self.next_running(),
            Phase::Ended(_) => std::mem::take(&mut self.close_due).then_some(ToAgent::Close),
        }
    }

    fn hello(&self) -> ToAgent {
        let session = self.id;
        if self.was_opened {
            ToAgent::Resume { session, received: [self.outputs[0].received(), self.outputs[1].received()] }
        } else {
            ToAgent::Open { session, task: self.task.clone() }
        }
    }

    fn next_running(&mut self) -> Option<ToAgent> {
        if std::mem::take(&mut self.close_due) {
            return Some(ToAgent::Close);
        }
        if let Some(&number) = self.signals.get(self.signals_sent) {
            self.signals_sent += 1;
            let place = u32::try_from(self.signals_sent).unwrap_or(u32::MAX);
            return Some(ToAgent::Signal {
                sequence: self.signals_acknowledged.saturating_add(place),
                number,
            });
        }
        if let Some(size) = self.size.filter(|_| std::mem::take(&mut self.size_due)) {
            return Some(ToAgent::Resize(size));
        }
        for stream in Stream::ALL {
            if let Some(offset) = self.outputs[stream.index()].next_ack() {
                return Some(ToAgent::Ack { stream, offset });
            }
        }
        if std::mem::take(&mut self.ping_due) {
            return Some(ToAgent::Request(Request::Ping));
        }
        if let Some((offset, bytes)) = self.input.next_chunk() {
            return Some(ToAgent::Input { offset, bytes });
        }
        std::mem::take(&mut self.end_due).then(|| ToAgent::InputEnd { offset: self.input.end() })
    }
}
