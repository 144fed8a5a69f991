//! The client's driver against a real agent, through a relay that breaks each connection after a while.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent::daemon::Daemon;
use agent::daemon::listen::{Address, listen};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tools::session::{
    Control, Ends, Framed, Input, Options, Outcome, SessionError, Transport, TransportError, ask, copy,
    new_id, run,
};
use wire::agent::{Exec, FailCode, FromAgent, Request, Task};

/// The agent, on a thread of this process.
fn start_agent(directory: &Path) -> PathBuf {
    let path = directory.join("agent");
    let listener = listen(&Address::Unix(path.clone())).unwrap();
    std::thread::spawn(move || Daemon::new(listener).run());
    path
}

/// A connection that ends after so many frames in either direction.
struct Breaking {
    inner: Framed<UnixStream>,
    left: usize,
}

impl Transport for Breaking {
    async fn send(&mut self, frame: &[u8]) -> Result<(), TransportError> {
        self.left = self.left.checked_sub(1).ok_or_else(|| TransportError::Lost("cut".into()))?;
        self.inner.send(frame).await
    }

    async fn recv(&mut self) -> Result<Option<Vec<u8>>, TransportError> {
        if self.left == 0 {
            return Ok(None);
        }
        let frame = self.inner.recv().await?;
        self.left -= 1;
        Ok(frame)
    }
}

fn task(argv: &[&str]) -> Task {
    let argv = argv.iter().map(|word| word.as_bytes().to_vec()).collect();
    Task::Exec(Exec { argv, stdin: true, ..Exec::default() })
}

fn quiet() -> Options {
    Options { tell: false, ..Options::default() }
}

struct Done {
    result: Result<Outcome, SessionError>,
    out: Vec<u8>,
    err: Vec<u8>,
}

/// Runs a task with all of `input`, over connections that last `frames` frames.
async fn through(agent: &Path, task: Task, input: Vec<Input>, control: Vec<Control>, frames: usize) -> Done {
    let (input_to, input_from) = mpsc::channel(1);
    let (control_to, control_from) = mpsc::channel(8);
    tokio::spawn(async move {
        for piece in input {
            let _ = input_to.send(piece).await;
        }
        input_to.closed().await;
    });
    for piece in control {
        control_to.send(piece).await.unwrap();
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let ends = Ends { input: input_from, control: control_from, out: &mut out, err: &mut err };
    let connect = || async {
        let inner = Framed::new(UnixStream::connect(agent).await?);
        Ok(Breaking { inner, left: frames })
    };
    let result =
        tokio::time::timeout(Duration::from_secs(60), run(new_id().unwrap(), task, ends, quiet(), connect));
    let result = result.await.unwrap();
    Done { result, out, err }
}

#[tokio::test]
async fn streams_and_exit_code_come_through() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let script = "cat; echo oops >&2; exit 4";
    let input = vec![Input::Bytes(b"typed".to_vec()), Input::End];
    let done = through(&agent, task(&["sh", "-c", script]), input, vec![], usize::MAX).await;
    assert_eq!(done.result.unwrap(), Outcome { exit_code: 4, connections: 1 });
    assert_eq!((done.out.as_slice(), done.err.as_slice()), (&b"typed"[..], &b"oops\n"[..]));
}

#[tokio::test]
async fn megabytes_come_through_connections_that_break() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let content: Vec<u8> = (0..4u32 << 20).map(|n| (n % 241).to_le_bytes()[0]).collect();
    let mut input: Vec<Input> = content.chunks(100_000).map(|piece| Input::Bytes(piece.to_vec())).collect();
    input.push(Input::End);
    let done = through(&agent, task(&["cat"]), input, vec![], 60).await;
    let outcome = done.result.unwrap();
    assert!(outcome.connections > 3 && outcome.exit_code == 0, "{outcome:?}");
    assert!(done.out == content, "{} bytes came back", done.out.len());
}

#[tokio::test]
async fn signals_go_past_input_that_nobody_reads() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let input = (0..20).map(|_| Input::Bytes(vec![0; 100_000])).collect();
    let done = through(&agent, task(&["sleep", "50"]), input, vec![Control::Signal(15)], usize::MAX).await;
    assert_eq!(done.result.unwrap().exit_code, 128 + 15);
}

