//! Machine, kernel and commit of a measurement.

use std::process::Command;

use serde::Serialize;
use xtask::{command, repository};

/// Where and on what it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Place {
    /// Processor, as the kernel names it.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// RAM, in MiB.
    pub ram_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Whether KVM uses the processor's virtualisation, or pages in software.
    pub kvm: &'static str,
    /// Commit of the work tree, with `+` if files of it were changed.
    pub commit: String,
    /// Load average over the last minute when the measurement began: above 1 or so something else was running.
    pub load_before: f64,
}

impl Place {
    /// Looks around.
    pub fn look() -> Self {
        let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = field(&cpu_info, "model name").unwrap_or("unknown").to_owned();
        let flags = field(&cpu_info, "flags").unwrap_or_default();
        let hardware = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let ram_kib =
            field(&memory, "MemTotal").and_then(|text| text.split_whitespace().next()?.parse().ok());
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            ram_mib: ram_kib.unwrap_or(0_u64) >> 10,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            kvm: if hardware { "hardware" } else { "software-paged" },
            commit: commit(),
            load_before: load(),
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let Self { cpu, cores, ram_mib, kernel, kvm, commit, load_before } = self;
        format!(
            "{cpu}, {cores} cores, {} GiB, Linux {kernel}, KVM {kvm}, commit {commit}, load {load_before:.1} at the start",
            ram_mib.div_ceil(1024)
        )
    }
}

/// Load average over the last minute; 0 if it cannot be read.
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

/// Value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        command::read(git.current_dir(repository::root()).args(arguments))
    };
    let Ok(head) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|text| !text.trim().is_empty());
    format!("{}{}", head.trim(), if changed { "+" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_exact_name() {
        let text = "model\t\t: 85\nmodel name\t: Some CPU @ 2.6 GHz\nflags : a svm b\n";
        assert_eq!(field(text, "model name"), Some("Some CPU @ 2.6 GHz"));
        assert_eq!(field(text, "name"), None);
    }
}
