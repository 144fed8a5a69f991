//! The command line of a lab host's QEMU: pure.
//!
//! The processor is emulated, with AMD-V and nested paging, so that the host's own `/dev/kvm` is complete. The kernel is told the
//! frequency of its TSC and that it can rely on it: else it reads an emulated HPET instead, for itself and for its machines, whose clocks
//! then disagree with their TSC.
//!
//! No machine runs on a host's first processor. Whenever any processor restores its FPU, QEMU (7.2 and 10.0 at least) clears the first
//! one's IGNNE# flag, with a plain read and write of a word that also says whether that processor is within a guest and takes
//! interrupts. An entry to a guest, or an exit, in between is undone in part: after 1 to 14 minutes a machine reset itself, or its host's kernel
//! was interrupted while the guest's segments were loaded.
//!
//! Addresses of programs are not randomised, on hosts and in their machines ([`PLAIN_ADDRESSES`]): QEMU 7.2 translates code anew for each address at
//! which it is mapped, so that each process adds a translation of the C library. The pages of a machine that had left carried tens of thousands of
//! them, and each write to such a page walks them all: a host that took the machine back stood still for minutes while its kernel
//! cleared them, byte by byte, for which the processor has no `erms` either.
//!
//! The processor has no CMPXCHG16B: QEMU 7.2 takes the flags that it leaves alone from a computation that is out of date. Kernels from 6.12 on branch
//! right after it, and one that was interrupted there came back with flags such as VM86 set: a double fault, mostly within seconds of its boot.

use std::path::{Path, PathBuf};

use super::kernel::Kernel;
use super::layout;
use crate::fleet::layout::{
    FABRIC_IP4, FABRIC_IP6, FABRIC_MTU, FleetName, Host, MACHINES_IP4, MACHINES_IP6, UPLINK,
};

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// Processors of a host.
const CPUS: u32 = 3;
/// Those on which machines run, and `mashined`, from which they inherit it: all but the first.
pub(super) const FOR_MACHINES: &str = "1-2";
/// Argument of Linux, for hosts and machines.
pub const PLAIN_ADDRESSES: &str = "norandmaps";
/// Memory for translated code, in MiB; it grows to this only with use.
const TRANSLATED_MIB: u32 = 1024;

/// What all hosts have in common.
#[derive(Debug, Clone)]
pub(super) struct Common {
    pub(super) kernel: Kernel,
    pub(super) initramfs: PathBuf,
    /// Directory of our programs.
    pub(super) programs: PathBuf,
    /// The ssh server.
    pub(super) dropbear: PathBuf,
    pub(super) ram_mib: u64,
    /// Frequency of the processors' TSC, the same for all hosts.
    pub(super) tsc_khz: u64,
}

/// Arguments for a host.
pub(super) fn arguments(lab: &FleetName, host: &Host, common: &Common) -> Vec<String> {
    let share = |path: &Path, tag: &str, more: &str| {
        let path = comma_free(path);
        format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{more}")
    };
    let pairs = [
        ("-M", "q35".to_owned()),
        ("-accel", format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}")),
        ("-cpu", "max,+svm,+npt,-la57,-erms,-cx16".to_owned()),
        ("-smp", CPUS.to_string()),
        ("-m", common.ram_mib.to_string()),
        ("-display", "none".to_owned()),
        // The console is QEMU's output, and so its log.
        ("-serial", "stdio".to_owned()),
        ("-kernel", common.kernel.image.display().to_string()),
        ("-initrd", common.initramfs.display().to_string()),
        ("-append", kernel_command_line(lab, host, common)),
        ("-virtfs", share(Path::new("/"), "hostroot", ",readonly=on")),
        ("-virtfs", share(&lab.state_dir(), "labstate", "")),
        ("-netdev", format!("tap,id=uplink,ifname={},script=no,downscript=no", host.fabric_port())),
        (
            "-device",
            format!("virtio-net-pci,netdev=uplink,mac={},host_mtu={FABRIC_MTU},romfile=", layout::mac(host)),
        ),
        // What a host has written survives its end, as it does on real power loss only when flushed: the file's pages are this machine's.
        (
            "-drive",
            format!(
                "file={},if=virtio,format=raw,cache=unsafe,discard=unmap",
                comma_free(&layout::disk(host))
            ),
        ),
    ];
    let flags = ["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned);
    flags
        .into_iter()
        .chain(pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]))
        .collect()
}