#[tokio::test]
async fn a_program_whose_reader_is_gone_is_hung_up() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let fifo = directory.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let script = format!("exec yes 3>{}", fifo.display());
    let (_control, control) = mpsc::channel(1);
    let (_input, input) = mpsc::channel(1);
    let (reader, out) = tokio::io::duplex(64);
    drop(reader);
    let ends = Ends { input, control, out, err: tokio::io::sink() };
    let connect = || async { Ok(Framed::new(UnixStream::connect(&agent).await?)) };
    // The end of this file is the program's.
    let program = tokio::task::spawn_blocking(move || std::fs::read(fifo));
    let session = run(new_id().unwrap(), task(&["sh", "-c", &script]), ends, quiet(), connect);
    let result = tokio::time::timeout(Duration::from_secs(60), session).await.unwrap();
    let Err(SessionError::Output(error)) = result else { panic!("{result:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    tokio::time::timeout(Duration::from_secs(60), program).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn refusals_and_silence_end_the_session() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let done = through(&agent, task(&["no-such-program"]), vec![], vec![], usize::MAX).await;
    assert!(matches!(done.result, Err(SessionError::Refused { code: FailCode::NotFound, .. })));
    let attempts = AtomicUsize::new(0);
    let connect = || async {
        attempts.fetch_add(1, Ordering::Relaxed);
        Err::<Framed<UnixStream>, _>(TransportError::Lost("nobody there".into()))
    };
    let ends = || {
        let (input, control) = (mpsc::channel(1).1, mpsc::channel(1).1);
        Ends { input, control, out: tokio::io::sink(), err: tokio::io::sink() }
    };
    let short = Options { reconnect_limit: Duration::from_millis(500), ..quiet() };
    let result = run(new_id().unwrap(), task(&["true"]), ends(), short, connect).await;
    assert!(matches!(result, Err(SessionError::Unreachable(_))));
    assert!(attempts.load(Ordering::Relaxed) > 2);
    let refuse = || async { Err::<Framed<UnixStream>, _>(TransportError::Refused("no such machine".into())) };
    let result = run(new_id().unwrap(), task(&["true"]), ends(), quiet(), refuse).await;
    assert!(matches!(result, Err(SessionError::Unreachable(TransportError::Refused(_)))));
    // Somebody accepts and says nothing.
    let mute = directory.path().join("mute");
    let listener = tokio::net::UnixListener::bind(&mute).unwrap();
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(connection) = listener.accept().await {
            held.push(connection);
        }
    });
    let connect = || async { Ok(Framed::new(UnixStream::connect(&mute).await?)) };
    let impatient = Options {
        ping_after: Duration::from_millis(50),
        ..Options { reconnect_limit: Duration::from_millis(300), ..quiet() }
    };
    let result = run(new_id().unwrap(), task(&["true"]), ends(), impatient, connect).await;
    assert!(matches!(result, Err(SessionError::Unreachable(_))));
    held.abort();
}

#[tokio::test]
async fn the_agent_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let agent = start_agent(directory.path());
    let mut transport = Framed::new(UnixStream::connect(&agent).await.unwrap());
    let FromAgent::Info(info) = ask(&mut transport, Request::Info).await.unwrap() else { panic!("no news") };
    assert!(info.uptime_ms > 0);
}

#[tokio::test]
async fn directories_are_copied_there_and_back() {
    // Its built-in programs are started from its own file, so here it is a process. Cargo builds it beside this test with the workspace.
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("mashine-agent");
    if !program.exists() {
        println!("SKIPPED: {} has not been built", program.display());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (socket, tree) = (directory.path().join("agent"), directory.path().join("tree"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), vec![7; 3 << 20]).unwrap();
    let mut process = tokio::process::Command::new(program);
    let process = process.args(["serve", "--unix"]).arg(&socket).kill_on_drop(true).spawn().unwrap();
    let connect = || async {
        let inner = Framed::new(UnixStream::connect(&socket).await?);
        Ok(Breaking { inner, left: 40 })
    };
    let there = directory.path().join("there").to_str().unwrap().to_owned();
    copy::upload(new_id().unwrap(), &tree, &there, quiet(), connect).await.unwrap();
    let back = directory.path().join("back");
    copy::download(new_id().unwrap(), &there, &back, quiet(), connect).await.unwrap();
    assert_eq!(std::fs::read(back.join("file")).unwrap(), vec![7; 3 << 20]);
    let missing = copy::download(new_id().unwrap(), "/no/such", &back, quiet(), connect).await;
    assert!(matches!(missing, Err(copy::CopyError::There(1))), "{missing:?}");
    let missing = copy::upload(new_id().unwrap(), Path::new("/no/such"), &there, quiet(), connect).await;
    assert!(matches!(missing, Err(copy::CopyError::Here(_))), "{missing:?}");
    drop(process);
}
