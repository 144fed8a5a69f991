//! The client's own ends of a session: where input comes from, and where output goes.

use std::io::{self, Read};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use wire::agent::{Size, Stream};

/// Read at once from standard input.
const STEP_BYTES: usize = 16 << 10;
/// Pieces of input, signals and sizes that wait for the session.
const QUEUE: usize = 8;

/// Something for the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Bytes.
    Bytes(Vec<u8>),
    /// There is no more.
    End,
}

/// Something that does not wait behind the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// A signal, by its number on Linux.
    Signal(u8),
    /// The terminal has another size.
    Resize(Size),
    /// Give the session up.
    Close,
}

/// What a session is connected to here.
#[derive(Debug)]
pub struct Ends<O, E> {
    /// For the program.
    pub input: mpsc::Receiver<Input>,
    /// Besides.
    pub control: mpsc::Receiver<Control>,
    /// Its standard output.
    pub out: O,
    /// Its standard error.
    pub err: E,
}

/// Reads standard input from now on. The thread ends with the process: a read from a terminal cannot be interrupted.
pub fn standard_input() -> mpsc::Receiver<Input> {
    let (to, receiver) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        let mut buffer = [0; STEP_BYTES];
        loop {
            let input = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => Input::End,
                Ok(count) => Input::Bytes(buffer[..count].to_vec()),
            };
            let is_end = input == Input::End;
            if to.blocking_send(input).is_err() || is_end {
                return;
            }
        }
    });
    receiver
}

/// Forwards what the user's terminal and other programs send us: Ctrl-C, termination, new sizes. Ends with the session, which is given up
/// when `enough` comes.
///
/// # Errors
/// When the signals cannot be had.
pub fn forward_signals(
    enough: impl Future<Output = ()> + Send + 'static,
) -> io::Result<mpsc::Receiver<Control>> {
    let (to, receiver) = mpsc::channel(QUEUE);
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut window = signal(SignalKind::window_change())?;
    tokio::spawn(async move {
        let mut enough = std::pin::pin!(enough);
        let mut over = false;
        while !over {
            let control = tokio::select! {
                () = &mut enough => {
                    over = true;
                    Control::Close
                }
                _ = interrupt.recv() => Control::Signal(2),
                _ = terminate.recv() => Control::Signal(15),
                _ = hangup.recv() => Control::Signal(1),
                _ = quit.recv() => Control::Signal(3),
                _ = window.recv() => match super::terminal::size() {
                    Some(size) => Control::Resize(size),
                    None => continue,
                },
                () = to.closed() => return,
            };
            if to.send(control).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Writes what comes through the queue, and says how much was written. No more than a session's window is ever in the queue: the agent sends
/// no more until it was told.
pub(super) async fn write_out(
    mut to: impl AsyncWrite + Unpin,
    stream: Stream,
    mut pieces: mpsc::UnboundedReceiver<Vec<u8>>,
    written: mpsc::UnboundedSender<io::Result<(Stream, usize)>>,
) {
    while let Some(bytes) = pieces.recv().await {
        let result = async {
            to.write_all(&bytes).await?;
            to.flush().await
        };
        let result = result.await.map(|()| (stream, bytes.len()));
        let failed = result.is_err();
        if written.send(result).is_err() || failed {
            return;
        }
    }
}
