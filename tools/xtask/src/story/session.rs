//! Sessions that stay open while the machine moves, and tell when anything of what they carry is lost, doubled or late.
//!
//! A session is a program of ours (`ssh`, `mashines exec`, `mashines enter`) whose other end is in the guest. It carries numbers, one a line, each
//! one more than the last. Two kinds: the guest counts by itself and we listen; or we send a number and it comes back, one
//! under way at a time, so that the time between two answers is what a client sees of a migration.
//!
//! What is no number before the first number is the greeting of a shell or a terminal, and passed over.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{Mode, OFlags};

use crate::{command, signals};

/// What a guest's shell runs to count: a number each 200 ms.
pub const COUNT: &str = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done";
/// Time from one message that is to come back to the next.
const PACE: Duration = Duration::from_millis(10);
/// How often is looked whether something came.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest line: a number, or what a shell says first. The guest is not trusted.
const LINE_BYTES_MAX: u64 = 4096;
/// Lines that a session may begin with before its first number.
const GREETING_LINES_MAX: u32 = 200;
/// Arrivals that are kept: hours of them.
const ARRIVALS_MAX: usize = 2_000_000;

#[derive(Debug, Default)]
struct Seen {
    arrivals: Vec<Instant>,
    broken: Option<String>,
}

/// An open session.
#[derive(Debug)]
pub struct Session {
    name: &'static str,
    child: Child,
    seen: Arc<Mutex<Seen>>,
    /// Held so that the other end does not see the end of its input.
    _input: Option<ChildStdin>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Opens one whose guest counts. `typed` is what is written to it first.
    ///
    /// # Errors
    /// When its program cannot be started.
    pub fn counting(name: &'static str, program: &mut Command, typed: &str) -> Result<Self> {
        let (child, mut input, output) = start(program)?;
        input.write_all(typed.as_bytes()).with_context(|| format!("writing to the {name} session"))?;
        let seen = Arc::<Mutex<Seen>>::default();
        let thread = watch(name, &seen, move |seen| listen(output, seen))?;
        Ok(Self { name, child, seen, _input: Some(input), thread: Some(thread) })
    }

    /// As [`Session::counting`], with a program that wants a terminal.
    ///
    /// # Errors
    /// When there is no terminal, or its program cannot be started.
    pub fn counting_in_terminal(name: &'static str, program: &mut Command, typed: &str) -> Result<Self> {
        let (mut ours, theirs) = terminal().context("making a terminal")?;
        let shown = command::shown(program);
        let end = || theirs.try_clone().context("sharing a terminal");
        program.stdin(end()?).stdout(end()?).stderr(end()?);
        let child = program.spawn().with_context(|| format!("starting `{shown}`"));
        // The command holds the other end open, and so it would never be seen to close.
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        drop(theirs);
        let child = child?;
        ours.write_all(typed.as_bytes()).with_context(|| format!("typing into the {name} session"))?;
        let seen = Arc::<Mutex<Seen>>::default();
        let thread = watch(name, &seen, move |seen| listen(ours, seen))?;
        Ok(Self { name, child, seen, _input: None, thread: Some(thread) })
    }

    /// Opens one whose guest sends back what it gets.
    ///
    /// # Errors
    /// When its program cannot be started.
    pub fn echoing(name: &'static str, program: &mut Command) -> Result<Self> {
        let (child, input, output) = start(program)?;
        let seen = Arc::<Mutex<Seen>>::default();
        let thread = watch(name, &seen, move |seen| converse(input, output, seen))?;
        Ok(Self { name, child, seen, _input: None, thread: Some(thread) })
    }

