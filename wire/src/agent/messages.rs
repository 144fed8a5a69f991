//! Messages between client and agent.

#![allow(
    missing_docs,
    reason = "rkyv's derive makes undocumented items for enum variants; ours are documented"
)]

use std::fmt;
use std::str::FromStr;

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::ParseIdError;

/// A session, chosen by the client at random: who knows the number may take the session up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s-{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for SessionId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("s-")
            .filter(|hex| hex.len() == 32 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
            .and_then(|hex| u128::from_str_radix(hex, 16).ok())
            .map(|number| Self(number.to_be_bytes()))
            .ok_or_else(|| ParseIdError::Malformed { prefix: "s-", text: text.to_owned() })
    }
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Size {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

/// An environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Variable {
    /// Its name: not empty, without `=` and NUL.
    pub name: Vec<u8>,
    /// Its value, without NUL.
    pub value: Vec<u8>,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Exec {
    /// Program and arguments. Empty: the user's login shell.
    pub argv: Vec<Vec<u8>>,
    /// Variables besides PATH, HOME, USER, LOGNAME and SHELL, which the agent sets; these go before its own.
    pub env: Vec<Variable>,
    /// Directory to start in; the user's home if not given.
    pub cwd: Option<Vec<u8>>,
    /// Name, or number, in the guest's `/etc/passwd`; root if not given.
    pub user: Option<String>,
    /// A terminal of this size, instead of pipes. Output is then all in [`Stream::Out`].
    pub tty: Option<Size>,
    /// Whether there is input. Without it, the program reads an end of file.
    pub stdin: bool,
}

/// What a session does.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Task {
    /// Run a program.
    Exec(Exec),
    /// Give a file or directory as a tar stream on [`Stream::Out`]. Its first path component is the base name of `path`.
    Export {
        /// Absolute path in the guest.
        path: Vec<u8>,
        /// As whom; root if not given.
        user: Option<String>,
    },
    /// Unpack the tar stream that comes as input. If `path` is a directory, below it; if it does not exist, or is a file, what the stream
    /// carries is given that name.
    Import {
        /// Absolute path in the guest.
        path: Vec<u8>,
        /// As whom; root if not given.
        user: Option<String>,
    },
}

/// An output stream of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Stream {
    /// Standard output, or everything from a terminal.
    Out,
    /// Standard error.
    Err,
}

impl Stream {
    /// Both, in the order of arrays.
    pub const ALL: [Self; 2] = [Self::Out, Self::Err];

    /// Its place in arrays.
    pub const fn index(self) -> usize {
        match self {
            Self::Out => 0,
            Self::Err => 1,
        }
    }
}

/// Asked and answered once, without a session.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Request {
    /// How is the guest? Answer: [`FromAgent::Info`].
    Info,
    /// Set the wall clock, after a move or a long sleep. Answer: [`FromAgent::Done`].
    SetTime {
        /// Nanoseconds since 1970 (CLOCK_REALTIME).
        realtime_ns: u64,
    },
    /// End the guest in good order. Answer: [`FromAgent::Done`] when it has begun.
    Shutdown {
        /// Start it again.
        reboot: bool,
    },
    /// Is the connection alive? Answer: [`FromAgent::Pong`]. The only one that may be asked within a session.
    Ping,
}

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum ToAgent {
    /// Without a session.
    Request(Request),
    /// Begin a session. If the agent knows the id, as [`ToAgent::Resume`] with nothing received: so it can be repeated when the answer was lost.
    Open {
        /// The session.
        session: SessionId,
        /// What it does.
        task: Task,
    },
    /// Take a session up again. A connection that still has it is dropped.
    Resume {
        /// The session.
        session: SessionId,
        /// Bytes received of [`Stream::ALL`].
        received: [u64; 2],
    },
    /// Bytes for the program.
    Input {
        /// Number of the first.
        offset: u64,
        /// At most [`super::CHUNK_BYTES`].
        bytes: Vec<u8>,
    },
    /// No more input.
    InputEnd {
        /// How many bytes there were.
        offset: u64,
    },
    /// A signal for the process group of the program.
    Signal {
        /// 1 for the first signal of the session, and so on.
        sequence: u32,
        /// Its number on Linux.
        number: u8,
    },
    /// The terminal has another size.
    Resize(Size),
    /// Output was delivered: the agent may forget it.
    Ack {
        /// Of which stream.
        stream: Stream,
        /// Everything before this.
        offset: u64,
    },
    /// Forget the session. What still runs is hung up.
    Close,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum ExitStatus {
    /// It exited.
    Code(u8),
    /// A signal ended it.
    Signal(u8),
}

impl ExitStatus {
    /// As a shell tells it: 128 and the signal's number.
    pub const fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128u8.saturating_add(number),
        }
    }
}

