//! `exec`, `enter`, `cp`: work in a machine, through its agent.
//!
//! The way there is one HTTP connection to the control plane, upgraded to the bytes of the guest's vsock port. It breaks whenever the machine moves; the
//! [session](crate::session) then asks for another and goes on.

use std::error::Error;
use std::future::pending;
use std::io::{ErrorKind, IsTerminal as _};
use std::time::Duration;

use controlplane::api::{AGENT_UPGRADE, ProblemCode};
use controlplane::core::MachineRef;
use reqwest::Upgraded;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wire::agent::{Exec, FailCode, FromAgent, Info, Request, Size, Task, Variable};

use crate::args::{Copy, Enter, Execute, Logs};
use crate::client::Client;
use crate::exit::Failure;
use crate::output;
use crate::session::copy::{CopyError, Place, download, upload};
use crate::session::{self, Ends, Framed, Options, SessionError, TransportError, ends, terminal};

/// How long a machine may take until its agent answers: a guest that was just launched boots.
const FIRST_LIMIT: Duration = Duration::from_secs(60);
/// Silence after which the user is told.
const TELL_AFTER: Duration = Duration::from_secs(3);
/// Pause between two attempts; there is no event to wait for.
const AGAIN: Duration = Duration::from_millis(200);
/// What a shell says of a program that SIGPIPE ended.
const SIGPIPE_CODE: u8 = 128 + 13;
/// Size of a terminal that does not say.
const PLAIN: Size = Size { columns: 80, rows: 24 };

pub(super) async fn exec(client: &Client, execute: &Execute) -> Result<(), Failure> {
    let tty = execute.tty.then(|| terminal::size().unwrap_or(PLAIN));
    let task = Exec {
        argv: execute.command.iter().map(|word| word.clone().into_bytes()).collect(),
        env: variables(&execute.env, tty.is_some()),
        cwd: execute.workdir.clone().map(String::into_bytes),
        user: execute.user.clone(),
        tty,
        stdin: !execute.no_stdin && (execute.interactive || execute.tty || !std::io::stdin().is_terminal()),
    };
    run(client, &execute.machine, task, pending()).await
}

pub(super) async fn enter(client: &Client, enter: &Enter) -> Result<(), Failure> {
    let task = Exec {
        env: variables(&[], true),
        user: enter.user.clone(),
        tty: Some(terminal::size().unwrap_or(PLAIN)),
        stdin: true,
        ..Exec::default()
    };
    run(client, &enter.machine, task, pending()).await
}

/// The guest's journal, as its journalctl shows it; it goes on while the machine moves.
pub(super) async fn journal(client: &Client, logs: &Logs, json: bool) -> Result<(), Failure> {
    let mut argv = vec!["journalctl".to_owned(), "--no-pager".to_owned()];
    argv.push(format!("--output={}", if json { "json" } else { "short-iso" }));
    argv.extend(logs.follow.then(|| "--follow".to_owned()));
    argv.push(format!("--lines={}", logs.lines.map_or_else(|| "all".to_owned(), |lines| lines.to_string())));
    argv.extend(logs.unit.iter().map(|unit| format!("--unit={unit}")));
    let task = Exec { argv: argv.into_iter().map(String::into_bytes).collect(), ..Exec::default() };
    match run(client, &logs.machine, task, output::unread()).await {
        Err(Failure::Exited(code)) if code == FailCode::NotFound.shell_code() => Err(Failure::Failed {
            detail: format!("{} keeps no journal: there is no journalctl in it", logs.machine),
            remedy: format!("see its console with `mashines logs {}`", logs.machine),
        }),
        // As with the other commands that show: a reader that has had enough is no failure.
        Err(Failure::Exited(SIGPIPE_CODE)) => Ok(()),
        outcome => outcome,
    }
}