    /// Waits for something to arrive after `time`, at most `limit`; returns when it did.
    ///
    /// # Errors
    /// When the session is broken, or silent for too long.
    pub fn arrival_after(&self, time: Instant, limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        loop {
            signals::check()?;
            {
                let seen = lock(&self.seen);
                if let Some(last) = seen.arrivals.last().copied().filter(|last| *last > time) {
                    return Ok(last);
                }
                if let Some(why) = &seen.broken {
                    bail!("the {} session broke: {why}", self.name);
                }
            }
            if Instant::now() >= deadline {
                bail!("the {} session is silent for {limit:?}", self.name);
            }
            // To be woken for each number would disturb what is measured.
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Largest time between two arrivals, of those that touch `from..=to`, in microseconds.
    pub fn gap_us_max(&self, from: Instant, to: Instant) -> Option<u64> {
        let seen = lock(&self.seen);
        let gaps = seen.arrivals.windows(2).filter_map(|pair| match pair {
            [earlier, later] if *later >= from && *earlier <= to => Some(*later - *earlier),
            _ => None,
        });
        gaps.max().map(|gap| u64::try_from(gap.as_micros()).unwrap_or(u64::MAX))
    }

    /// Whether it lives, with all numbers in their order; else why not. And how many there were.
    pub fn verdict(&self) -> (Result<()>, usize) {
        let seen = lock(&self.seen);
        let outcome = match &seen.broken {
            Some(why) => Err(anyhow!("the {} session broke: {why}", self.name)),
            None => Ok(()),
        };
        (outcome, seen.arrivals.len())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A program that has ended already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn start(program: &mut Command) -> Result<(Child, ChildStdin, ChildStdout)> {
    let shown = command::shown(program);
    let mut child = program
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // What it says when it breaks is for whoever looks.
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting `{shown}`"))?;
    match (child.stdin.take(), child.stdout.take()) {
        (Some(input), Some(output)) => Ok((child, input, output)),
        _ => bail!("no pipes to `{shown}`"),
    }
}

/// A new terminal: our end and the program's.
fn terminal() -> io::Result<(File, File)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    Ok((ours.into(), theirs.into()))
}

fn watch(
    name: &str,
    seen: &Arc<Mutex<Seen>>,
    work: impl FnOnce(&Mutex<Seen>) -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let seen = Arc::clone(seen);
    let run = move || {
        let why = match work(&seen) {
            Ok(()) => "it ended".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        lock(&seen).broken = Some(why);
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).context("starting a thread")
}

fn listen(output: impl Read, seen: &Mutex<Seen>) -> Result<()> {
    let mut lines = BufReader::new(output);
    let mut last: Option<u64> = None;
    let mut greeting = 0;
    let mut said = String::new();
    while let Some(line) = next_line(&mut lines)? {
        match (line.parse::<u64>(), last) {
            (Ok(0), None) => {}
            (Ok(number), Some(last)) if number == last + 1 => {}
            (_, None) if greeting < GREETING_LINES_MAX => {
                greeting += 1;
                if !line.is_empty() {
                    said = line;
                }
                continue;
            }
            _ => bail!("after {last:?} came {line:?}"),
        }
        last = line.parse().ok();
        arrived(seen);
    }
    if last.is_none() && !said.is_empty() {
        bail!("it ended, and said: {said}");
    }
    Ok(())
}

fn converse(mut input: impl Write, output: impl Read, seen: &Mutex<Seen>) -> Result<()> {
    let mut lines = BufReader::new(output);
    for number in 0_u64.. {
        let begun = Instant::now();
        writeln!(input, "{number}").and_then(|()| input.flush()).context("sending")?;
        let Some(line) = next_line(&mut lines)? else { return Ok(()) };
        if line != number.to_string() {
            bail!("{number} came back as {line:?}");
        }
        arrived(seen);
        std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// The next line without its end; `None` at the end of the stream.
fn next_line(lines: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    match lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
        // A terminal's way to say that nobody is at its other end.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(None),
        read => read.context("receiving")?,
    };
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()))
}

fn arrived(seen: &Mutex<Seen>) {
    let mut seen = lock(seen);
    if seen.arrivals.len() < ARRIVALS_MAX {
        seen.arrivals.push(Instant::now());
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str) -> (Result<()>, usize) {
        let seen = Mutex::<Seen>::default();
        let outcome = listen(text.as_bytes(), &seen);
        (outcome, lock(&seen).arrivals.len())
    }

    #[test]
    fn a_greeting_is_passed_over_and_a_lost_or_doubled_number_is_not() {
        let (outcome, count) = heard("Welcome\r\n# i=0\r\n0\r\n1\r\n2\r\n");
        assert!(outcome.is_ok() && count == 3, "{outcome:?} {count}");
        for bad in ["0\n1\n3\n", "0\n1\n1\n", "0\nx\n", "0\n1\n0\n"] {
            assert!(heard(bad).0.is_err(), "{bad}");
        }
    }

    #[test]
    fn an_echo_is_timed_and_its_end_seen() {
        let echo = Session::echoing("echo", &mut Command::new("cat")).unwrap();
        let begun = Instant::now();
        let after = echo.arrival_after(begun, Duration::from_secs(10)).unwrap();
        assert!(echo.gap_us_max(begun, after).is_some() && echo.verdict().0.is_ok());

        let typed =
            Session::counting_in_terminal("terminal", &mut Command::new("sh"), "echo; test -t 0 && echo 0\n")
                .unwrap();
        typed.arrival_after(begun, Duration::from_secs(10)).unwrap();

        let ending =
            Session::counting("count", Command::new("sh").args(["-c", "echo 0; echo 1"]), "").unwrap();
        let late = Instant::now() + Duration::from_secs(3600);
        let why = ending.arrival_after(late, Duration::from_secs(10)).unwrap_err();
        assert!(why.to_string().contains("it ended"), "{why}");
        assert_eq!(ending.verdict().1, 2);
    }
}
