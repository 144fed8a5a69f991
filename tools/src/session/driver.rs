//! A session from its begin to its end.
//!
//! ```text
//!   connect ──> serve: messages both ways, input, output ──> ended ──> wait for the last output to be written
//!      ^           │ the connection breaks
//!      └─ pause <──┘            0.1 s, doubled up to 5 s, until the limit
//! ```

use std::io;
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use wire::agent::{
    ClientSession, Ended, FailCode, FromAgent, News, Request, SessionId, Stream, Task, ToAgent, VERSION,
    Violation,
};
use wire::frame::{EncodeError, FrameError, decode_whole, encode};

use super::ends::{Control, Ends, Input, write_out};
use super::transport::{Transport, TransportError};

/// How patient a session is.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a lost connection is tried for.
    pub reconnect_limit: Duration,
    /// Silence after which the user is told.
    pub tell_after: Duration,
    /// Silence after which the agent is asked for a sign of life; after three times that the connection counts as lost.
    pub ping_after: Duration,
    /// Where the user is told; standard error if true, nowhere otherwise.
    pub tell: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            reconnect_limit: Duration::from_secs(300),
            tell_after: Duration::from_secs(2),
            ping_after: Duration::from_secs(5),
            tell: true,
        }
    }
}

/// First pause before another attempt, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// As a shell would say it.
    pub exit_code: u8,
    /// How many connections it took.
    pub connections: u32,
}