/// Why the agent does not do what it was asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FailCode {
    /// The program, directory or file does not exist.
    NotFound,
    /// The program exists and cannot be executed.
    NotExecutable,
    /// The user does not exist.
    NoSuchUser,
    /// The session was never opened here, was closed, or was given up.
    NoSuchSession,
    /// The agent has as many sessions as it takes.
    TooManySessions,
    /// The agent has as many connections as it takes.
    TooManyConnections,
    /// A message that makes no sense, or not here.
    BadRequest,
    /// Another version of the protocol.
    Version,
    /// Another connection has taken the session up.
    Superseded,
    /// The guest's kernel said no.
    System,
}

impl FailCode {
    /// Exit code of a command that failed so, after the shells' convention.
    pub const fn shell_code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            _ => 125,
        }
    }
}

/// How a guest is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Info {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Time since boot, in milliseconds.
    pub uptime_ms: u64,
    /// Load of 1, 5 and 15 minutes, in thousandths.
    pub load_milli: [u32; 3],
    /// Memory that the kernel manages, in bytes.
    pub memory_bytes: u64,
    /// Of it available to programs, in bytes.
    pub memory_available_bytes: u64,
    /// Host name.
    pub hostname: String,
    /// Kernel release.
    pub kernel: String,
    /// Version of the agent.
    pub agent: String,
    /// Addresses of all interfaces but loopback, without link-local ones.
    pub addresses: Vec<String>,
    /// The guest's wall clock, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Sessions that are open.
    pub sessions: u32,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FromAgent {
    /// Answer to [`Request::Info`].
    Info(Box<Info>),
    /// It was done.
    Done,
    /// Answer to [`Request::Ping`].
    Pong,
    /// The session runs on this connection.
    Opened {
        /// Bytes of input that have arrived.
        input_received: u64,
        /// Signals that have been delivered.
        signals_received: u32,
    },
    /// Bytes from the program.
    Output {
        /// Of which stream.
        stream: Stream,
        /// Number of the first.
        offset: u64,
        /// At most [`super::CHUNK_BYTES`].
        bytes: Vec<u8>,
    },
    /// The program has taken input: the client may forget it.
    InputAck {
        /// Everything before this.
        offset: u64,
    },
    /// Signals have been delivered.
    SignalAck {
        /// Up to this one.
        sequence: u32,
    },
    /// The program has ended, and all of its output has been sent.
    Exited {
        /// How.
        status: ExitStatus,
        /// How many bytes there were in [`Stream::ALL`].
        ends: [u64; 2],
    },
    /// It was not done. After [`ToAgent::Open`] and [`ToAgent::Resume`]: there is no such session now.
    Failed {
        /// Why.
        code: FailCode,
        /// For people.
        detail: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ids_print_and_parse_back() {
        let mut id = SessionId([0xab; 16]);
        id.0[0] = 1;
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("s-12".parse::<SessionId>().is_err());
        assert!("s-0000000000000000000000000000000G".parse::<SessionId>().is_err());
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(ExitStatus::Signal(9).shell_code(), 137);
        assert_eq!(ExitStatus::Code(3).shell_code(), 3);
        assert_eq!(FailCode::NotFound.shell_code(), 127);
    }
}
