//! CPU time of a fleet's processes, by the kernel's accounts in `/proc`.
//!
//! What a VMM spends in guest mode is the guest's and left out. A VMM that ended is in its daemon's account of children, so nothing
//! that happens at the end of a migration is lost. The kernel counts in ticks, mostly of 10 ms: one migration is
//! known to some ticks, a sum over many well.

use anyhow::{Context, Result, anyhow};
use xtask::fleet::layout::FleetName;
use xtask::fleet::processes;

/// What the processes of one host have used so far, in clock ticks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostTicks {
    /// Its daemon's process number.
    pub daemon: i32,
    /// Its daemon.
    pub daemon_ticks: u64,
    /// VMMs that run, and those that have ended; guest mode left out.
    pub vmm_ticks: u64,
    /// Number of VMMs that run.
    pub vmms: Vec<i32>,
}

/// One process's account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Account {
    parent: i32,
    own: u64,
    children: u64,
}

impl HostTicks {
    /// Of the host with this daemon.
    ///
    /// # Errors
    /// When the daemon is gone.
    pub fn read(fleet: &FleetName, daemon: i32) -> Result<Self> {
        let account = account(daemon).ok_or_else(|| anyhow!("mashined (pid {daemon}) is gone"))?;
        let mut ticks =
            Self { daemon, daemon_ticks: account.own, vmm_ticks: account.children, vmms: Vec::new() };
        for process in processes::of_fleet(fleet) {
            let vmm =
                account_of_child(process.pid, daemon).filter(|_| process.program == processes::VMM_PROGRAM);
            if let Some(vmm) = vmm {
                ticks.vmm_ticks += vmm.own;
                ticks.vmms.push(process.pid);
            }
        }
        Ok(ticks)
    }
}

/// Process number of a host's daemon.
///
/// # Errors
/// When it does not run.
pub fn daemon_of(fleet: &FleetName, host: &str) -> Result<i32> {
    let runs_host = |pid: i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        words.windows(2).any(|pair| pair == [b"--name".as_slice(), host.as_bytes()])
    };
    let daemons = processes::of_fleet(fleet).into_iter().filter(|process| process.program == "mashined");
    let pid = daemons.map(|process| process.pid).find(|&pid| runs_host(pid));
    pid.with_context(|| format!("no mashined of {host}"))
}

/// Seconds of so many ticks.
pub fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second().max(1) as f64
}

fn account_of_child(pid: i32, parent: i32) -> Option<Account> {
    account(pid).filter(|account| account.parent == parent)
}

fn account(pid: i32) -> Option<Account> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields of `/proc/PID/stat`, numbered as in its manual page: 4 parent, 14 and 15 own user and system time, 16 and 17 that of children that were
/// waited for, 43 and 44 guest time, which user time includes.
fn parse(stat: &str) -> Option<Account> {
    // The name may hold spaces and parentheses; the fields after the last one do not.
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Account {
        parent: fields.get(1)?.parse().ok()?,
        own: (field(14)? + field(15)?).saturating_sub(field(43)?),
        children: (field(16)? + field(17)?).saturating_sub(field(44)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_those_of_the_manual_page() {
        let numbers: Vec<String> = (5..=52).map(|number| number.to_string()).collect();
        let stat = format!("77 (a) name) S 4 {}", numbers.join(" "));
        let account = parse(&stat).unwrap();
        // Guest time above the rest, as here, must not wrap.
        assert_eq!(account, Account { parent: 4, own: 0, children: 0 });
        let stat = stat.replace(" 43 44 ", " 3 4 ");
        assert_eq!(parse(&stat).unwrap(), Account { parent: 4, own: 14 + 15 - 3, children: 16 + 17 - 4 });
        assert_eq!(parse("77 (short) S 4 5"), None);
    }

    #[test]
    fn our_own_account_can_be_read() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(account(own).is_some());
    }
}
