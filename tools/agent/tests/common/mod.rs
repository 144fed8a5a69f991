//! An agent process, and a client that does what a script says, over connections that it breaks.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use wire::agent::{
    ClientSession, Ended, Exec, FailCode, FromAgent, News, SessionId, Size, Stream, Task, ToAgent, VERSION,
};
use wire::frame::{HEADER_BYTES, Header, decode_whole, encode};

/// Longest time that a script may take.
const LIMIT: Duration = Duration::from_secs(90);

pub struct Agent {
    process: Child,
    directory: tempfile::TempDir,
}

/// What the client does, and when.
#[derive(Default)]
pub struct Script {
    pub input: Vec<u8>,
    /// Break the connection each time about so many bytes went through.
    pub cut_every: Option<usize>,
    pub signal_at: Option<(Vec<u8>, u8)>,
    pub resize_at: Option<(Vec<u8>, Size)>,
    pub type_at: Option<(Vec<u8>, Vec<u8>)>,
    pub close_at: Option<Vec<u8>>,
}

pub struct Done {
    pub ended: Ended,
    pub out: Vec<u8>,
    pub err: Vec<u8>,
    pub cuts: usize,
}

pub fn exec(argv: &[&str]) -> Task {
    let argv = argv.iter().map(|word| word.as_bytes().to_vec()).collect();
    Task::Exec(Exec { argv, stdin: true, ..Exec::default() })
}

pub struct Wire {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Wire {
    pub fn send(&mut self, message: &ToAgent) {
        self.send_raw(&encode(VERSION, message, 0).unwrap());
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        // A peer that has said why it closes is heard by whoever reads next.
        let _ = self.stream.write_all(bytes);
    }

    /// Waits for a message; `None` at the end.
    pub fn receive(&mut self) -> Option<FromAgent> {
        self.stream.set_read_timeout(Some(LIMIT)).unwrap();
        loop {
            if let Some(message) = self.take() {
                return Some(message);
            }
            if self.fill() == Some(0) {
                return None;
            }
        }
    }

    /// Reads once: how many bytes, or nothing within the time-out.
    fn fill(&mut self) -> Option<usize> {
        let mut bytes = vec![0; 100_000];
        match self.stream.read(&mut bytes) {
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Some(count)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(_) => Some(0),
        }
    }

    fn take(&mut self) -> Option<FromAgent> {
        let header = Header::parse(self.buffer.first_chunk::<HEADER_BYTES>()?).unwrap();
        let length = HEADER_BYTES + header.body_bytes as usize;
        let message = decode_whole(self.buffer.get(..length)?).unwrap().1;
        self.buffer.drain(..length);
        Some(message)
    }
}

impl Agent {
    pub fn start() -> Self {
        Self::start_as("serve")
    }

    /// As `serve`, or with a guard.
    pub fn start_as(subcommand: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mashine-agent"));
        command.arg(subcommand).arg("--unix").arg(directory.path().join("agent")).process_group(0);
        let agent = Self { process: command.spawn().unwrap(), directory };
        agent.await_listening();
        agent
    }

    pub fn await_listening(&self) {
        let begun = Instant::now();
        while UnixStream::connect(self.directory.path().join("agent")).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the agent does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn connect(&self) -> Wire {
        let stream = UnixStream::connect(self.directory.path().join("agent")).unwrap();
        Wire { stream, buffer: Vec::new() }
    }

    pub fn run(&self, task: Task, script: Script) -> Done {
        let mut number = [0; 16];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut number).unwrap();
        let mut run = Run {
            session: ClientSession::new(SessionId(number), task),
            wire: None,
            through: 0,
            typed: 0,
            done: Done {
                ended: Ended::Exited(wire::agent::ExitStatus::Code(255)),
                out: vec![],
                err: vec![],
                cuts: 0,
            },
            script,
        };
        let begun = Instant::now();
        while !run.step(self) {
            assert!(begun.elapsed() < LIMIT, "the session does not end");
        }
        run.done
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // With what a guard started.
        let group = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).unwrap();
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = self.process.wait();
    }
}

struct Run {
    session: ClientSession,
    wire: Option<Wire>,
    through: usize,
    typed: usize,
    done: Done,
    script: Script,
}

impl Run {
    /// One turn; whether it was the last.
    fn step(&mut self, agent: &Agent) -> bool {
        if self.wire.is_none() {
            let wire = agent.connect();
            wire.stream.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
            self.session.connected();
            self.wire = Some(wire);
        }
        self.feed();
        let wire = self.wire.as_mut().unwrap();
        while let Some(message) = self.session.next_message() {
            if let ToAgent::Input { bytes, .. } = &message {
                self.through += bytes.len();
            }
            wire.send(&message);
        }
        if self.session.ended().is_some() {
            return true;
        }
        if wire.fill() == Some(0) {
            assert!(self.script.close_at.is_some(), "the agent closed the connection");
            return true;
        }
        while self.session.ended().is_none()
            && let Some(message) = self.wire.as_mut().and_then(Wire::take)
        {
            // Connections that were closed just now still count for a moment.
            if matches!(message, FromAgent::Failed { code: FailCode::TooManyConnections, .. }) {
                self.session.handle(message).unwrap_err();
                self.wire = None;
                self.session.disconnected();
            } else {
                self.news(message);
            }
        }
        // In the midst of a frame, mostly.
        if self.script.cut_every.is_some_and(|every| self.through >= every) && self.session.ended().is_none()
        {
            self.through = 0;
            self.done.cuts += 1;
            self.wire = None;
            self.session.disconnected();
        }
        false
    }

    fn feed(&mut self) {
        self.typed += self.session.push(&self.script.input[self.typed..]);
        if self.typed == self.script.input.len() && self.script.type_at.is_none() {
            self.session.end_input();
        }
        let seen = |mark: &[u8]| self.done.out.windows(mark.len()).any(|part| part == mark);
        if self.script.resize_at.as_ref().is_some_and(|(mark, _)| seen(mark)) {
            self.session.resize(self.script.resize_at.take().unwrap().1);
        }
        if self.script.signal_at.as_ref().is_some_and(|(mark, _)| seen(mark)) {
            self.session.signal(self.script.signal_at.take().unwrap().1);
        }
        if self.script.close_at.as_ref().is_some_and(|mark| seen(mark)) {
            self.session.close();
        }
        if self.script.type_at.as_ref().is_some_and(|(mark, _)| seen(mark)) {
            let keys = self.script.type_at.as_ref().unwrap().1.clone();
            self.script.type_at = Some((b"never printed".to_vec(), vec![]));
            self.session.push(&keys);
        }
    }

    fn news(&mut self, message: FromAgent) {
        match self.session.handle(message).unwrap() {
            Some(News::Output(stream, bytes)) => {
                self.through += bytes.len();
                self.session.delivered(stream, bytes.len());
                match stream {
                    Stream::Out => self.done.out.extend(bytes),
                    Stream::Err => self.done.err.extend(bytes),
                }
            }
            Some(News::Ended(ended)) => self.done.ended = ended,
            Some(News::Opened) | None => {}
        }
    }
}
