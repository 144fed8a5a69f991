//! What a Linux guest says about itself, before and after it moved: boot id, uptime, processes, kernel messages.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// Shell that prints it all, in one go: each program that a slow guest starts costs it.
pub const SCRIPT: &str = "cat /proc/sys/kernel/random/boot_id /proc/uptime /proc/sys/kernel/osrelease; echo processes; \
                          cat /proc/[0-9]*/stat 2>/dev/null; echo messages; dmesg";
/// Flag of kernel threads, in the ninth field of `/proc/PID/stat`.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Parts of kernel messages that no machine may print because it was moved.
const BAD: [&str; 16] = [
    "soft lockup",
    "hard lockup",
    "hung_task",
    "blocked for more than",
    "rcu_sched self-detected stall",
    "rcu_preempt self-detected stall",
    "detected stalls on CPUs",
    "clocksource: timekeeping watchdog",
    "clocksource: Long readout",
    "time jumped",
    "clock skew",
    "I/O error",
    "Buffer I/O",
    "NETDEV WATCHDOG",
    "Call Trace",
    "kernel BUG",
];
/// The same for devices, with a word that says what the line is about.
const BAD_DEVICE: [&str; 5] = ["error", "fail", "timeout", "timed out", "stuck"];

/// A process: its number alone may be given again.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    name: String,
    /// Clock ticks from boot to its start.
    started: u64,
}

/// All of it, at one moment.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Drawn by the kernel when it boots.
    pub boot_id: String,
    /// Since boot.
    pub uptime_s: f64,
    /// Release of the kernel.
    pub kernel: String,
    processes: BTreeMap<u32, Process>,
    messages: Vec<String>,
}

impl Facts {
    /// Reads what [`SCRIPT`] printed.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let mut next =
            |what| lines.next().map(str::trim).with_context(|| format!("the guest tells no {what}"));
        let boot_id = next("boot id")?.to_owned();
        let uptime = next("uptime")?;
        let kernel = next("kernel")?.to_owned();
        if next("processes")? != "processes" || boot_id.len() != 36 {
            bail!("the guest says something else than was asked");
        }
        let uptime_s = uptime.split(' ').next().unwrap_or_default().parse().context("the guest's uptime")?;
        let processes =
            lines.by_ref().take_while(|line| line.trim() != "messages").filter_map(process).collect();
        let messages = lines.map(|line| line.trim().to_owned()).collect();
        Ok(Self { boot_id, uptime_s, kernel, processes, messages })
    }

    /// Processes of user space, as `NAME (PID)`, that are in `self` and `also`, and not, or as others, in `later`.
    pub fn gone(&self, also: &Self, later: &Self) -> Vec<String> {
        let lasting = self.processes.iter().filter(|(pid, process)| also.processes.get(pid) == Some(process));
        let gone = lasting.filter(|(pid, process)| later.processes.get(pid) != Some(process));
        gone.map(|(pid, process)| format!("{} ({pid})", process.name)).collect()
    }

    /// How many processes of user space are in both.
    pub fn in_common(&self, other: &Self) -> usize {
        self.processes.iter().filter(|(pid, process)| other.processes.get(pid) == Some(process)).count()
    }

    /// The kernel's messages that tell of harm.
    pub fn bad_messages(&self) -> Vec<String> {
        self.messages.iter().filter(|line| is_bad(line)).cloned().collect()
    }

    /// Those of them that `earlier` did not have.
    pub fn bad_messages_since(&self, earlier: &Self) -> Vec<String> {
        let mut bad = self.bad_messages();
        bad.retain(|line| !earlier.messages.contains(line));
        bad
    }
}

fn is_bad(line: &str) -> bool {
    let device = line.contains("virtio") || line.contains("vda") || line.contains("vsock");
    BAD.iter().any(|part| line.contains(part)) || device && BAD_DEVICE.iter().any(|part| line.contains(part))
}

/// A line of `/proc/PID/stat`; `None` for threads of the kernel. A name may have anything in it, so its end is the last bracket.
fn process(line: &str) -> Option<(u32, Process)> {
    let (head, tail) = line.rsplit_once(')')?;
    let (pid, name) = head.split_once(" (")?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    if flags & KERNEL_THREAD != 0 {
        return None;
    }
    let started = fields.get(19)?.parse().ok()?;
    Some((pid.trim().parse().ok()?, Process { name: name.to_owned(), started }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(processes: &str, messages: &str) -> Facts {
        let id = "01234567-89ab-cdef-0123-456789abcdef";
        Facts::parse(&format!(
            "{id}\n12.50 20.00\n6.1.0-56-cloud-amd64\nprocesses\n{processes}messages\n{messages}"
        ))
        .unwrap()
    }

    fn line(pid: u32, name: &str, flags: u64, started: u64) -> String {
        format!("{pid} ({name}) S 1 1 1 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 {started} 0 0\n")
    }

    #[test]
    fn processes_that_last_must_be_the_same_afterwards() {
        let sshd = line(100, "sshd: a) (b", 256, 500);
        let before = facts(
            &(line(1, "systemd", 256, 1)
                + &line(2, "kthreadd", 0x0020_8040, 1)
                + &sshd
                + &line(101, "cat", 0, 600)),
            "",
        );
        let again = facts(&(line(1, "systemd", 256, 1) + &sshd), "");
        assert_eq!(
            (before.uptime_s, before.kernel.as_str(), before.in_common(&again)),
            (12.5, "6.1.0-56-cloud-amd64", 2)
        );
        assert!(before.gone(&again, &again).is_empty(), "what did not last is not asked for");
        let restarted = facts(&(line(1, "systemd", 256, 1) + &line(100, "sshd: a) (b", 256, 900)), "");
        assert_eq!(before.gone(&again, &restarted), ["sshd: a) (b (100)"]);
    }

    #[test]
    fn messages_of_harm_are_told_from_others() {
        let bad =
            "[ 9.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n[ 9.2] virtio_net virtio0: timeout\n";
        let good = "[ 0.1] clocksource: Switched to clocksource kvm-clock\n[ 1.0] virtio_blk virtio1: 1/0/0 default/read/poll queues\n";
        let before = facts("", &format!("{bad}{good}"));
        assert_eq!(before.bad_messages().len(), 2);
        let after = facts("", &format!("{bad}{good}[ 9.3] vda: I/O error\n"));
        assert_eq!(after.bad_messages_since(&before).len(), 1);
    }

    #[test]
    fn a_guest_that_says_something_else_is_refused() {
        for bad in ["", "x\n1\n2\nprocesses\n", "01234567-89ab-cdef-0123-456789abcdef\n1 2\nk\n"] {
            assert!(Facts::parse(bad).is_err(), "{bad:?}");
        }
    }
}
