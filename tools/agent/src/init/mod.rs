//! From the kernel's first process to the image's own init.
//!
//! ```text
//!   /proc /sys /dev /run ─> modules ─> wait for the root device ─> mount, grow ─> network
//!       ─> switch root ─> identity, volumes ─> start the agent ─> exec the image's init
//!                                                                  └─ none: stay, run the entrypoint or a shell
//! ```
//!
//! What happens on failure: without a root there is nothing to boot, so the reason goes to the console and process 1 ends, which is a kernel panic that
//! the host sees. Everything else that fails is named on the console, and the boot goes on: a guest without its network can still be entered.

pub mod alone;
pub mod cmdline;
pub mod config;
pub mod device;
pub mod identity;
pub mod network;
pub mod root;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;

use self::cmdline::Cmdline;
use self::config::Config;
use self::device::Events;
use crate::{guard, say};

/// Paths of kernel modules, one a line, in the order in which they are loaded.
const MODULES: &str = "/mashines/modules";
/// What the host says about this machine.
const CONFIG: &str = "/mashines/config.json";
/// How long the root device may take. Emulated hosts are slow.
const ROOT_LIMIT: Duration = Duration::from_secs(60);
/// How long other devices may take.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
/// The network interface: the only one, before the image renames it.
const INTERFACE: &str = "eth0";
/// Where an image may keep its init.
const INITS: [&str; 3] = ["/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"];

/// Runs as process 1.
pub fn run() -> ! {
    root::mount_basics();
    say!("init {} of the initramfs", env!("CARGO_PKG_VERSION"));
    let cmdline = Cmdline::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    let config = configuration(&cmdline);
    let events = match Events::listen() {
        Ok(events) => events,
        Err(error) => give_up(&format!("cannot listen to the kernel's events: {error}")),
    };
    load_modules();
    let rescue = cmdline.has("mashine.rescue");
    let is_rooted = mount_root(&cmdline, &events, rescue);
    set_up_network(&config, &events);
    if is_rooted && let Err(error) = root::switch() {
        give_up(&format!("cannot make the image the root: {error}"));
    }
    identity::establish(&config);
    mount_volumes(&config, &events);
    if let Err(error) = guard::spawn() {
        say!("cannot start the agent: {error}");
    }
    if is_rooted {
        exec_init(&cmdline, &config);
    }
    root::mount_rest();
    alone::run(&config, rescue)
}

/// Ends in a kernel panic, with the reason above it.
fn give_up(reason: &str) -> ! {
    say!("cannot boot: {reason}");
    std::process::exit(1)
}

fn configuration(cmdline: &Cmdline) -> Config {
    let mut config = match fs::read_to_string(CONFIG) {
        Ok(text) => Config::parse(&text).unwrap_or_else(|error| {
            say!("{CONFIG} cannot be read: {error}");
            Config::default()
        }),
        Err(_) => Config { console: true, ..Config::default() },
    };
    config.complete(cmdline);
    config
}

/// Loads the modules in the order of the list. One that lacks another's symbols (the kernel says ENOENT) is tried again after the others, as
/// long as that helps: a list that is not quite in order still boots.
fn load_modules() {
    let list = fs::read_to_string(MODULES).unwrap_or_default();
    let mut left: Vec<&str> =
        list.lines().map(str::trim).filter(|path| !path.is_empty() && !path.starts_with('#')).collect();
    loop {
        let before = left.len();
        left.retain(|path| lacks_symbols(path));
        if left.is_empty() || left.len() == before {
            break;
        }
    }
    for path in left {
        say!("module {path}: needs another one, which is not in {MODULES}");
    }
}

/// Loads a module; whether it should be tried again.
fn lacks_symbols(path: &str) -> bool {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) => {
            say!("module {path}: {error}");
            return false;
        }
    };
    match rustix::system::finit_module(&file, c"", 0) {
        Err(Errno::NOENT) => return true,
        // It is there already.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => say!("module {path}: {error}"),
    }
    false
}

/// Whether there is a root; without one only the rescue mode goes on.
fn mount_root(cmdline: &Cmdline, events: &Events, rescue: bool) -> bool {
    let asked = cmdline.value("root");
    let device = asked.unwrap_or("/dev/vda");
    // In rescue mode nobody waits for what was not asked for.
    let limit = if rescue && asked.is_none() { Duration::ZERO } else { ROOT_LIMIT };
    if !events.wait(limit, || Path::new(device).exists()) {
        if rescue {
            say!("no {device}: staying in the initramfs");
            return false;
        }
        give_up(&format!("the root device {device} did not appear within {} s", limit.as_secs()));
    }
    let kind = cmdline.value("rootfstype").unwrap_or("ext4");
    match root::mount_root(device, kind, cmdline.has("ro")) {
        Ok(()) => true,
        Err(error) if rescue => {
            say!("{device} cannot be mounted: {error}; staying in the initramfs");
            false
        }
        Err(error) => give_up(&format!("{device} cannot be mounted as {kind}: {error}")),
    }
}

fn set_up_network(config: &Config, events: &Events) {
    if let Err(error) = network::loopback() {
        say!("bringing lo up: {error}");
    }
    if config.network.ip4.is_none() && config.network.ip6.is_none() {
        return;
    }
    let interface = Path::new("/sys/class/net").join(INTERFACE);
    if !events.wait(DEVICE_LIMIT, || interface.exists()) {
        say!("no network interface {INTERFACE} within {} s", DEVICE_LIMIT.as_secs());
        return;
    }
    for failed in network::configure(INTERFACE, &config.network) {
        say!("{failed}");
    }
}

fn mount_volumes(config: &Config, events: &Events) {
    for volume in &config.volumes {
        let there = events.wait(DEVICE_LIMIT, || Path::new(&volume.device).exists());
        let mounted =
            if there { root::mount_volume(volume) } else { Err(std::io::ErrorKind::NotFound.into()) };
        if let Err(error) = mounted {
            say!("volume {} on {}: {error}", volume.device, volume.mountpoint);
        }
    }
}

/// Becomes the image's init; returns if it has none.
fn exec_init(cmdline: &Cmdline, config: &Config) {
    for path in cmdline.value("init").into_iter().chain(INITS) {
        if fs::metadata(path).is_err() {
            continue;
        }
        let mut command = Command::new(path);
        command.env_clear().env("PATH", crate::daemon::spawn::PATH).env("TERM", "linux");
        command.env("HOME", "/").envs(config.variables());
        if cmdline.has("single") {
            command.arg("single");
        }
        let error = command.exec();
        say!("cannot start {path}: {error}");
    }
}
