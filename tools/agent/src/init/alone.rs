//! Process 1 of an image that has no init: it runs the entrypoint or a shell, takes the end of orphans, and ends the guest in good order.
//!
//! SIGTERM and the power button power off, SIGINT (Ctrl-Alt-Del) restarts; so does the entrypoint's end: the guest is its program.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::config::Config;
use crate::daemon::spawn;
use crate::{power, say};

/// How long programs have to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Runs until the guest ends.
pub fn run(config: &Config, stay: bool) -> ! {
    let end = match serve(config, stay) {
        Ok(end) => end,
        Err(error) => {
            say!("process 1 cannot go on: {error}");
            RebootCommand::PowerOff
        }
    };
    shut_down(end)
}

fn serve(config: &Config, stay: bool) -> io::Result<RebootCommand> {
    let mut signals = Signals::new([SIGCHLD, SIGINT, SIGTERM])?;
    // Otherwise the kernel restarts at once, unasked.
    rustix::system::reboot(RebootCommand::CadOff)?;
    watch_power_button();
    let mut program = begin(config)?;
    for signal in signals.forever() {
        match signal {
            SIGTERM => return Ok(RebootCommand::PowerOff),
            SIGINT => return Ok(RebootCommand::Restart),
            _ => {}
        }
        if let Some(status) = program.as_mut().map(Child::try_wait).transpose()?.flatten() {
            say!("the program of this machine has ended: {status}");
            if !stay {
                return Ok(RebootCommand::PowerOff);
            }
            program = None;
        }
        reap(program.as_ref().map(Child::id));
    }
    Ok(RebootCommand::PowerOff)
}

/// Takes the end of all children but `own`, whose end is awaited by its handle.
fn reap(own: Option<u32>) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let is_own = own.is_some_and(|own| i64::from(own) == i64::from(id));
        if let Some(pid) = Pid::from_raw(id).filter(|pid| !is_own && !pid.is_init()) {
            // Of others' children the kernel says ECHILD.
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

fn begin(config: &Config) -> io::Result<Option<Child>> {
    let mut command = match config.entrypoint.as_deref() {
        Some([program, arguments @ ..]) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        _ if config.console => Command::new("/bin/sh"),
        _ => return Ok(None),
    };
    let variables: BTreeMap<String, String> = config.variables();
    command.env_clear().env("PATH", spawn::PATH).env("HOME", "/root").env("TERM", "linux").envs(variables);
    let console = || OpenOptions::new().read(true).write(true).open("/dev/console");
    if let (Ok(input), Ok(output), Ok(errors)) = (console(), console(), console()) {
        command.stdin(input).stdout(output).stderr(errors);
        spawn::on_console(&mut command);
    }
    match command.spawn() {
        Ok(child) => Ok(Some(child)),
        // The agent can still tell what is in the image.
        Err(error) => {
            say!("cannot start {}: {error}", command.get_program().to_string_lossy());
            Ok(None)
        }
    }
}

/// Turns the power button into SIGTERM for ourselves.
fn watch_power_button() {
    for button in power::buttons() {
        std::thread::spawn(move || {
            while let Ok(pressed) = power::is_pressed(&button) {
                if pressed {
                    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::TERM);
                }
            }
        });
    }
}

fn shut_down(end: RebootCommand) -> ! {
    say!("ending: {end:?}");
    signal_all(Signal::TERM);
    let deadline = Instant::now() + GRACE;
    // Process 1 has no way to await the end of all others but to ask; ten times a second, for five seconds.
    while Instant::now() < deadline && rustix::process::wait(WaitOptions::NOHANG).is_ok() {
        std::thread::sleep(Duration::from_millis(100));
    }
    signal_all(Signal::KILL);
    rustix::fs::sync();
    let flags = rustix::mount::MountFlags::RDONLY;
    let _ = rustix::mount::mount_remount("/", flags, c"");
    let _ = rustix::system::reboot(end);
    // The kernel panics when process 1 ends, and says so: all that is left.
    std::process::exit(1)
}

fn signal_all(signal: Signal) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let id = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        // Threads of the kernel do not listen.
        if let Some(pid) = id.and_then(Pid::from_raw).filter(|pid| !pid.is_init()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}
