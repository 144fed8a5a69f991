//! Starting a program: as whom, where, with which environment, on pipes or on a terminal.
//!
//! The program is the leader of a process group of its own (with a terminal: of a session of its own), so that signals reach
//! everything it started. Everything is checked before `fork` that can be, so that an error can say what is wrong.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{ioctl_tiocsctty, setpgid, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use wire::agent::{Exec, FailCode, Size, Task};

use crate::guard;
use crate::users::User;

/// Search path of programs whose client gives none.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that was not started.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Refused {
    /// Why.
    pub code: FailCode,
    /// For people.
    pub detail: String,
}

fn refused(code: FailCode, detail: impl Into<String>) -> Refused {
    Refused { code, detail: detail.into() }
}

/// A program that runs, and our ends of what it reads and writes.
#[derive(Debug)]
pub struct Started {
    /// The program.
    pub child: Child,
    /// Where its input goes; the terminal itself if there is one.
    pub input: Option<OwnedFd>,
    /// Where its output comes from.
    pub outputs: [Option<OwnedFd>; 2],
    /// Whether it has a terminal.
    pub is_tty: bool,
}

/// Starts what a session is to do.
///
/// # Errors
/// [`Refused`], with a code for the client.
pub fn start(task: &Task) -> Result<Started, Refused> {
    match task {
        Task::Exec(exec) => start_exec(exec, None),
        Task::Export { path, user } => {
            let argv = vec![b"mashine-agent".to_vec(), b"tar-export".to_vec(), path.clone()];
            start_exec(&built_in(argv, user.clone(), false), Some(guard::PROGRAM))
        }
        Task::Import { path, user } => {
            let argv = vec![b"mashine-agent".to_vec(), b"tar-import".to_vec(), path.clone()];
            start_exec(&built_in(argv, user.clone(), true), Some(guard::PROGRAM))
        }
    }
}

fn built_in(argv: Vec<Vec<u8>>, user: Option<String>, stdin: bool) -> Exec {
    Exec { argv, user, stdin, cwd: Some(b"/".to_vec()), ..Exec::default() }
}

fn start_exec(exec: &Exec, program: Option<&str>) -> Result<Started, Refused> {
    let system = |error: io::Error| refused(FailCode::System, error.to_string());
    let user = find_user(exec.user.as_deref())?;
    let cwd = directory(exec, &user)?;
    let mut command = command(exec, &user, program)?;
    let terminal = exec.tty.map(|size| open_terminal(size, &user)).transpose().map_err(|error| {
        refused(FailCode::System, format!("cannot open a terminal in the guest: {error}"))
    })?;
    if let Some((_, peer)) = &terminal {
        command.stdin(peer.try_clone().map_err(system)?);
        command.stdout(peer.try_clone().map_err(system)?);
        command.stderr(peer.try_clone().map_err(system)?);
    } else {
        command.stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let cwd = CString::new(cwd).map_err(|error| system(error.into()))?;
    become_user(&mut command, &user, cwd, terminal.is_some());
    let child = command.spawn().map_err(|error| not_started(&command, &error))?;
    ends(child, terminal.map(|(master, _)| master)).map_err(system)
}

fn find_user(wanted: Option<&str>) -> Result<User, Refused> {
    // If nobody is asked for, who we are: root in a guest.
    let own = rustix::process::geteuid().as_raw().to_string();
    let wanted = wanted.unwrap_or(&own);
    match User::find(wanted) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(refused(FailCode::NoSuchUser, format!("there is no user `{wanted}` in the guest"))),
        Err(error) => Err(refused(FailCode::System, format!("cannot read the guest's users: {error}"))),
    }
}

/// The directory that was asked for, or the user's home, or the root.
fn directory(exec: &Exec, user: &User) -> Result<Vec<u8>, Refused> {
    let is_directory = |path: &[u8]| Path::new(OsStr::from_bytes(path)).is_dir();
    match &exec.cwd {
        Some(cwd) if cwd.first() == Some(&b'/') && is_directory(cwd) => Ok(cwd.clone()),
        Some(cwd) => {
            let cwd = String::from_utf8_lossy(cwd);
            Err(refused(FailCode::NotFound, format!("there is no directory `{cwd}` in the guest")))
        }
        None if is_directory(user.home.as_bytes()) => Ok(user.home.clone().into_bytes()),
        None => Ok(b"/".to_vec()),
    }
}