/// A session from its begin to its end, or until `enough` comes.
async fn run(
    client: &Client,
    machine: &MachineRef,
    task: Exec,
    enough: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Failure> {
    await_agent(client, machine).await?;
    let local = |error| Failure::local("preparing the session", error, "look at the system's limits");
    let id = session::new_id().map_err(local)?;
    let control = ends::forward_signals(enough).map_err(local)?;
    // The sender is kept, so that a session without input sees silence rather than an end: the agent gives the program that.
    let (_silent, silence) = mpsc::channel(1);
    let input = if task.stdin { ends::standard_input() } else { silence };
    let raw = if task.tty.is_some() { terminal::Terminal::raw().map_err(local)? } else { None };
    let session = Ends { input, control, out: tokio::io::stdout(), err: tokio::io::stderr() };
    let connect = || connect(client, machine);
    let outcome = session::run(id, Task::Exec(task), session, Options::default(), connect).await;
    drop(raw);
    match outcome.map_err(|error| failed(error, machine))?.exit_code {
        0 => Ok(()),
        code => Err(Failure::Exited(code)),
    }
}

pub(super) async fn copy(client: &Client, copy: &Copy, json: bool) -> Result<(), Failure> {
    let reference = |name: &str| -> Result<MachineRef, Failure> {
        name.parse()
            .map_err(|error: wire::ids::ParseIdError| Failure::usage(error.to_string(), "give NAME:/path"))
    };
    let id = session::new_id()
        .map_err(|error| Failure::local("preparing the session", error, "look at the system's limits"))?;
    let (machine, copied) = match (&copy.from, &copy.to) {
        (Place::Here(from), Place::Machine { machine, path }) => {
            let machine = reference(machine)?;
            await_agent(client, &machine).await?;
            let copied = upload(id, from, path, Options::default(), || connect(client, &machine)).await;
            (machine, copied)
        }
        (Place::Machine { machine, path }, Place::Here(to)) => {
            let machine = reference(machine)?;
            await_agent(client, &machine).await?;
            let copied = download(id, path, to, Options::default(), || connect(client, &machine)).await;
            (machine, copied)
        }
        (Place::Here(_), Place::Here(_)) | (Place::Machine { .. }, Place::Machine { .. }) => {
            return Err(Failure::usage(
                "both places are on the same side",
                "give one place here and one in a machine: `mashines cp FILE NAME:/path` or `mashines cp NAME:/path FILE`",
            ));
        }
    };
    match copied {
        Ok(()) if json => output::json(&json!({"copied": true})),
        Ok(()) => Ok(()),
        Err(CopyError::Session(error)) => Err(failed(error, &machine)),
        Err(error) => Err(Failure::local("copying", error, "look at the paths and their permissions")),
    }
}

/// What the guest says of itself; nothing if it has no agent that answers now.
pub(super) async fn info(client: &Client, machine: &MachineRef) -> Option<Info> {
    let mut transport = connect(client, machine).await.ok()?;
    match session::ask(&mut transport, Request::Info).await {
        Ok(FromAgent::Info(info)) => Some(*info),
        _ => None,
    }
}

/// Waits until the agent can be reached. Without a control plane there is nothing to wait for: as every command that begins, it says so.
async fn await_agent(client: &Client, machine: &MachineRef) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        match connect(client, machine).await {
            Ok(_) => return Ok(()),
            Err(TransportError::Lost(error)) if begun.elapsed() < FIRST_LIMIT && !is_unreachable(&*error) => {
                if begun.elapsed() >= TELL_AFTER && !std::mem::replace(&mut told, true) {
                    eprintln!(
                        "[waiting for the agent of {machine}, at most {} s: {error}]",
                        FIRST_LIMIT.as_secs()
                    );
                }
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(failed(SessionError::Unreachable(error), machine)),
        }
    }
}

fn is_unreachable(error: &(dyn Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Failure::Unreachable { .. }))
}

async fn connect(client: &Client, machine: &MachineRef) -> Result<Framed<Upgraded>, TransportError> {
    let path = format!("/v1/machines/{machine}/agent");
    match client.upgrade(&path, AGENT_UPGRADE).await {
        Ok(upgraded) => Ok(Framed::new(upgraded)),
        Err(failure) if passes(&failure) => Err(TransportError::Lost(Box::new(failure))),
        Err(failure) => Err(TransportError::Refused(Box::new(failure))),
    }
}

/// Whether it may work a moment later: the machine moves, its host or the control plane restarts, its guest boots.
fn passes(failure: &Failure) -> bool {
    match failure {
        Failure::Unreachable { .. } => true,
        Failure::Problem(problem) => matches!(
            problem.code,
            ProblemCode::HostUnreachable
                | ProblemCode::GuestUnreachable
                | ProblemCode::HostRefused
                | ProblemCode::Busy
        ),
        _ => false,
    }
}

fn failed(error: SessionError, machine: &MachineRef) -> Failure {
    match error {
        SessionError::Refused { code, detail } => {
            eprintln!("error: {detail}");
            Failure::Exited(code.shell_code())
        }
        // Whoever read it has read enough.
        SessionError::Output(error) if error.kind() == ErrorKind::BrokenPipe => Failure::Exited(SIGPIPE_CODE),
        SessionError::GivenUp => Failure::Exited(SIGPIPE_CODE),
        SessionError::Output(error) => {
            Failure::local("writing the output", error, "look at where the output goes")
        }
        SessionError::Unreachable(TransportError::Refused(error)) => match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::local("reaching the agent", error, "try again"),
        },
        SessionError::Unreachable(TransportError::Lost(error)) => match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::local("reaching the agent", error, "try again"),
        },
        other => Failure::Failed {
            detail: other.to_string(),
            remedy: format!(
                "look at the machine with `mashines get {machine}` and `mashines logs {machine}`"
            ),
        },
    }
}

fn variables(given: &[(String, String)], terminal: bool) -> Vec<Variable> {
    let term = std::env::var("TERM").ok().filter(|_| terminal).map(|term| ("TERM".to_owned(), term));
    term.iter()
        .chain(given)
        .map(|(name, value)| Variable { name: name.clone().into_bytes(), value: value.clone().into_bytes() })
        .collect()
}
