//! The guest's command port: one line out, one JSON object back (the contract is tests/guest/README.md).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::fleet::netns;
use crate::signals;

/// TCP port of the echo service.
pub const ECHO_PORT: u16 = 7;
/// TCP port of the command service.
const COMMAND_PORT: u16 = 9;
/// Longest wait for an answer: verifying some GiB takes seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Longest answer, in bytes. The guest is not trusted.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// How long a fresh guest gets until its network answers.
const BOOT_LIMIT: Duration = Duration::from_secs(20);

/// Connects from a namespace to a port of the guest, trying again until it listens.
///
/// # Errors
/// When it does not within [`BOOT_LIMIT`].
pub fn connect(namespace: &str, address: IpAddr, port: u16) -> Result<TcpStream> {
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        signals::check()?;
        let to = SocketAddr::new(address, port);
        let begun = Instant::now();
        match netns::within(namespace, || TcpStream::connect_timeout(&to, Duration::from_secs(1)))? {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("connecting to {to}"));
            }
            // A guest that boots refuses at once; do not ask it thousands of times a second.
            Err(_) => std::thread::sleep(Duration::from_millis(20).saturating_sub(begun.elapsed())),
        }
    }
}

/// A connection to the command port.
#[derive(Debug)]
pub struct Commands {
    stream: BufReader<TcpStream>,
}

/// Answer to `status`: what does not change, and what only grows.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// Drawn at boot.
    pub boot_id: String,
    /// Since boot.
    pub uptime_us: u64,
    /// RAM it found.
    pub ram_bytes: u64,
    /// Timer interrupts since boot.
    pub ticks: u64,
    /// Page writes since boot.
    pub pages_written: u64,
}

/// Answer to `verify`.
#[derive(Debug, Clone, Deserialize)]
pub struct Verified {
    /// Pages that were checked.
    pub pages: u64,
    /// Pages that never were written.
    pub unwritten: u64,
    /// Pages that are not what was written last.
    pub wrong: u64,
    /// Whether the number of writes is the sum over all pages.
    pub sum_ok: bool,
}

/// Answer to `populate`.
#[derive(Debug, Clone, Deserialize)]
pub struct Populated {
    /// Pages written.
    pub pages: u64,
}

/// Answer to `gap`.
#[derive(Debug, Clone, Deserialize)]
pub struct Gap {
    /// Largest time in which the guest's loop did not run.
    pub gap_us_max: u64,
}

/// Answer whose content does not matter.
#[derive(Debug, Clone, Deserialize)]
pub struct Done {}

impl Commands {
    /// Connects from a namespace.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn connect(namespace: &str, address: IpAddr) -> Result<Self> {
        let stream = connect(namespace, address, COMMAND_PORT)?;
        stream.set_nodelay(true).context("switching Nagle's algorithm off")?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).context("setting a timeout")?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).context("setting a timeout")?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends one command and awaits its answer.
    ///
    /// # Errors
    /// When the connection breaks, or the guest says no.
    pub fn ask<T: DeserializeOwned>(&mut self, command: &str) -> Result<T> {
        self.exchange(command).with_context(|| format!("asking the guest for `{command}`"))
    }

    fn exchange<T: DeserializeOwned>(&mut self, command: &str) -> Result<T> {
        self.stream.get_mut().write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        self.stream.by_ref().take(ANSWER_BYTES_MAX).read_line(&mut line)?;
        if line.is_empty() {
            bail!("it closed the connection");
        }
        let answer: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("not JSON: {}", line.trim()))?;
        if answer.get("ok") != Some(&serde_json::Value::Bool(true)) {
            return Err(anyhow!("it said {}", line.trim()));
        }
        serde_json::from_value(answer).with_context(|| format!("not the expected answer: {}", line.trim()))
    }
}