fn command(exec: &Exec, user: &User, program: Option<&str>) -> Result<Command, Refused> {
    let bad = |what: &str| refused(FailCode::BadRequest, what.to_owned());
    if exec.argv.iter().flatten().any(|&byte| byte == 0) || exec.argv.first().is_some_and(Vec::is_empty) {
        return Err(bad("an argument holds a zero byte, or the program has no name"));
    }
    let mut command = match exec.argv.split_first() {
        Some((first, arguments)) => {
            let first = OsStr::from_bytes(first);
            let mut command = Command::new(program.map_or(first, OsStr::new));
            command.arg0(first).args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));
            command
        }
        None => {
            let mut command = Command::new(&user.shell);
            let name = user.shell.rsplit('/').next().unwrap_or_default();
            // A leading dash makes it a login shell.
            command.arg0(format!("-{name}"));
            command
        }
    };
    command.env_clear().env("PATH", PATH).env("HOME", &user.home).env("SHELL", &user.shell);
    command.env("USER", &user.name).env("LOGNAME", &user.name);
    for variable in &exec.env {
        let (name, value) = (&variable.name, &variable.value);
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) || value.contains(&0) {
            return Err(bad("an environment variable's name or value cannot be"));
        }
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    Ok(command)
}

fn open_terminal(size: Size, user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let peer = ioctl_tiocgptpeer(&master, flags)?;
    set_size(&master, size)?;
    // So that the user may open it by its name; without it the terminal still works.
    let _ = rustix::fs::fchown(&peer, Some(Uid::from_raw(user.uid)), None);
    Ok((master, peer))
}

/// Tells a terminal its size; its foreground group gets SIGWINCH.
///
/// # Errors
/// The kernel's.
pub fn set_size(terminal: &OwnedFd, size: Size) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// What happens in the child between `fork` and `exec`.
fn become_user(command: &mut Command, user: &User, cwd: CString, is_tty: bool) {
    let groups: Vec<Gid> = user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let is_root = rustix::process::geteuid().is_root();
    let prepare = move || {
        be_as_mortal_as_others();
        if is_tty {
            setsid()?;
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        } else {
            setpgid(None, None)?;
        }
        if is_root {
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        rustix::process::umask(Mode::from_raw_mode(0o022));
        Ok(rustix::process::chdir(cwd.as_c_str())?)
    };
    // SAFETY: `prepare` makes system calls only: it neither allocates nor takes a lock, so it may run after `fork`.
    unsafe { command.pre_exec(prepare) };
}

/// What the agent is spared, its programs are not: see [`crate::guard`]. Between `fork` and `exec`.
fn be_as_mortal_as_others() {
    if let Ok(file) = rustix::fs::open(guard::OOM_SCORE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Makes the console, which is the program's input already, its controlling terminal.
pub fn on_console(command: &mut Command) {
    let prepare = || {
        setsid()?;
        // Another session may have it; the program then runs without job control.
        let _ = ioctl_tiocsctty(rustix::stdio::stdin());
        Ok(())
    };
    // SAFETY: two system calls; neither allocates nor takes a lock, so it may run after `fork`.
    unsafe { command.pre_exec(prepare) };
}

fn not_started(command: &Command, error: &io::Error) -> Refused {
    let program = command.get_program().to_string_lossy();
    let code = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => FailCode::NotFound,
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ELOOP) => FailCode::NotExecutable,
        Some(libc::E2BIG) => FailCode::BadRequest,
        _ => FailCode::System,
    };
    refused(code, format!("cannot start `{program}` in the guest: {error}"))
}

fn ends(mut child: Child, terminal: Option<OwnedFd>) -> io::Result<Started> {
    let is_tty = terminal.is_some();
    let (input, outputs) = match terminal {
        Some(master) => (Some(master.try_clone()?), [Some(master), None]),
        None => {
            let outputs = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
            (child.stdin.take().map(OwnedFd::from), outputs)
        }
    };
    for end in input.iter().chain(outputs.iter().flatten()) {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    Ok(Started { child, input, outputs, is_tty })
}
