//! The user's terminal: raw while a session has it, and as it was afterwards, whatever happens.
//!
//! It is restored when the guard is dropped, which a panic does as well. Signals that would end the program are forwarded to the guest instead
//! (see [`super::ends::forward_signals`]), so that it ends by returning.

use std::io::{self, IsTerminal};

use rustix::termios::{self, OptionalActions, Termios};
use wire::agent::Size;

/// A raw terminal.
#[derive(Debug)]
pub struct Terminal {
    before: Termios,
}

impl Terminal {
    /// Makes standard input raw, if it is a terminal.
    ///
    /// # Errors
    /// The kernel's.
    pub fn raw() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // If the terminal is gone, there is nothing to restore.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Size of the terminal, from whichever of the three standard streams is one.
pub fn size() -> Option<Size> {
    let sizes = [
        termios::tcgetwinsize(rustix::stdio::stdout()),
        termios::tcgetwinsize(rustix::stdio::stdin()),
        termios::tcgetwinsize(rustix::stdio::stderr()),
    ];
    let size = sizes.into_iter().flatten().find(|size| size.ws_col > 0 && size.ws_row > 0)?;
    Some(Size { columns: size.ws_col, rows: size.ws_row })
}
