//! `cp`: where files are, and the tar stream that goes through a session. Packing and unpacking are the agent's own
//! (`agent::archive`), so that both ends keep the same rules and neither trusts the other.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use agent::archive::{self, ArchiveError};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use wire::agent::{SessionId, Task};

use super::driver::{Options, Outcome, SessionError, run};
use super::ends::{Control, Ends, Input};
use super::transport::{Transport, TransportError};

/// One side of a copy: `NAME:/path` is in a machine, everything else is here. `./a:b` is a file here whose name holds a colon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a machine.
    Machine {
        /// Which.
        machine: String,
        /// Absolute.
        path: String,
    },
    /// Here.
    Here(PathBuf),
}

/// Not a place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}`: a path in a machine is absolute, as in NAME:/path")]
pub struct NoPlace(String);

impl std::str::FromStr for Place {
    type Err = NoPlace;

    fn from_str(text: &str) -> Result<Self, NoPlace> {
        match text.split_once(':') {
            Some((machine, _)) if machine.contains('/') => Ok(Self::Here(text.into())),
            Some((machine, path)) if path.starts_with('/') && !machine.is_empty() => {
                Ok(Self::Machine { machine: machine.to_owned(), path: path.to_owned() })
            }
            Some(_) => Err(NoPlace(text.to_owned())),
            None => Ok(Self::Here(text.into())),
        }
    }
}

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Our own files.
    #[error(transparent)]
    Here(#[from] ArchiveError),
    /// The guest's files; it has said why on standard error.
    #[error("the guest could not read or write its files (exit code {0})")]
    There(u8),
    /// Something local.
    #[error("copying")]
    Local(#[from] io::Error),
}

fn settled(outcome: Outcome) -> Result<(), CopyError> {
    if outcome.exit_code == 0 { Ok(()) } else { Err(CopyError::There(outcome.exit_code)) }
}

async fn joined<T>(thread: JoinHandle<T>) -> Result<T, CopyError> {
    thread.await.map_err(|error| CopyError::Local(io::Error::other(error)))
}

/// Copies `from` here to `to` in a machine.
///
/// # Errors
/// [`CopyError`]. If our files cannot be read, the guest keeps what it had by then.
pub async fn upload<T, F>(
    id: SessionId,
    from: &Path,
    to: &str,
    options: Options,
    connect: impl Fn() -> F,
) -> Result<(), CopyError>
where
    T: Transport,
    F: Future<Output = Result<T, TransportError>>,
{
    let (input_to, input) = mpsc::channel(1);
    let (control_to, control) = mpsc::channel(1);
    let from = from.to_owned();
    let packing = spawn_blocking(move || {
        let packed = archive::pack(&from, Pieces(input_to.clone()));
        let last = if packed.is_ok() {
            input_to.blocking_send(Input::End).is_ok()
        } else {
            control_to.blocking_send(Control::Close).is_ok()
        };
        // Otherwise the session has ended before us, and says why. Its input stays open until it has: half an archive must not look
        // like a whole one.
        (if last { packed } else { Ok(()) }, input_to)
    });
    let ends = Ends { input, control, out: tokio::io::sink(), err: tokio::io::stderr() };
    let task = Task::Import { path: to.as_bytes().to_vec(), user: None };
    let outcome = run(id, task, ends, options, connect).await;
    let (packed, _input) = joined(packing).await?;
    packed?;
    settled(outcome?)
}

/// Copies `from` in a machine to `to` here.
///
/// # Errors
/// [`CopyError`]. What was unpacked before stays.
pub async fn download<T, F>(
    id: SessionId,
    from: &str,
    to: &Path,
    options: Options,
    connect: impl Fn() -> F,
) -> Result<(), CopyError>
where
    T: Transport,
    F: Future<Output = Result<T, TransportError>>,
{
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let to = to.to_owned();
    let unpacking = spawn_blocking(move || archive::unpack(theirs, &to));
    let (_input, input) = mpsc::channel(1);
    let (_control, control) = mpsc::channel(1);
    let out = tokio::net::UnixStream::from_std(ours)?;
    let ends = Ends { input, control, out, err: tokio::io::stderr() };
    let task = Task::Export { path: from.as_bytes().to_vec(), user: None };
    let outcome = run(id, task, ends, options, connect).await;
    let unpacked = joined(unpacking).await?;
    match outcome {
        Ok(outcome) => settled(outcome).and(unpacked.map_err(CopyError::Here)),
        // It is ours that stopped.
        Err(SessionError::Output(error)) => unpacked.map_err(CopyError::Here).and(Err(error.into())),
        Err(error) => Err(error.into()),
    }
}

/// Writes into a session's input.
struct Pieces(mpsc::Sender<Input>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Input::Bytes(bytes.to_vec()));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let machine = Place::Machine { machine: "web".into(), path: "/etc/x:y".into() };
        assert_eq!("web:/etc/x:y".parse(), Ok(machine));
        assert_eq!("./a:b".parse(), Ok(Place::Here("./a:b".into())));
        assert_eq!("plain".parse(), Ok(Place::Here("plain".into())));
        for bad in ["web:etc", "web:", ":/etc"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
