//! Keeps the agent alive: without one a guest can neither be entered nor be told the time after a move.
//!
//! A process that does nothing else waits for the agent, and starts it again however it ended. When the guest runs out of
//! memory the kernel takes others first (`proc_pid_oom_score_adj(5)`); what sessions start is not spared.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::say;

/// The program itself, also when nothing of the file system that it came from can be reached any more.
pub(crate) const PROGRAM: &str = "/proc/self/exe";
/// Where a process has its own say about who goes first when memory runs out.
pub(crate) const OOM_SCORE: &std::ffi::CStr = c"/proc/self/oom_score_adj";
/// Never.
const SPARED: &str = "-1000";
/// Pause before a new start; it doubles with each one that comes to nothing.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(32);
/// How long an agent lives that has come to something.
const SETTLED: Duration = Duration::from_secs(60);

/// Runs the agent for ever, with these arguments.
pub fn run(arguments: &[&str]) -> ! {
    // Refused where we are not root: in tests.
    let _ = fs::write(&*OOM_SCORE.to_string_lossy(), SPARED);
    let mut pause = PAUSE;
    loop {
        let begun = Instant::now();
        let ended = start(arguments).and_then(|mut agent| agent.wait());
        match ended {
            Ok(status) => say!("the agent ended ({status}) and is started again"),
            Err(error) => say!("cannot start the agent: {error}"),
        }
        if begun.elapsed() >= SETTLED {
            pause = PAUSE;
        }
        std::thread::sleep(pause);
        pause = PAUSE_MAX.min(pause * 2);
    }
}

fn start(arguments: &[&str]) -> io::Result<Child> {
    as_ours(&mut Command::new(PROGRAM)).arg("serve").args(arguments).spawn()
}

/// The `@` keeps systemd from ending a process before everything else, when the guest ends.
fn as_ours(command: &mut Command) -> &mut Command {
    command.arg0("@mashine-agent")
}

/// Starts the guard of an agent, from our own image, which is in memory only.
///
/// # Errors
/// The kernel's.
pub fn spawn() -> io::Result<()> {
    let mut command = Command::new(PROGRAM);
    as_ours(&mut command).arg("guard").env_clear().env("MASHINES_KMSG", "1").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    command.spawn().map(drop)
}
