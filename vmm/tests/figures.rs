//! What the fixed costs of the VMM are: `cargo test --release -p vmm --test figures -- --ignored --nocapture`.
//!
//! Each figure is a distribution over [`ROUNDS`] rounds on the machine it runs on; compare only within one run. The run checks that
//! everything works and nothing else; limits are for the benchmarks, which know what else the machine does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Instant;

use common::elf::{self, COUNTER};
use common::have_kvm;
use common::host::{Parts, Vmm, spec};
use wire::vmm::{Reply, Request};

const ROUNDS: usize = 50;

/// A named distribution of microseconds.
struct Figure {
    name: &'static str,
    us: Vec<u64>,
}

impl Figure {
    fn new(name: &'static str) -> Self {
        Self { name, us: Vec::new() }
    }

    fn add_since(&mut self, begin: Instant) {
        self.us.push(u64::try_from(begin.elapsed().as_micros()).unwrap());
    }

    fn print(mut self) {
        self.us.sort_unstable();
        let at = |percent: usize| self.us[(self.us.len() - 1) * percent / 100];
        println!("{:44} p50 {:6} us  p90 {:6} us  max {:6} us", self.name, at(50), at(90), at(100));
    }
}

/// Resident memory of a process besides the memfds it shares, in KiB.
fn resident_kib(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut shared = false;
    let mut total = 0;
    for line in smaps.lines() {
        if line.split(' ').next().is_some_and(|first| first.contains('-')) {
            shared = line.contains("/memfd:");
        } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| !shared) {
            total += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    total
}

/// Spins until the guest has counted on; sleeping would be most of what is measured.
fn spin_until_counted(parts: &Parts, from: u32) {
    while parts.word(COUNTER) == from {
        std::hint::spin_loop();
    }
}

#[test]
#[ignore = "a measurement, not a test"]
fn fixed_costs() {
    if !have_kvm() {
        return;
    }
    let mut first_byte = Figure::new("spawn to first guest byte, 128 MiB");
    let mut resident = Figure::new("resident besides guest RAM (KiB, not us)");
    for _ in 0..ROUNDS {
        let parts = Parts::new(spec(1, 128 << 20));
        let begin = Instant::now();
        let vmm = Vmm::running(&parts, &elf::counter());
        while parts.console_from(0).is_empty() {
            std::hint::spin_loop();
        }
        first_byte.add_since(begin);
        resident.us.push(resident_kib(vmm.child.id()));
    }
    first_byte.print();
    resident.print();
    for vcpus in [1, 2] {
        moves(vcpus);
    }
}

fn moves(vcpus: u32) {
    println!("-- {vcpus} vCPUs, 1 GiB, dirty log on");
    let mut stop = Figure::new("pause: request to last vCPU stopped");
    let mut harvest = Figure::new("pause: harvest");
    let mut pause = Figure::new("pause: request to answer");
    let mut save = Figure::new("save: request to answer");
    let mut create = Figure::new("create: request to answer");
    let mut restore = Figure::new("restore: request to answer");
    let mut run = Figure::new("run: request to answer");
    let mut alive = Figure::new("run: request to first guest store");
    let mut whole = Figure::new("pause request to first guest store there");
    let mut state_bytes = 0;

    let mut parts = Parts::new(spec(vcpus, 1 << 30));
    let mut vmm = Vmm::running(&parts, &elf::counter());
    spin_until_counted(&parts, 0);
    for epoch in 0..ROUNDS {
        let there = parts.again();
        let mut target = Vmm::start();
        let begin = Instant::now();
        assert_eq!(target.create(&there), Reply::Done);
        create.add_since(begin);
        vmm.must(Request::DirtyLog { on: true });
        vmm.ask(Request::DirtySync);

        let paused = Instant::now();
        let Reply::Paused { stop_us, harvest_us, .. } = vmm.pause(true) else { unreachable!() };
        pause.add_since(paused);
        stop.us.push(stop_us);
        harvest.us.push(harvest_us);
        let begin = Instant::now();
        let state = vmm.save();
        save.add_since(begin);
        state_bytes = state.len();
        let count = parts.word(COUNTER);
        let begin = Instant::now();
        target.must(Request::Restore(state));
        restore.add_since(begin);
        let begin = Instant::now();
        target.run(u64::try_from(epoch).unwrap() + 2);
        run.add_since(begin);
        spin_until_counted(&there, count);
        alive.add_since(begin);
        whole.add_since(paused);
        (parts, vmm) = (there, target);
    }
    for figure in [stop, harvest, pause, save, create, restore, run, alive, whole] {
        figure.print();
    }
    println!("state archive: {state_bytes} bytes");
}
