//! Running commands on a lab host: OpenSSH's client outside, dropbear inside, keys that live as long as the lab.
//!
//! One connection a host is kept open and shared by all commands (`ControlMaster`), because a key exchange costs an emulated processor
//! most of a second. Standard streams stay apart, and the exit code is the command's.

use std::io::IsTerminal;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{layout, running};
use crate::fleet::layout::{FleetName, Host};
use crate::fleet::processes::MARK;
use crate::fleet::{netns, state};
use crate::{command, setup};

/// Seconds in which a connection must come about.
const CONNECT_S: u32 = 30;
/// Seconds without a sign of life, times three, after which a connection is given up.
const ALIVE_S: u32 = 20;
/// Where a command finds programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The way into the hosts of a lab.
#[derive(Debug, Clone)]
pub struct Shell {
    lab: FleetName,
}

impl Shell {
    /// The way into `lab`'s hosts.
    pub fn into(lab: &FleetName) -> Self {
        Self { lab: lab.clone() }
    }

    /// Makes the keys: the client's, and one for the servers of all hosts.
    pub(super) fn make_keys(&self) -> Result<()> {
        let directory = layout::ssh_dir(&self.lab);
        std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let client = directory.join("client");
        command::read(
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]).arg(client),
        )?;
        let server = directory.join("server");
        command::read(Command::new("dropbearkey").args(["-t", "ed25519", "-f"]).arg(&server))?;
        let public = command::read(Command::new("dropbearkey").arg("-y").arg("-f").arg(&server))?;
        let public = public
            .lines()
            .find(|line| line.starts_with("ssh-ed25519 "))
            .context("dropbearkey shows no key")?;
        let known = directory.join("known_hosts");
        std::fs::write(&known, format!("* {public}\n"))
            .with_context(|| format!("writing {}", known.display()))
    }

    /// The command that runs `words` on a host. Start it in any namespace, with [`Shell::spawn`], or with [`command::read`] once a
    /// connection is kept open.
    ///
    /// With `terminal` the command gets one; without words it is a shell.
    pub fn command(&self, host: &Host, words: &[String], terminal: bool) -> Command {
        let directory = layout::ssh_dir(&self.lab);
        let path = |name: &str| directory.join(name).display().to_string();
        let mut ssh = Command::new("ssh");
        ssh.env(MARK, self.lab.to_string()).args(["-F", "none", "-i", &path("client")]);
        let options = [
            format!("UserKnownHostsFile={}", path("known_hosts")),
            "GlobalKnownHostsFile=none".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "BatchMode=yes".to_owned(),
            "LogLevel=ERROR".to_owned(),
            format!("ConnectTimeout={CONNECT_S}"),
            format!("ServerAliveInterval={ALIVE_S}"),
            "ControlMaster=auto".to_owned(),
            format!("ControlPath={}", self.control(host).display()),
            "ControlPersist=yes".to_owned(),
        ];
        for option in options {
            ssh.args(["-o", &option]);
        }
        ssh.arg(if terminal { "-t" } else { "-T" }).arg(format!("root@{}", host.ip4()));
        if !words.is_empty() {
            ssh.arg("--").arg(line(words));
        }
        ssh
    }

    fn control(&self, host: &Host) -> PathBuf {
        layout::ssh_dir(&self.lab).join(host.name())
    }

    /// Opens the connection that all later commands share.
    ///
    /// # Errors
    /// When the host does not answer.
    pub(super) fn open(&self, host: &Host) -> Result<()> {
        let mut command = self.command(host, &["true".to_owned()], false);
        netns::within(&self.lab.fabric_namespace(), || command::read(&mut command))??;
        Ok(())
    }

    /// Ends the connections that are kept open, whoever opened them. Their processes write their title over their environment and the mark in
    /// it, so that nobody else finds them; by themselves they would notice only after a minute that the host is gone.
    pub(super) fn close(&self) {
        let Ok(entries) = std::fs::read_dir(layout::ssh_dir(&self.lab)) else { return };
        let is_socket = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_socket());
        for entry in entries.flatten().filter(is_socket) {
            let mut ssh = Command::new("ssh");
            ssh.args(["-F", "none", "-O", "exit", "-S"]).arg(entry.path()).arg("nobody");
            // Refused where a crash left the socket alone.
            let _best_effort = command::read(&mut ssh);
        }
    }

    /// Runs a line of shell on a host and returns what it printed.
    ///
    /// # Errors
    /// When there is no connection, or the line ends with anything but 0; with what it said.
    pub fn read(&self, host: &Host, script: &str) -> Result<String> {
        let words = ["sh", "-c", script].map(str::to_owned);
        let mut command = self.command(host, &words, false);
        netns::within(&self.lab.fabric_namespace(), || command::read(&mut command))?
            .with_context(|| format!("on {}", host.name()))
    }
}

/// `cargo xtask lab run`: runs `words` on a host with our own standard streams, and returns its exit code.
///
/// # Errors
/// When no lab is up, or there is no connection.
pub fn run(host: &Host, words: &[String]) -> Result<u8> {
    setup::become_root()?;
    let lab = layout::name()?;
    if !running::is_up() {
        bail!("no lab is up: `cargo xtask lab up` brings one up");
    }
    let hosts = state::read(&lab).map(|record| record.hosts).unwrap_or_default();
    if !hosts.contains(host) {
        let names: Vec<String> = hosts.iter().map(Host::name).collect();
        bail!("the lab has no {}; its hosts are {}", host.name(), names.join(", "));
    }
    let terminal = words.is_empty() && std::io::stdin().is_terminal();
    let mut command = Shell::into(&lab).command(host, words, terminal);
    let mut child = netns::within(&lab.fabric_namespace(), || command.spawn())?.context("starting ssh")?;
    let status = child.wait().context("waiting for ssh")?;
    // A code is a byte; without one a signal ended ssh itself.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.with_context(|| format!("ssh ended with {status}"))
}

/// Words as a line that a shell reads as the same words.
fn line(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("PATH={PATH} exec env {}", words.join(" "))
}

/// A word as a shell reads it back.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_same_words() {
        let words = ["printf", "%s|", "a b", "", "it's", "$HOME", "\"x\"", "a\nb", "*"].map(str::to_owned);
        let output = Command::new("sh").args(["-c", &line(&words)]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "a b||it's|$HOME|\"x\"|a\nb|*|");
    }

    #[test]
    fn the_exit_code_is_the_commands() {
        let words = ["sh", "-c", "exit 7"].map(str::to_owned);
        assert_eq!(Command::new("sh").args(["-c", &line(&words)]).status().unwrap().code(), Some(7));
    }

    #[test]
    fn no_setting_of_the_user_is_looked_at() {
        let shell = Shell::into(&layout::name().unwrap());
        let command = shell.command(&Host::first(1).unwrap()[0], &[], true);
        let text = command::shown(&command);
        assert!(text.starts_with("ssh -F none ") && text.ends_with("-t root@198.18.0.10"), "{text}");
        // The kernel allows 108 bytes, and ssh adds 17 while it makes the socket.
        assert!(shell.control(&Host::first(26).unwrap()[25]).as_os_str().len() < 80);
    }
}
