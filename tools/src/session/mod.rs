//! `exec`, `enter` and `cp` from the client's side: a session with the agent of a guest, over a way that may break at any time.
//!
//! * [`transport`]: what carries frames. * [`driver`]: a session from beginning to end, with its reconnects.
//! * [`terminal`]: the user's terminal, raw for as long as a session has it. * [`ends`]: standard input, output and signals.
//! * [`copy`]: files and directories, there and back.
//!
//! The protocol is [`wire::agent`]; nothing here decides what is sent. What happens on failure: a connection that breaks is replaced, with a word on standard error
//! when that takes more than two seconds, until the limit; the session's bytes are neither lost nor doubled. What the agent refuses ends the session.

pub mod copy;
pub mod driver;
pub mod ends;
pub mod terminal;
pub mod transport;

pub use driver::{Options, Outcome, SessionError, ask, run};
pub use ends::{Control, Ends, Input};
pub use transport::{Framed, Transport, TransportError};

use wire::agent::SessionId;

/// A session's id: random, because who knows it may take the session up.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn new_id() -> std::io::Result<SessionId> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(SessionId(bytes))
}