fn kernel_command_line(lab: &FleetName, host: &Host, common: &Common) -> String {
    let settings = [
        ("lab_host", host.name()),
        ("lab_state", lab.state_dir().display().to_string()),
        ("lab_programs", common.programs.display().to_string()),
        ("lab_modules", common.kernel.modules.display().to_string()),
        ("lab_dropbear", common.dropbear.display().to_string()),
        ("lab_uplink", UPLINK.to_owned()),
        ("lab_mtu", FABRIC_MTU.to_string()),
        ("lab_ip4", host.ip4().to_string()),
        ("lab_ip6", host.ip6().to_string()),
        ("lab_fabric4", FABRIC_IP4.to_string()),
        ("lab_fabric6", FABRIC_IP6.to_string()),
        ("lab_machines4", MACHINES_IP4.to_owned()),
        ("lab_machines6", MACHINES_IP6.to_owned()),
    ];
    let settings = settings.map(|(name, value)| format!(" {name}={value}")).concat();
    // Mitigations guard against other processors' speculation; this one has none, and they cost time.
    let tsc = common.tsc_khz;
    format!(
        "console=ttyS0 rdinit=/init panic=-1 mitigations=off tsc=reliable tsc_early_khz={tsc} {PLAIN_ADDRESSES}{settings}"
    )
}

/// A path as the value of an option, where a comma would end it.
fn comma_free(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn for_host_b() -> Vec<String> {
        let common = Common {
            kernel: Kernel {
                release: "6.1.0-56-amd64".to_owned(),
                image: "/k/vmlinuz".into(),
                modules: "/k/lib/modules".into(),
            },
            initramfs: "/k/initramfs".into(),
            programs: "/w/target/release".into(),
            dropbear: "/usr/sbin/dropbear".into(),
            ram_mib: 3072,
            tsc_khz: 2_300_000,
        };
        arguments(&layout::name().unwrap(), &Host::first(2).unwrap()[1], &common)
    }

    #[test]
    fn the_processor_is_emulated_with_complete_virtualisation() {
        let line = for_host_b().join(" ");
        assert!(
            line.contains(
                "-accel tcg,thread=multi,tb-size=1024 -cpu max,+svm,+npt,-la57,-erms,-cx16 -smp 3 -m 3072"
            ),
            "{line}"
        );
        assert!(!line.contains("kvm,") && !line.contains("accel kvm"), "{line}");
    }

    #[test]
    fn a_host_cannot_write_to_the_machine_but_to_the_labs_directory() {
        let arguments = for_host_b();
        let shares: Vec<_> =
            arguments.iter().filter(|argument| argument.starts_with("local,path=")).collect();
        assert_eq!(shares.len(), 2);
        assert!(shares[0].starts_with("local,path=/,") && shares[0].ends_with("readonly=on"), "{shares:?}");
        assert!(shares[1].starts_with("local,path=/run/mashines/lab,"), "{shares:?}");
    }

    #[test]
    fn the_kernel_is_told_who_it_is_and_to_trust_its_clock() {
        let arguments = for_host_b();
        let place = arguments.iter().position(|argument| argument == "-append").unwrap();
        let line = &arguments[place + 1];
        for part in ["lab_host=host-b", "lab_ip4=198.18.0.11", "lab_ip6=2001:db8:0:f::11", "tsc=reliable"] {
            assert!(line.split(' ').any(|word| word == part), "{part} in {line}");
        }
        assert!(!line.contains("timer_check"), "{line}");
        // Longer ones are cut off by the kernel, at 2,048 bytes.
        assert!(line.len() < 1024, "{line}");
    }

    #[test]
    fn commas_in_paths_do_not_end_options() {
        assert_eq!(comma_free(Path::new("/a,b")), "/a,,b");
    }
}
