//! What a client (the command line) and the agent within a guest say to each other, and sessions that outlive their connection.
//!
//! The way between them (client, control plane, host, VMM, vsock) is a pipe that understands nothing and may break anywhere, at any
//! time: a migration always breaks it. So a session lives in its two ends. Each direction's bytes are numbered; the sender
//! keeps what is not yet acknowledged, and after a reconnect goes on from where the receiver is. Nothing is lost or doubled.
//!
//! ```text
//!   client                                   agent
//!     Open{session, task}       ───────────>   starts it; a known id is taken up again instead
//!     <───────────  Opened{input_received, signals_received}
//!     Input, InputEnd, Signal, Resize ─────>
//!     <───────────  Output, InputAck, SignalAck
//!     Ack{stream, offset}       ───────────>   only now the agent forgets these bytes
//!   ~~~~~~~~~~~~~~ the connection breaks ~~~~~~~~~~~~~~
//!     Resume{session, received} ───────────>   both ends go on from where the other is
//!     <───────────  Opened{...}, Output, ...
//!     <───────────  Exited{status, ends}       after the last byte of output
//!     Close                     ───────────>   the agent forgets the session
//! ```
//!
//! Each end is a pure state machine, [`ClientSession`] and [`AgentSession`]: messages in, demands out, and one question, "what
//! is to be sent next", which is asked only when the connection can take it. So nothing is ever queued beyond [`WINDOW_BYTES`] a direction:
//! a program whose output nobody reads stops in its `write`, a client whose program does not read stops reading its own input.
//!
//! What happens on failure: a message that cannot be (a gap, bytes beyond the window, an acknowledgement of what was never
//! sent) is a [`Violation`] and ends the connection, not the session. A session nobody is connected to is ended after
//! [`DETACHED_US_MAX`]. One connection carries one session, or any number of requests that are answered one by one ([`Request`]).

mod client;
mod guest;
mod messages;
mod numbered;

pub use client::{ClientSession, Ended, News};
pub use guest::{AgentSession, Demand, Reap};
pub use messages::{
    Exec, ExitStatus, FailCode, FromAgent, Info, Request, SessionId, Size, Stream, Task, ToAgent, Variable,
};
pub use numbered::{Inbox, Outbox, Violation};

/// Version of this protocol, in the header of every frame. An agent refuses versions it does not know.
/// * 1: first.
pub const VERSION: u16 = 1;
/// Port of the agent's vsock listener.
pub const VSOCK_PORT: u32 = 1024;
/// Most bytes that one direction of a session keeps unacknowledged. Enough for 100 Mbit/s over 20 ms; 256 sessions with three streams stay below 200 MiB.
pub const WINDOW_BYTES: usize = 256 << 10;
/// Most bytes of a session in one message.
pub const CHUNK_BYTES: usize = 32 << 10;
/// Most signals that wait for their acknowledgement.
pub const SIGNALS_MAX: usize = 32;
/// How long a session outlives its connection, in microseconds; afterwards it is hung up. A migration takes seconds, a laptop's nap minutes.
pub const DETACHED_US_MAX: u64 = 10 * 60 * 1_000_000;
/// Time between hanging up and killing, in microseconds.
pub const HANGUP_GRACE_US: u64 = 5_000_000;