/// Why a session has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The agent said no.
    #[error("{detail}")]
    Refused {
        /// Why.
        code: FailCode,
        /// For people.
        detail: String,
    },
    /// The agent could not be reached for too long.
    #[error("the guest's agent cannot be reached: {0}")]
    Unreachable(#[source] TransportError),
    /// Nobody here wants it any more; what ran is hung up.
    #[error("the session was given up")]
    GivenUp,
    /// Output cannot be written here.
    #[error("output cannot be written")]
    Output(#[source] io::Error),
    /// The task does not fit into a message.
    #[error("the command is too long")]
    TooLong(#[from] EncodeError),
    /// The agent broke the protocol.
    #[error("the agent's answer makes no sense")]
    Answer,
}

/// Why a connection is not used any further.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("the agent's message makes no sense")]
    Violation(#[from] Violation),
    #[error("no sign of life")]
    Silent,
    #[error(transparent)]
    Fatal(#[from] SessionError),
}

impl Broken {
    /// The end of the session, or why another connection is worth trying.
    fn retry(self) -> Result<TransportError, SessionError> {
        match self {
            Self::Fatal(error) => Err(error),
            Self::Transport(TransportError::Refused(error)) => {
                Err(SessionError::Unreachable(TransportError::Refused(error)))
            }
            Self::Transport(error) => Ok(error),
            other => Ok(TransportError::Lost(Box::new(other))),
        }
    }
}

struct Driver {
    session: ClientSession,
    input: mpsc::Receiver<Input>,
    control: mpsc::Receiver<Control>,
    control_open: bool,
    /// Input that the session has no room for yet.
    held: Vec<u8>,
    input_open: bool,
    outputs: [mpsc::UnboundedSender<Vec<u8>>; 2],
    written: mpsc::UnboundedReceiver<io::Result<(Stream, usize)>>,
    unwritten: usize,
    options: Options,
}

/// Runs a session: begins it, connects again whenever the connection is lost, and returns when it has ended and its output is written.
///
/// # Errors
/// [`SessionError`].
pub async fn run<T, F, O, E>(
    id: SessionId,
    task: Task,
    ends: Ends<O, E>,
    options: Options,
    connect: impl Fn() -> F,
) -> Result<Outcome, SessionError>
where
    T: Transport,
    F: Future<Output = Result<T, TransportError>>,
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    let (out, out_pieces) = mpsc::unbounded_channel();
    let (err, err_pieces) = mpsc::unbounded_channel();
    let (written_to, written) = mpsc::unbounded_channel();
    let driver = Driver {
        session: ClientSession::new(id, task),
        input: ends.input,
        control: ends.control,
        control_open: true,
        held: Vec::new(),
        input_open: true,
        outputs: [out, err],
        written,
        unwritten: 0,
        options,
    };
    let writers = async {
        tokio::join!(
            write_out(ends.out, Stream::Out, out_pieces, written_to.clone()),
            write_out(ends.err, Stream::Err, err_pieces, written_to.clone()),
        );
        // Either end may fail and stop; the driver is told and ends.
        std::future::pending::<()>().await
    };
    tokio::select! {
        outcome = driver.drive(connect) => outcome,
        () = writers => Err(SessionError::Answer),
    }
}

impl Driver {
    async fn drive<T, F>(mut self, connect: impl Fn() -> F) -> Result<Outcome, SessionError>
    where
        T: Transport,
        F: Future<Output = Result<T, TransportError>>,
    {
        let mut connections = 0;
        let mut lost_since = Instant::now();
        let mut pause = PAUSES.0;
        let mut told = false;
        loop {
            let attempt = timeout(self.options.ping_after * 3, connect());
            let broken = match attempt.await.unwrap_or(Err(TransportError::Lost("no answer".into()))) {
                Ok(mut transport) => {
                    connections += 1;
                    self.session.connected();
                    let served = self.serve(&mut transport, &mut told).await;
                    if matches!(served, Err(Broken::Fatal(_))) {
                        self.give_up(&mut transport).await;
                    }
                    let was_good = self.session.is_running();
                    self.session.disconnected();
                    if served.is_ok() {
                        let exit_code = self.finish().await?;
                        return Ok(Outcome { exit_code, connections });
                    }
                    if was_good {
                        (lost_since, pause) = (Instant::now(), PAUSES.0);
                    }
                    served.err().unwrap_or(Broken::Silent)
                }
                Err(error) => Broken::Transport(error),
            };
            let error = broken.retry()?;
            let silence = lost_since.elapsed();
            if silence >= self.options.reconnect_limit {
                return Err(SessionError::Unreachable(error));
            }
            if silence >= self.options.tell_after && !std::mem::replace(&mut told, true) {
                self.tell(&format!("[connection to the machine lost ({error}); trying again]"));
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn tell(&self, text: &str) {
        if self.options.tell {
            // A terminal may be raw: back to its first column.
            eprint!("\r\n{text}\r\n");
        }
    }

    /// Carries messages both ways until the session has ended.
    async fn serve(&mut self, transport: &mut impl Transport, told: &mut bool) -> Result<(), Broken> {
        let mut heard = Instant::now();
        let mut ping_at = heard + self.options.ping_after;
        loop {
            self.send_all(transport).await?;
            if self.session.ended().is_some() {
                return Ok(());
            }
            let takes_input = self.input_open && self.held.is_empty() && self.session.room() > 0;
            tokio::select! {
                frame = transport.recv() => {
                    let frame = frame?.ok_or_else(|| TransportError::Lost("the connection ended".into()))?;
                    heard = Instant::now();
                    ping_at = heard + self.options.ping_after;
                    self.take(&frame)?;
                    if self.session.is_running() && std::mem::take(told) {
                        self.tell("[connected again]");
                    }
                }
                input = self.input.recv(), if takes_input => match input {
                    Some(Input::Bytes(bytes)) => self.held = bytes,
                    Some(Input::End) | None => self.input_open = false,
                },
                control = self.control.recv(), if self.control_open => self.control(control)?,
                Some(written) = self.written.recv() => self.account(written)?,
                () = tokio::time::sleep_until(ping_at) => {
                    if heard.elapsed() >= self.options.ping_after * 3 {
                        return Err(Broken::Silent);
                    }
                    self.session.ping();
                    ping_at = Instant::now() + self.options.ping_after;
                }
            }
        }
    }

    /// Tells the agent that nobody will come back: it hangs the program up, which would else wait [`wire::agent::DETACHED_US_MAX`] for it.
    async fn give_up(&mut self, transport: &mut impl Transport) {
        let limit = self.options.ping_after;
        self.session.close();
        let told = async {
            // Until the other end has closed it: a connection that breaks under what is sent to us may lose what we said.
            loop {
                self.send_all(transport).await?;
                let Some(frame) = transport.recv().await? else { return Ok::<(), Broken>(()) };
                self.take(&frame)?;
            }
        };
        let _best_effort = timeout(limit, told).await;
    }

    async fn send_all(&mut self, transport: &mut impl Transport) -> Result<(), Broken> {
        loop {
            let pushed = self.session.push(&self.held);
            self.held.drain(..pushed);
            if !self.input_open && self.held.is_empty() {
                self.session.end_input();
            }
            let Some(message) = self.session.next_message() else { return Ok(()) };
            let frame = encode(VERSION, &message, 0).map_err(SessionError::TooLong)?;
            let sent = timeout(self.options.ping_after * 3, transport.send(&frame)).await;
            let ended = self.session.ended().is_some();
            match sent {
                // What is said after the end is a courtesy.
                Ok(Err(_)) | Err(_) if ended => return Ok(()),
                Ok(sent) => sent?,
                Err(_) => return Err(Broken::Silent),
            }
        }
    }

    fn take(&mut self, frame: &[u8]) -> Result<(), Broken> {
        let (_, message) = decode_whole::<FromAgent>(frame).map_err(TransportError::Frame)?;
        if let Some(News::Output(stream, bytes)) = self.session.handle(message)? {
            self.unwritten += bytes.len();
            // A writer that has stopped has said why.
            let _ = self.outputs[stream.index()].send(bytes);
        }
        Ok(())
    }

    fn control(&mut self, control: Option<Control>) -> Result<(), SessionError> {
        match control {
            // More than are remembered are more than anybody means.
            Some(Control::Signal(number)) => drop(self.session.signal(number)),
            Some(Control::Resize(size)) => self.session.resize(size),
            Some(Control::Close) => return Err(SessionError::GivenUp),
            None => self.control_open = false,
        }
        Ok(())
    }

    fn account(&mut self, written: io::Result<(Stream, usize)>) -> Result<(), SessionError> {
        let (stream, bytes) = written.map_err(SessionError::Output)?;
        self.unwritten = self.unwritten.saturating_sub(bytes);
        self.session.delivered(stream, bytes);
        Ok(())
    }

    /// Waits until everything is written, and gives the exit code.
    async fn finish(&mut self) -> Result<u8, SessionError> {
        while self.unwritten > 0 {
            let Some(written) = self.written.recv().await else { break };
            self.account(written)?;
        }
        match self.session.ended() {
            Some(Ended::Exited(status)) => Ok(status.shell_code()),
            Some(Ended::Failed { code, detail }) => {
                Err(SessionError::Refused { code: *code, detail: detail.clone() })
            }
            None => Err(SessionError::Answer),
        }
    }
}

/// Asks the agent something, once.
///
/// # Errors
/// [`SessionError`]; nothing is tried again.
pub async fn ask(transport: &mut impl Transport, request: Request) -> Result<FromAgent, SessionError> {
    let frame = encode(VERSION, &ToAgent::Request(request), 0)?;
    let lost = SessionError::Unreachable;
    transport.send(&frame).await.map_err(lost)?;
    let ended = || SessionError::Unreachable(TransportError::Lost("the connection ended".into()));
    let answer = transport.recv().await.map_err(lost)?.ok_or_else(ended)?;
    let decoded: Result<(u16, FromAgent), FrameError> = decode_whole(&answer);
    match decoded {
        Ok((_, FromAgent::Failed { code, detail })) => Err(SessionError::Refused { code, detail }),
        Ok((_, answer)) => Ok(answer),
        Err(error) => Err(SessionError::Unreachable(TransportError::Frame(error))),
    }
}
