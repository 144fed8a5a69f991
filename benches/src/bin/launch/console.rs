//! The moment of a new machine's first byte, seen from outside.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::signals;

/// How often is looked: the resolution of the result.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// Longest wait.
const LIMIT: Duration = Duration::from_secs(30);
/// Name of the console's memory file, as `/proc` shows it.
const CONSOLE: &str = "/memfd:mashine-console";

/// What was seen.
#[derive(Debug)]
pub struct Watched {
    /// The VMM's process number.
    pub pid: i32,
    /// When it was there.
    pub process: Instant,
    /// When the guest had written a byte.
    pub first_byte: Instant,
}

/// Waits for a child of `daemon`, which has none now, and for the first byte of its console.
///
/// # Errors
/// When it does not come within [`LIMIT`].
pub fn first_byte(daemon: i32) -> Result<Watched> {
    let pid = await_some("a VMM process", || child_of(daemon))?;
    let process = Instant::now();
    let console = await_some("its console", || console_of(pid))?;
    await_some("the guest's first byte", || {
        let mut word = [0; 8];
        console.read_exact_at(&mut word, 0).ok().filter(|()| u64::from_le_bytes(word) > 0)
    })?;
    Ok(Watched { pid, process, first_byte: Instant::now() })
}

/// Looks again and again: neither the kernel nor the ring tells another process.
fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        signals::check()?;
        ensure!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A VMM among the daemon's children. Each thread has its own list of those it started.
fn child_of(daemon: i32) -> Option<i32> {
    let threads = std::fs::read_dir(format!("/proc/{daemon}/task")).ok()?;
    threads.flatten().find_map(|thread| {
        let children = std::fs::read_to_string(thread.path().join("children")).ok()?;
        // Between fork and exec the child still is the daemon's own program.
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|&pid: &i32| is_vmm(pid))
    })
}

fn is_vmm(pid: i32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program.ends_with(xtask::fleet::processes::VMM_PROGRAM)
}

/// The console's memory file among the open files of a VMM.
fn console_of(pid: i32) -> Option<File> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let path: PathBuf = files.flatten().map(|file| file.path()).find(|path| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with(CONSOLE))
    })?;
    File::open(path).context("opening a console").ok()
}
