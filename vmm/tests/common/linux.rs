//! A Linux guest with a shell on its serial port.

use std::fs::File;
use std::time::{Duration, Instant};

use wire::state::{StateArchive, VcpuState};
use wire::vmm::{GuestEnd, Reply, Request};

use super::host::{Parts, Vmm, file_of, spec};
use super::initramfs::{self, Kernel};

/// Longest that Linux may take for anything; under an emulated hypervisor its boot alone takes most of a minute.
const PATIENCE: Duration = Duration::from_secs(90);

/// Lines of the kernel's log that must not be there.
const BAD: [&str; 13] = [
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI Warning",
    "BUG:",
    "Oops",
    "soft lockup",
    "rcu_sched self-detected",
    "rcu_preempt self-detected",
    "clocksource: timekeeping watchdog",
    "clocksource watchdog",
    "cut here",
    "Spurious",
    "time jump",
];

/// The guest.
pub struct Linux {
    pub parts: Parts,
    pub vmm: Vmm,
    /// Absolute offset of console output that was looked at.
    seen: u64,
    epoch: u64,
}

impl Linux {
    /// Boots `kernel` and waits for its shell.
    pub fn boot(kernel: &Kernel, vcpus: u32, ram_bytes: u64, extra: &str) -> Self {
        let mut parts = Parts::new(spec(vcpus, ram_bytes));
        parts.spec.cpu.name = std::env::var("MASHINE_PROFILE").unwrap_or_else(|_| "host".to_owned());
        Self::boot_parts(kernel, parts, extra)
    }

    /// As [`Linux::boot`], with a spec of the caller's.
    pub fn boot_parts(kernel: &Kernel, parts: Parts, extra: &str) -> Self {
        Self::boot_with(kernel, parts, extra, None)
    }

    /// As [`Linux::boot_parts`], with a program as `/bin/test-program`.
    pub fn boot_with(kernel: &Kernel, parts: Parts, extra: &str, program: Option<&[u8]>) -> Self {
        let initrd = file_of(&initramfs::build_with(kernel, program).expect("a static busybox"));
        let mut vmm = Vmm::start();
        assert_eq!(vmm.create(&parts), Reply::Done);
        let image = File::open(&kernel.image).unwrap();
        let more = std::env::var("MASHINE_CMDLINE").unwrap_or_default();
        let cmdline = format!("console=ttyS0 panic=1 {extra} {more}");
        assert_eq!(vmm.boot_files(&image, &initrd, &cmdline), Reply::Done);
        vmm.run(1);
        let mut linux = Self { parts, vmm, seen: 0, epoch: 1 };
        linux.wait_for("READY");
        linux.sh("true");
        linux
    }

    /// Waits for `text` on the console; gives what came before it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let begin = Instant::now();
        loop {
            let new = String::from_utf8_lossy(&self.parts.console_from(self.seen)).replace('\r', "");
            if let Some(at) = new.find(text) {
                // Offsets count raw bytes: all that has come is taken.
                self.seen += u64::try_from(self.parts.console_from(self.seen).len()).unwrap();
                return new[..at].to_owned();
            }
            assert!(begin.elapsed() < PATIENCE, "no {text:?} in:\n{new}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a command and gives its output.
    pub fn sh(&mut self, command: &str) -> String {
        self.type_line(&format!("{command}; echo \"<\"\"$?>\""));
        let output = self.wait_for("<0>");
        output.trim().to_owned()
    }

    /// Types a line without waiting.
    pub fn type_line(&mut self, line: &str) {
        self.vmm.must(Request::SerialInput(format!("{line}\n").into_bytes()));
    }

    /// Lines of the kernel's log that tell of trouble.
    pub fn bad_lines(&mut self) -> Vec<String> {
        let log = self.sh("dmesg");
        let bad = |line: &&str| BAD.iter().any(|bad| line.contains(bad));
        let found: Vec<_> = log.lines().filter(bad).map(str::to_owned).collect();
        if !found.is_empty() {
            eprintln!("{log}");
        }
        found
    }

    /// How the guest ended, which it must do by itself.
    pub fn ended(&mut self) -> GuestEnd {
        let begin = Instant::now();
        loop {
            match self.vmm.ask(Request::Describe) {
                Reply::Description { ended: Some(end), .. } => return end,
                Reply::Description { .. } => {}
                other => panic!("{other:?}"),
            }
            if begin.elapsed() > PATIENCE {
                let console = self.parts.console_from(self.seen);
                let said = String::from_utf8_lossy(&console);
                panic!(
                    "the guest does not end; it is at {:x?} and said:\n{said}",
                    self.instruction_pointers()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where each vCPU is; with `nokaslr`, an address of the kernel's `System.map`.
    fn instruction_pointers(&mut self) -> Vec<u64> {
        const RIP: usize = 16 * 8;
        self.vmm.pause(true);
        let mut state = StateArchive::decode(&self.vmm.save()).unwrap();
        let regs = |id| state.take::<VcpuState>(id).unwrap().regs;
        let all: Vec<_> = (0..self.parts.spec.vcpus).map(regs).collect();
        all.iter().map(|regs| u64::from_le_bytes(regs[RIP..RIP + 8].try_into().unwrap())).collect()
    }

    /// Moves the guest to a fresh VMM on the same memory, as a local migration does.
    pub fn move_to_a_fresh_vmm(&mut self) {
        let there = self.parts.again();
        let mut target = Vmm::start();
        assert_eq!(target.create(&there), Reply::Done);
        self.vmm.pause(true);
        let state = self.vmm.save();
        // Offsets go on in the new ring, which has nothing from before.
        self.seen = self.parts.console_offset();
        target.must(Request::Restore(state));
        self.epoch += 1;
        target.run(self.epoch);
        self.parts = there;
        self.vmm = target;
    }
}
