//! The demo's observers against the real guest, in QEMU instead of our VMM: so a failure here is theirs or the guest's.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::echo::Echo;
use super::guest::{self, Commands, Done, ECHO_PORT, Gap, Populated, Status, Verified};
use super::watch::Watch;
use crate::fleet::layout::FleetName;
use crate::fleet::processes::Service;
use crate::fleet::{self, netns};
use crate::{command, repository, setup};

const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 19, 0, 2));
const MACHINE: &str =
    "microvm,acpi=off,x-option-roms=off,pic=off,pit=off,rtc=off,isa-serial=on,auto-kernel-cmdline=on";
const CMDLINE: &str = "mashine.ip4=198.19.0.2/16 mashine.gw4=198.19.255.254";

/// Taken down however the test ends.
struct Ground(FleetName);

impl Drop for Ground {
    fn drop(&mut self) {
        fleet::down(&self.0).expect("everything can be removed");
    }
}

fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    if command::locate("qemu-system-x86_64").is_none() {
        return Some("qemu-system-x86_64 is not installed");
    }
    if setup::kvm() != setup::Kvm::Usable {
        return Some("no /dev/kvm");
    }
    (!elf().is_file()).then_some("the test guest has not been built")
}

fn elf() -> PathBuf {
    repository::guest_target_dir().join("release/mashine-guest")
}

fn qemu(ground: &Ground) -> Service {
    let words = "-accel kvm -cpu host,-arch-capabilities -global virtio-mmio.force-legacy=false -m 128 -nodefaults \
                 -no-user-config -display none -netdev tap,id=n,ifname=tap0,script=no,downscript=no \
                 -device virtio-net-device,netdev=n -serial stdio";
    let mut arguments: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    let elf = elf().to_string_lossy().into_owned();
    for (option, value) in [("-M", MACHINE), ("-kernel", elf.as_str()), ("-append", CMDLINE)] {
        arguments.extend([option.to_owned(), value.to_owned()]);
    }
    let program = command::locate("qemu-system-x86_64").expect("looked for before");
    let log = ground.0.state_dir().join("qemu.log");
    Service { name: "qemu".to_owned(), namespace: ground.0.fabric_namespace(), program, arguments, log }
}

fn ip_in(namespace: &str, words: &str) {
    let mut ip = Command::new(command::locate("ip").expect("iproute2"));
    command::read(ip.args(["netns", "exec", namespace, "ip"]).args(words.split(' '))).expect(words);
}

fn read_log(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn the_observers_and_the_guest_understand_each_other() {
    if let Some(why) = missing() {
        println!("SKIPPED: {why}");
        return;
    }
    let ground = Ground(format!("tq{}", std::process::id()).parse().unwrap());
    std::fs::create_dir_all(ground.0.state_dir()).unwrap();
    netns::create(&ground.0, &[]).unwrap();
    let namespace = ground.0.fabric_namespace();
    ip_in(&namespace, "tuntap add tap0 mode tap vnet_hdr");
    ip_in(&namespace, "addr add 198.19.255.254/32 dev tap0");
    ip_in(&namespace, "link set tap0 up");
    ip_in(&namespace, "route add 198.19.0.2/32 dev tap0");
    let service = qemu(&ground);
    let mut child = service.start(&ground.0).unwrap();

    let mut commands = Commands::connect(&namespace, GUEST).unwrap_or_else(|error| {
        panic!("{error:#}\n{}", read_log(&service.log));
    });
    let populated: Populated = commands.ask("populate entropy=100").unwrap();
    assert!(populated.pages > 20_000, "{populated:?}");
    let _: Done = commands.ask("dirty rate=1000 pattern=rand").unwrap();
    let echo = Echo::start(guest::connect(&namespace, GUEST, ECHO_PORT).unwrap()).unwrap();
    let watch = Watch::start(&ground.0, Commands::connect(&namespace, GUEST).unwrap()).unwrap();

    let _: Gap = commands.ask("gap reset").unwrap();
    let begun = Instant::now();
    let after = echo.echo_after(begun + Duration::from_millis(500)).unwrap();
    assert!(echo.gap_us_max(begun, after).unwrap() >= 900);
    let gap: Gap = commands.ask("gap").unwrap();
    assert!(gap.gap_us_max > 0);

    let verified: Verified = commands.ask("verify").unwrap();
    assert!(verified.wrong == 0 && verified.sum_ok && verified.pages >= populated.pages, "{verified:?}");
    let _: Done = commands.ask("corrupt").unwrap();
    let verified: Verified = commands.ask("verify").unwrap();
    assert!(verified.wrong > 0, "a damaged page was not seen: {verified:?}");

    assert!(commands.ask::<Status>("no-such-command").is_err());
    let (verdict, seen) = (echo.finish(), watch.finish());
    assert!(verdict.broken.is_none() && verdict.echoes > 100, "{verdict:?}");
    assert!(seen.uptime_wrong.is_none() && seen.two_copies.is_none(), "{seen:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}
