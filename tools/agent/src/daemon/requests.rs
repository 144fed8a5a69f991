//! Requests without a session: news of the guest, its clock, its end.

use std::fs;
use std::io;
use std::process::{Command, Stdio};

use rustix::time::{ClockId, Timespec};
use wire::agent::{FailCode, FromAgent, Info, Request};

/// Addresses that are told; a guest may have any number.
const ADDRESSES_MAX: usize = 64;
const NS_PER_S: u64 = 1_000_000_000;

/// The answer to a request.
pub fn answer(request: &Request, sessions: usize) -> FromAgent {
    match request {
        Request::Ping => FromAgent::Pong,
        Request::Info => FromAgent::Info(Box::new(info(sessions))),
        Request::SetTime { realtime_ns } => done(set_time(*realtime_ns)),
        Request::Shutdown { reboot } => done(shut_down(*reboot)),
    }
}

fn done(result: io::Result<()>) -> FromAgent {
    match result {
        Ok(()) => FromAgent::Done,
        Err(error) => FromAgent::Failed { code: FailCode::System, detail: error.to_string() },
    }
}

fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// `12.345` as 12345.
fn milli(text: &str) -> u64 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let fraction: String = fraction.chars().chain("000".chars()).take(3).collect();
    whole.parse::<u64>().unwrap_or(0).saturating_mul(1000).saturating_add(fraction.parse().unwrap_or(0))
}

fn memory(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

fn info(sessions: usize) -> Info {
    let load = line("/proc/loadavg");
    let mut loads = load.split(' ').map(|text| u32::try_from(milli(text)).unwrap_or(u32::MAX));
    let meminfo = line("/proc/meminfo");
    let uptime = line("/proc/uptime");
    let kernel = rustix::system::uname();
    Info {
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        uptime_ms: uptime.split(' ').next().map_or(0, milli),
        load_milli: std::array::from_fn(|_| loads.next().unwrap_or(0)),
        memory_bytes: memory(&meminfo, "MemTotal:"),
        memory_available_bytes: memory(&meminfo, "MemAvailable:"),
        hostname: kernel.nodename().to_string_lossy().into_owned(),
        kernel: kernel.release().to_string_lossy().into_owned(),
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        addresses: crate::init::network::addresses(ADDRESSES_MAX),
        realtime_ns: realtime_ns(),
        sessions: u32::try_from(sessions).unwrap_or(u32::MAX),
    }
}

fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(NS_PER_S).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

fn set_time(realtime_ns: u64) -> io::Result<()> {
    let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let time = Timespec {
        tv_sec: i64::try_from(realtime_ns / NS_PER_S).map_err(out_of_range)?,
        tv_nsec: i64::try_from(realtime_ns % NS_PER_S).map_err(out_of_range)?,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

/// Asks the image's init to end the guest. systemd and busybox take these words; where there is no such program, the first process is
/// ours (see `init::alone`), and takes signals.
fn shut_down(reboot: bool) -> io::Result<()> {
    let (word, signal) = if reboot {
        ("reboot", rustix::process::Signal::INT)
    } else {
        ("poweroff", rustix::process::Signal::TERM)
    };
    let mut ways = ["/sbin", "/bin", "/usr/sbin", "/usr/bin"].iter().map(|place| format!("{place}/{word}"));
    let ours = is_init_ours();
    match ways.find(|path| fs::metadata(path).is_ok()).filter(|_| !ours) {
        Some(path) => {
            let mut command = Command::new(path);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            // It answers at once; what it began goes on.
            command.status().map(drop)
        }
        None if ours => Ok(rustix::process::kill_process(rustix::process::Pid::INIT, signal)?),
        None => Err(io::Error::other("this image has no poweroff or reboot program")),
    }
}

/// Whether the first process is our own program.
fn is_init_ours() -> bool {
    let init = fs::read_link("/proc/1/exe").unwrap_or_default();
    fs::read_link("/proc/self/exe").is_ok_and(|own| own == init)
}

/// The power button was pressed: ends the guest, unless the image's own services or our own first process do.
pub fn power_button_pressed() {
    if crate::power::is_seen_to() || is_init_ours() {
        return;
    }
    if let Err(error) = shut_down(false) {
        crate::say!("the power button was pressed, but {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_proc_are_read() {
        assert_eq!((milli("12.3"), milli("0.01"), milli("7"), milli("x")), (12_300, 10, 7_000, 0));
        let text = "MemTotal:        2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\n";
        assert_eq!((memory(text, "MemTotal:"), memory(text, "MemAvailable:")), (2 << 20, 1 << 20));
        let info = info(3);
        assert!(info.uptime_ms > 0 && info.memory_bytes > info.memory_available_bytes);
        assert_eq!(info.boot_id.len(), 36);
    }
}
