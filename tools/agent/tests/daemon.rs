//! The agent as a process on a Unix socket, with programs of this machine, and connections that break.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Agent, Script, exec};
use rustix::process::{Pid, Signal};
use wire::agent::{Ended, Exec, ExitStatus, FailCode, FromAgent, Request, Size, Task, ToAgent, Variable};

fn failed(ended: &Ended) -> FailCode {
    match ended {
        Ended::Failed { code, .. } => *code,
        Ended::Exited(status) => panic!("exited with {status:?}"),
    }
}

#[test]
fn exit_codes_signals_and_both_streams_come_back() {
    let agent = Agent::start();
    let done = agent.run(exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]), Script::default());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(3)));
    assert_eq!((done.out.as_slice(), done.err.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let done = agent.run(exec(&["sh", "-c", "kill -KILL $$"]), Script::default());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Signal(9)));
}

#[test]
fn what_cannot_be_started_is_refused_by_name() {
    let agent = Agent::start();
    for (argv, code) in [
        (&["no-such-program"][..], FailCode::NotFound),
        (&["/etc/passwd"], FailCode::NotExecutable),
        (&["/"], FailCode::NotExecutable),
        (&[""], FailCode::BadRequest),
    ] {
        assert_eq!(failed(&agent.run(exec(argv), Script::default()).ended), code, "{argv:?}");
    }
    let nobody = Exec { user: Some("no-such-user".into()), ..program(&["true"]) };
    assert_eq!(failed(&agent.run(Task::Exec(nobody), Script::default()).ended), FailCode::NoSuchUser);
    let nowhere = Exec { cwd: Some(b"/no/such".to_vec()), ..program(&["true"]) };
    assert_eq!(failed(&agent.run(Task::Exec(nowhere), Script::default()).ended), FailCode::NotFound);
}

fn program(argv: &[&str]) -> Exec {
    match exec(argv) {
        Task::Exec(exec) => exec,
        _ => unreachable!(),
    }
}

#[test]
fn environment_directory_and_user_are_those_asked_for() {
    let agent = Agent::start();
    let env = vec![Variable { name: b"COLOUR".to_vec(), value: b"blue".to_vec() }];
    let here = Exec { env, cwd: Some(b"/tmp".to_vec()), ..program(&["sh", "-c", "echo $COLOUR $PWD $HOME"]) };
    let done = agent.run(Task::Exec(here), Script::default());
    assert!(done.out.starts_with(b"blue /tmp /"), "{:?}", String::from_utf8_lossy(&done.out));
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: another user needs root");
        return;
    }
    let other = Exec { user: Some("daemon".into()), ..program(&["sh", "-c", "id -un; id -gn; umask"]) };
    let done = agent.run(Task::Exec(other), Script::default());
    assert_eq!(String::from_utf8_lossy(&done.out), "daemon\ndaemon\n0022\n");
}

#[test]
fn input_arrives_and_ends() {
    let agent = Agent::start();
    let done = agent.run(exec(&["cat"]), Script { input: b"typed".to_vec(), ..Script::default() });
    assert_eq!((done.out.as_slice(), done.ended), (&b"typed"[..], Ended::Exited(ExitStatus::Code(0))));
    // A program that does not read its input ends all the same.
    let done = agent.run(exec(&["true"]), Script { input: vec![1; 3 << 20], ..Script::default() });
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)));
}

#[test]
fn signals_reach_the_whole_group_once() {
    let agent = Agent::start();
    let script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    let signal = Script { signal_at: Some((b"ready".to_vec(), 15)), ..Script::default() };
    let done = agent.run(exec(&["sh", "-c", script]), signal);
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(7)));
    assert_eq!(String::from_utf8_lossy(&done.out), "ready\ncaught\n");
}

#[test]
fn a_terminal_has_the_size_of_the_client_and_job_control() {
    let agent = Agent::start();
    let tty = |argv: &[&str]| Task::Exec(Exec { tty: Some(Size { columns: 91, rows: 33 }), ..program(argv) });
    let done = agent.run(tty(&["sh", "-c", "stty size; test -t 0 && test -t 2 && tty"]), Script::default());
    let text = String::from_utf8_lossy(&done.out).into_owned();
    assert!(text.starts_with("33 91\r\n/dev/pts/"), "{text}");
    assert_eq!((done.err.len(), done.ended), (0, Ended::Exited(ExitStatus::Code(0))));
    // The size changes while it runs; Ctrl-C is a byte that the terminal turns into a signal.
    let script = "trap 'stty size; exit 5' INT; echo ready; while :; do sleep 0.01; done";
    let resize = Script {
        resize_at: Some((b"ready".to_vec(), Size { columns: 100, rows: 40 })),
        type_at: Some((b"ready".to_vec(), vec![3])),
        ..Script::default()
    };
    let done = agent.run(tty(&["sh", "-c", script]), resize);
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(5)));
    assert!(
        String::from_utf8_lossy(&done.out).contains("40 100"),
        "{:?}",
        String::from_utf8_lossy(&done.out)
    );
}

