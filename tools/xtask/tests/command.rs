//! Watching other programs: what they say is kept, and what takes too long is ended with all its children.

use std::process::Command;
use std::time::{Duration, Instant};

use xtask::command;

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

#[test]
fn both_outputs_are_kept_in_order() {
    let watched =
        command::stream(&mut shell("echo one; echo two >&2; echo three"), Duration::from_secs(5)).unwrap();
    assert_eq!(watched.lines, ["one", "two", "three"]);
    assert!(watched.succeeded && !watched.timed_out);
    let watched = command::stream(&mut shell("exit 3"), Duration::from_secs(5)).unwrap();
    assert!(!watched.succeeded && !watched.timed_out);
}

#[test]
fn what_takes_too_long_is_ended_with_its_children() {
    let begun = Instant::now();
    let script = "sleep 600 & echo $!; wait";
    let watched = command::stream(&mut shell(script), Duration::from_millis(300)).unwrap();
    assert!(watched.timed_out && !watched.succeeded);
    assert!(begun.elapsed() < Duration::from_secs(10));
    // The pipe was read to its end, so nobody holds it any more; and the child is gone or a zombie.
    let child = &watched.lines[0];
    let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
}

#[test]
fn messages_are_told_and_data_is_returned() {
    let mut told = Vec::new();
    let script = "echo begun >&2; head -c 200000 /dev/zero | tr '\\0' x; echo done >&2";
    let data = command::read_told(&mut shell(script), |line| told.push(line.to_owned())).unwrap();
    assert_eq!(told, ["begun", "done"]);
    assert_eq!(data.len(), 200_000);
    assert!(command::read_told(&mut shell("exit 1"), |_| ()).is_err());
}

#[test]
fn a_failed_program_explains_itself() {
    let failed = command::read(&mut shell("echo the reason >&2; exit 7")).unwrap_err().to_string();
    assert!(failed.contains("the reason") && failed.contains('7'), "{failed}");
    let missing = command::read(&mut Command::new("/no/such/program")).unwrap_err().to_string();
    assert!(missing.contains("/no/such/program"), "{missing}");
}
