//! Running other programs: what they said goes into the error, so that a failed step explains itself.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::signals;

/// The command line as a person would type it, for messages.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs to the end with nothing on stdin and returns stdout.
///
/// # Errors
/// When it cannot be started (with the remedy, if the program is missing) or ends with anything but 0; its stderr is part of the error.
pub fn read(command: &mut Command) -> Result<String> {
    let output = finish(command)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", shown(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of `{}`", shown(command)))
}

/// As [`read`], with each line of stderr told as it comes.
///
/// # Errors
/// As [`read`]; the lines that were told are not repeated in the error.
pub fn read_told(command: &mut Command, mut tell: impl FnMut(&str)) -> Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{}`", shown(command)))?;
    let (Some(errors), Some(mut output)) = (child.stderr.take(), child.stdout.take()) else {
        bail!("no pipe from `{}`", shown(command));
    };
    // What it prints on stdout may be more than a pipe holds, so somebody must read it meanwhile.
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    for line in BufReader::new(errors).lines() {
        tell(&line.with_context(|| format!("reading from `{}`", shown(command)))?);
    }
    let status = child.wait().with_context(|| format!("waiting for `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    let text = reading.join().map_err(|_| anyhow!("a reader panicked"))?;
    text.with_context(|| format!("output of `{}`", shown(command)))
}

/// Runs to the end and returns all of it, whatever the exit code.
///
/// # Errors
/// When it cannot be started.
pub fn finish(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("starting `{}`", shown(command)))
}

/// Runs to the end with our stdout and stderr, for long work that people want to watch.
///
/// # Errors
/// When it cannot be started or ends with anything but 0.
pub fn watch(command: &mut Command) -> Result<()> {
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("starting `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Where `program` is on the search path, if it is.
pub fn locate(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Administrators' programs are not on the search path of an ordinary Debian user.
    let extra = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// What a watched program said, and how it ended.
#[derive(Debug)]
pub struct Watched {
    /// Lines of stdout and stderr, as they came; stdout only, if stderr was not piped.
    pub lines: Vec<String>,
    /// Whether it ended with 0 in time.
    pub succeeded: bool,
    /// Whether it was killed because it took too long.
    pub timed_out: bool,
}

/// Runs to the end, showing each line of its output and keeping it; kills it with all its children after `limit`.
///
/// # Errors
/// When it cannot be started, or we are asked to end meanwhile.
pub fn stream(command: &mut Command, limit: Duration) -> Result<Watched> {
    let (reader, writer) = std::io::pipe().context("making a pipe")?;
    let errors = writer.try_clone().context("duplicating a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(errors).process_group(0);
    let mut child = command.spawn().with_context(|| format!("starting `{}`", shown(command)))?;
    // Our copies of the pipe's writing end must go, or the reader would never see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let reading = std::thread::spawn(move || {
        let lines = BufReader::new(reader).split(b'\n').map_while(std::io::Result::ok);
        let shown = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
        shown.inspect(|line| eprintln!("{line}")).collect::<Vec<String>>()
    });
    let ended = await_end(&mut child, limit);
    if !matches!(ended, Ok(Some(_))) {
        // It leads a process group of its own, so its children go with it.
        if let Some(group) = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0)) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        child.wait().context("waiting for a killed program")?;
    }
    let lines = reading.join().unwrap_or_default();
    let status = ended?;
    Ok(Watched {
        lines,
        succeeded: status.is_some_and(|status| status.success()),
        timed_out: status.is_none(),
    })
}

/// Waits for the end, `None` if it does not come within `limit`.
fn await_end(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a child's number")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("opening a child's pidfd")?;
    loop {
        if let Some(status) = child.try_wait().context("waiting for a program")? {
            return Ok(Some(status));
        }
        signals::check()?;
        if Instant::now() >= deadline {
            return Ok(None);
        }
        // A signal may come to another thread than this one: look for it now and then.
        let timeout = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for a program"),
        }
    }
}
