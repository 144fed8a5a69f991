//! The load: pgbench, from the client's network, against PostgreSQL in the machine.
//!
//! It runs until it is told to end: its own clock is set to an hour, and the alarm that ends the hour is sent early. So it
//! ends as at the end of its time, and prints how many transactions failed.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::fleet::netns;
use crate::{command, signals};

/// Database and user that the machine is given for it.
pub const DATABASE: &str = "bench";
/// Longest run, in seconds.
const RUN_S: u32 = 3600;
/// Clients, each with a connection of its own.
const CLIENTS: u32 = 2;
/// Longest wait for its end, once it was told: for the transactions that are under way.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Longest time for filling the tables.
const FILL_LIMIT: Duration = Duration::from_secs(180);

/// A running pgbench.
#[derive(Debug)]
pub struct Pgbench {
    child: Option<Child>,
}

/// What it said at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Transactions that were done.
    pub done: u64,
    /// Transactions that failed, of any cause, and clients that gave up.
    pub failed: u64,
}

fn program(address: IpAddr) -> Command {
    let mut command = Command::new("pgbench");
    command.args(["-h", &address.to_string(), "-U", DATABASE]).env("PGCONNECT_TIMEOUT", "60");
    command
}

/// Makes its tables, and fills them.
///
/// # Errors
/// When the machine's PostgreSQL does not let it.
pub fn fill(namespace: &str, address: IpAddr) -> Result<()> {
    let mut fill = program(address);
    fill.args(["--initialize", "--quiet", "--scale", "1", DATABASE]);
    let watched = netns::within(namespace, || command::stream(&mut fill, FILL_LIMIT))??;
    if !watched.succeeded {
        bail!("pgbench cannot fill its tables: {}", watched.lines.join("\n"));
    }
    Ok(())
}

impl Pgbench {
    /// Starts it, as fast as it goes, or with `per_second` transactions at most.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn start(namespace: &str, address: IpAddr, per_second: Option<u32>) -> Result<Self> {
        let mut run = program(address);
        run.args(["--no-vacuum", "--client", &CLIENTS.to_string(), "--time", &RUN_S.to_string()]);
        run.args(per_second.map(|rate| format!("--rate={rate}"))).arg(DATABASE);
        run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = netns::within(namespace, || run.spawn())?.context("starting pgbench")?;
        Ok(Self { child: Some(child) })
    }

    /// # Errors
    /// When it has ended, which it does not by itself unless its connections broke.
    pub fn check(&mut self) -> Result<()> {
        let ended = match &mut self.child {
            Some(child) => child.try_wait().context("asking for pgbench")?,
            None => None,
        };
        match ended {
            Some(status) => bail!("pgbench ended before its time ({status})"),
            None => Ok(()),
        }
    }

    /// Ends it as at the end of its time, and returns its figures.
    ///
    /// # Errors
    /// When it does not end, or prints no figures.
    pub fn finish(mut self) -> Result<Figures> {
        let Some(mut child) = self.child.take() else { bail!("pgbench has ended") };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("pgbench's number")?;
        if child.try_wait().context("asking for pgbench")?.is_none() {
            kill_process(pid, Signal::ALARM).context("telling pgbench to end")?;
        }
        let deadline = Instant::now() + END_LIMIT;
        while child.try_wait().context("asking for pgbench")?.is_none() {
            if let Err(error) = signals::check() {
                let _ = child.kill();
                return Err(error.into());
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                bail!("pgbench does not end: a transaction of it hangs");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let output = child.wait_with_output().context("reading from pgbench")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        figures(&text, &errors).with_context(|| format!("pgbench said:\n{text}{errors}"))
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn figures(text: &str, errors: &str) -> Result<Figures> {
    let number = |label: &str| {
        let rest = text.lines().find_map(|line| line.trim().strip_prefix(label));
        rest.and_then(|rest| rest.trim().split([' ', '/']).next()?.parse::<u64>().ok())
    };
    let done = number("number of transactions actually processed:")
        .context("it printed no number of transactions")?;
    let failed = number("number of failed transactions:").context("it printed no number of failed ones")?;
    let aborted = errors.lines().filter(|line| line.contains("aborted")).count();
    Ok(Figures { done, failed: failed + u64::try_from(aborted)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "transaction type: <builtin: TPC-B (sort of)>\nnumber of transactions actually processed: 1234\n\
                        number of failed transactions: 2 (0.162%)\nlatency average = 3 ms\n";

    #[test]
    fn failed_transactions_and_clients_that_gave_up_are_counted() {
        assert_eq!(figures(TEXT, "").unwrap(), Figures { done: 1234, failed: 2 });
        let gave_up =
            "pgbench: error: client 1 aborted in command 4 (SQL) of script 0; perhaps the backend died\n";
        assert_eq!(figures(TEXT, gave_up).unwrap().failed, 3);
        assert!(figures("", gave_up).is_err());
    }
}