#[test]
fn fifty_megabytes_each_way_through_a_connection_that_breaks() {
    let agent = Agent::start();
    let input: Vec<u8> = (0..50u32 << 20).map(|n| (n % 253).to_le_bytes()[0]).collect();
    let script = Script { input: input.clone(), cut_every: Some(3_000_000), ..Script::default() };
    let done = agent.run(exec(&["cat"]), script);
    assert!(done.cuts >= 20, "{} cuts", done.cuts);
    assert!(done.out == input, "{} bytes came back", done.out.len());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)));
}

#[test]
fn what_a_program_leaves_running_does_not_hold_the_session() {
    let agent = Agent::start();
    let begun = Instant::now();
    let done =
        agent.run(exec(&["sh", "-c", "sleep 60 & (sleep 0.3; echo late) & echo now"]), Script::default());
    assert_eq!(String::from_utf8_lossy(&done.out), "now\nlate\n");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn closing_a_session_hangs_up_what_runs() {
    let agent = Agent::start();
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("hung-up");
    let script =
        format!("trap 'echo yes > {}; exit' HUP; echo ready; while :; do sleep 0.01; done", mark.display());
    agent
        .run(exec(&["sh", "-c", &script]), Script { close_at: Some(b"ready".to_vec()), ..Script::default() });
    let begun = Instant::now();
    while fs::read(&mark).ok().as_deref() != Some(b"yes\n") {
        assert!(begun.elapsed() < Duration::from_secs(10), "SIGHUP did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn files_go_there_and_back() {
    let agent = Agent::start();
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path().join("here");
    fs::create_dir(&here).unwrap();
    fs::write(here.join("f"), vec![5; 1 << 20]).unwrap();
    let path = |path: &std::path::Path| path.to_str().unwrap().as_bytes().to_vec();
    let export = Task::Export { path: path(&here), user: None };
    let done = agent.run(export, Script { cut_every: Some(400_000), ..Script::default() });
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)), "{:?}", String::from_utf8_lossy(&done.err));
    let import = Task::Import { path: path(&directory.path().join("there")), user: None };
    let done = agent.run(import, Script { input: done.out, cut_every: Some(400_000), ..Script::default() });
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)), "{:?}", String::from_utf8_lossy(&done.err));
    assert_eq!(fs::read(directory.path().join("there/f")).unwrap(), vec![5; 1 << 20]);
    let missing = Task::Export { path: b"/no/such".to_vec(), user: None };
    let done = agent.run(missing, Script::default());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(1)));
    assert!(String::from_utf8_lossy(&done.err).contains("/no/such"));
}

#[test]
fn requests_are_answered_and_nonsense_is_refused() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.send(&ToAgent::Request(Request::Info));
    let FromAgent::Info(info) = wire.receive().unwrap() else { panic!("no news") };
    assert!(info.memory_bytes > 0 && info.boot_id.len() == 36);
    wire.send(&ToAgent::Request(Request::Ping));
    assert_eq!(wire.receive(), Some(FromAgent::Pong));
    wire.send(&ToAgent::InputEnd { offset: 0 });
    assert!(matches!(wire.receive(), Some(FromAgent::Failed { code: FailCode::BadRequest, .. })));
    assert_eq!(wire.receive(), None, "closed");
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n"[..],
        b"MSHF\x09\x00\x08\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ] {
        let mut wire = agent.connect();
        wire.send_raw(bytes);
        assert!(matches!(wire.receive(), Some(FromAgent::Failed { .. })));
    }
    let mut wire = agent.connect();
    let session = wire::agent::SessionId([9; 16]);
    wire.send(&ToAgent::Resume { session, received: [0; 2] });
    assert!(matches!(wire.receive(), Some(FromAgent::Failed { code: FailCode::NoSuchSession, .. })));
}

#[test]
fn connections_are_bounded_and_come_back() {
    let agent = Agent::start();
    let mut all: Vec<_> = (0..agent::daemon::CONNECTIONS_MAX).map(|_| agent.connect()).collect();
    let mut one_more = agent.connect();
    assert!(matches!(one_more.receive(), Some(FromAgent::Failed { code: FailCode::TooManyConnections, .. })));
    all.clear();
    let done = agent.run(exec(&["true"]), Script::default());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)));
}

#[test]
fn an_agent_that_is_killed_is_started_again() {
    let guard = Agent::start_as("guard");
    let children = format!("/proc/{0}/task/{0}/children", guard.pid());
    let agent = || fs::read_to_string(&children).unwrap().trim().parse::<i32>().ok().and_then(Pid::from_raw);
    let first = agent();
    rustix::process::kill_process(first.unwrap(), Signal::KILL).unwrap();
    let begun = Instant::now();
    while agent().is_none_or(|agent| Some(agent) == first) {
        assert!(begun.elapsed() < Duration::from_secs(10), "no other agent was started");
        std::thread::sleep(Duration::from_millis(5));
    }
    guard.await_listening();
    let done = guard.run(exec(&["sh", "-c", "cat /proc/self/oom_score_adj"]), Script::default());
    assert_eq!(done.ended, Ended::Exited(ExitStatus::Code(0)));
    assert_eq!(done.out, b"0\n");
}
