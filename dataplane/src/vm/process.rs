//! One `mashine-vmm` process and the files it is found by.
//!
//! ```text
//! STATE/vms/m-0123456789abcdef/
//!     control.sock   the VMM listens here, on a descriptor it inherited
//!     pid            "PID STARTTIME", to tell the process from a later one of the same number
//!     vmm.log        what it prints
//!     claim          of a machine that was moved here: whether it may have run; see [`super::claim`]
//!     addresses      which routes and proxy entries may stand for the machine
//! ```
//!
//! The directory is there before the first route of its machine and goes after the last one, forward routes included. So whatever a
//! crash leaves in the kernel is written down here, and the next `mashined` clears it away.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use wire::ids::{Epoch, MachineId};

use super::claim::{self, Claim};
use super::{VmmError, file_error};
use crate::net::Addresses;

/// How long a VMM may take to end after it was told to.
const END_WAIT: Duration = Duration::from_secs(2);

/// A machine's directory.
#[derive(Debug, Clone)]
pub struct MachineDir(PathBuf);

impl MachineDir {
    /// The directory of `machine` under the host's state directory.
    pub fn of(state: &Path, machine: MachineId) -> Self {
        Self(state.join("vms").join(machine.to_string()))
    }

    /// Machines that have a directory under `state`.
    pub fn list(state: &Path) -> Vec<MachineId> {
        let entries = fs::read_dir(state.join("vms")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// Makes the directory and writes the machine's addresses into it.
    ///
    /// # Errors
    /// [`VmmError::File`].
    pub fn create(&self, addresses: &Addresses) -> Result<(), VmmError> {
        fs::create_dir_all(&self.0).map_err(file_error("create", &self.0))?;
        let path = self.file("addresses");
        fs::write(&path, addresses.to_string()).map_err(file_error("write", &path))
    }

    /// The machine's addresses. `None` if they were not written completely: then nothing stands for them yet.
    pub fn addresses(&self) -> Option<Addresses> {
        fs::read_to_string(self.file("addresses")).ok()?.parse().ok()
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// Where to connect to ports of the guest; see [`wire::vmm`].
    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// Writes down that the machine is awaited, to run under `epoch`. Blocks.
    ///
    /// # Errors
    /// [`VmmError::File`].
    pub fn claim(&self, epoch: Epoch) -> Result<Claim, VmmError> {
        Claim::create(&self.file("claim"), epoch)
    }

    /// The epoch under which a machine that was moved here may have run, for one whose VMM cannot be asked.
    pub fn may_have_run(&self) -> Option<Epoch> {
        claim::may_have_run(&self.file("claim"))
    }

    /// Removes the directory and all in it.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.0.display(), %error, "cannot remove a machine's directory");
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// A running VMM process.
#[derive(Debug)]
pub struct VmmProcess {
    pid: Pid,
    pidfd: OwnedFd,
}

impl VmmProcess {
    /// Starts a VMM that listens on the machine's control socket. The directory must have been made.
    ///
    /// # Errors
    /// [`VmmError::Spawn`], [`VmmError::File`].
    pub fn spawn(program: &Path, dir: &MachineDir) -> Result<Self, VmmError> {
        let listen = |socket: &Path| {
            let _stale = fs::remove_file(socket);
            UnixListener::bind(socket).map_err(file_error("listen on", socket))
        };
        let (control, vsock) = (listen(&dir.socket())?, listen(&dir.vsock())?);
        let log_path = dir.file("vmm.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(file_error("open", &log_path))?;
        let log_err = log.try_clone().map_err(file_error("open", &log_path))?;
        let spawn = |source| VmmError::Spawn { path: program.display().to_string(), source };
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(log).stderr(log_err);
        // A process group of its own: Ctrl-C at a terminal stops the daemon, not the machines.
        command.process_group(0);
        command
            .fd_mappings(vec![
                FdMapping { parent_fd: control.into(), child_fd: 3 },
                FdMapping { parent_fd: vsock.into(), child_fd: 4 },
            ])
            .map_err(|e| spawn(std::io::Error::other(e)))?;
        let child = command.spawn().map_err(spawn)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| spawn(std::io::ErrorKind::NotFound.into()))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| spawn(e.into()))?;
        let pid_path = dir.file("pid");
        let identity = format!("{} {}", pid.as_raw_nonzero(), start_time(pid).unwrap_or(0));
        let process = Self { pid, pidfd };
        if let Err(source) = fs::write(&pid_path, identity) {
            process.end();
            return Err(file_error("write", &pid_path)(source));
        }
        Ok(process)
    }

    /// Finds the process that an earlier `mashined` started; `None` if it has ended.
    pub fn find(dir: &MachineDir) -> Option<Self> {
        let identity = fs::read_to_string(dir.file("pid")).ok()?;
        let (pid, started) = identity.trim().split_once(' ')?;
        let pid = Pid::from_raw(pid.parse().ok()?)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // After the descriptor is open the number cannot be given to another process unnoticed.
        (start_time(pid)? == started.parse::<u64>().ok()?).then_some(Self { pid, pidfd })
    }

    /// Its process id, in the namespace of `mashined`.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for it to end by itself, kills it if it does not, and collects it. Blocks for at most a little over two seconds.
    pub fn end(&self) {
        if !self.wait(END_WAIT) {
            tracing::warn!(pid = self.pid(), "the VMM did not end when told to; killing it");
            self.kill();
        }
        self.collect();
    }

    /// Kills it and collects it.
    pub fn kill(&self) {
        let _gone_already = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait(END_WAIT);
        self.collect();
    }

    fn wait(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let timeout = Timespec::try_from(limit).ok();
        matches!(rustix::event::poll(&mut fds, timeout.as_ref()), Ok(n) if n > 0)
    }

    /// Reaps it if it is our child (an adopted one is init's).
    fn collect(&self) {
        let _not_ours = rustix::process::waitpid(Some(self.pid), rustix::process::WaitOptions::NOHANG);
    }
}

/// When a process started, in clock ticks since boot: field 22 of its stat file (proc_pid_stat(5)).
fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The command name, in parentheses, may hold anything; the fields after it do not.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_files_and_ended() {
        let state = tempfile::tempdir().unwrap();
        let dir = MachineDir::of(state.path(), MachineId::from_u64(7));
        let addresses: Addresses = "198.19.0.2 2001:db8::2 02:00:00:00:00:02".parse().unwrap();
        dir.create(&addresses).unwrap();
        // Any program that does not end by itself is what a VMM is to this module.
        let process = VmmProcess::spawn(Path::new("/usr/bin/yes"), &dir).unwrap();
        assert_eq!(MachineDir::list(state.path()), [MachineId::from_u64(7)]);
        assert_eq!(VmmProcess::find(&dir).unwrap().pid(), process.pid());
        process.kill();
        assert!(VmmProcess::find(&dir).is_none());
        assert_eq!(dir.addresses(), Some(addresses), "they outlive the process");
        dir.remove();
        assert!(MachineDir::list(state.path()).is_empty());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let state = tempfile::tempdir().unwrap();
        let dir = MachineDir::of(state.path(), MachineId::from_u64(7));
        fs::create_dir_all(&dir.0).unwrap();
        let error = VmmProcess::spawn(Path::new("/nonexistent/vmm"), &dir).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vmm"));
    }
}
