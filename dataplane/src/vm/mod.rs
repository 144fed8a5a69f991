//! The VMM processes of this host: starting them, handing them descriptors, talking to them.
//!
//! * [`process`]: one `mashine-vmm` process; it outlives `mashined`, which finds it again by the files it left.
//! * [`claim`]: what of a machine that was moved here outlives its VMM: whether it may have run.
//! * [`setup`]: the slow, blocking part of the control socket, where descriptors travel: creating, booting, adopting.
//! * [`initrd`]: the guest's configuration behind its initial RAM disk.
//! * [`client`]: the fast part, on the machine's home shard: pause, dirty log, state, run.

pub mod claim;
pub mod client;
pub mod initrd;
pub mod process;
pub mod setup;

use std::path::Path;

use wire::vmm::{Code, Reply};

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("cannot start {path}: is mashine-vmm built and named with --vmm?")]
    Spawn {
        /// The program.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file of the machine's directory.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The control socket broke: the VMM has ended, or a newer `mashined` has taken over.
    #[error("the control socket of the VMM broke while waiting for {waiting_for}")]
    Gone {
        /// The request.
        waiting_for: &'static str,
        /// The cause, if not just the end of the stream.
        #[source]
        source: Option<std::io::Error>,
    },
    /// No answer in time.
    #[error("the VMM did not answer {0} in time")]
    Silent(&'static str),
    /// It said no.
    #[error("the VMM refused: {detail}")]
    Refused {
        /// For programs.
        code: Code,
        /// For people.
        detail: String,
    },
    /// It broke the protocol.
    #[error("the VMM answered {0} out of turn")]
    Protocol(&'static str),
}

/// Turns a refusal into the error it is.
fn accepted(reply: Reply) -> Result<Reply, VmmError> {
    match reply {
        Reply::Refused { code, detail } => Err(VmmError::Refused { code, detail }),
        other => Ok(other),
    }
}

/// What becomes of an I/O error with the file at `path`.
pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> VmmError + use<> {
    let path = path.display().to_string();
    move |source| VmmError::File { what, path, source }
}
