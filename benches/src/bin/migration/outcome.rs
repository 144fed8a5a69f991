//! What was measured, and the table of it.

use std::fmt::Write;

use benches::cpu::{self, HostTicks};
use benches::place::Place;
use benches::spread::Spread;
use serde::{Deserialize, Serialize};

use super::yardstick::Yardstick;

const GIB: f64 = (1_u64 << 30) as f64;

/// Where the time of a migration went, as the source reports it.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Timings {
    pub total_ms: u64,
    pub rounds: u64,
    pub sent_bytes: u64,
    pub pages_sent: u64,
    pub pages_zero: u64,
    pub pause_us: u64,
    pub stop_us: u64,
    pub harvest_us: u64,
    pub final_copy_us: u64,
    pub save_us: u64,
    pub restore_us: u64,
    pub resume_us: u64,
    pub final_pages: u64,
    pub packets_held: u64,
}

/// CPU seconds of one migration.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cpu {
    pub source_daemon: f64,
    pub source_vmm: f64,
    pub target_daemon: f64,
    pub target_vmm: f64,
}

impl Cpu {
    /// Between two readings of each host, earlier first.
    pub fn between(source: (&HostTicks, &HostTicks), target: (&HostTicks, &HostTicks)) -> Self {
        let daemon = |(from, to): (&HostTicks, &HostTicks)| to.daemon_ticks.saturating_sub(from.daemon_ticks);
        let vmm = |(from, to): (&HostTicks, &HostTicks)| to.vmm_ticks.saturating_sub(from.vmm_ticks);
        Self {
            source_daemon: cpu::seconds(daemon(source)),
            source_vmm: cpu::seconds(vmm(source)),
            target_daemon: cpu::seconds(daemon(target)),
            target_vmm: cpu::seconds(vmm(target)),
        }
    }
}

/// One migration.
#[derive(Debug, Clone, Serialize)]
pub struct One {
    /// From the request to the answer that it succeeded, at the client of the API.
    pub wall_ms: f64,
    pub gap_guest_us: u64,
    pub gap_client_us: u64,
    /// Absent if the first pass ended between two states that the API showed.
    pub first_pass_bytes_per_s: Option<u64>,
    pub cpu: Cpu,
    pub timings: Timings,
}

/// Migrations at one rate.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    pub dirty_pages_per_s: u64,
    /// Segments that the echo client had to send again, warm-up included.
    pub packets_lost: u32,
    /// Share of a core that the VMM uses while nothing moves, guest mode left out.
    pub vmm_at_rest: f64,
    pub yardsticks: Vec<Yardstick>,
    pub migrations: Vec<One>,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub place: Place,
    pub load_after: f64,
    pub ram_bytes: u64,
    pub vcpus: u32,
    pub migrations: u32,
    pub series: Vec<Series>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("{}, {:.1} at the end\n", self.place.line(), self.load_after);
        for series in &self.series {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "\n{} MiB, {} vCPU, {} pages/s dirtied, {} migrations, {} packets lost",
                self.ram_bytes >> 20,
                self.vcpus,
                series.dirty_pages_per_s,
                series.migrations.len(),
                series.packets_lost
            );
            series.spreads(&mut text);
            series.costs(&mut text);
        }
        text
    }
}

impl Series {
    fn spread(&self, figure: impl Fn(&One) -> f64) -> Option<Spread> {
        Spread::of(self.migrations.iter().map(figure))
    }

    fn spreads(&self, text: &mut String) {
        let _ = writeln!(text, "{}", Spread::head(""));
        let mut row = |name: &str, digits: usize, figure: &dyn Fn(&One) -> f64| {
            if let Some(spread) = self.spread(figure) {
                let _ = writeln!(text, "{}", spread.row(name, digits));
            }
        };
        let ms = |us: u64| us as f64 / 1000.0;
        row("total ms", 0, &|one| one.timings.total_ms as f64);
        row("asked to answered ms", 0, &|one| one.wall_ms);
        row("gap, guest ms", 2, &|one| ms(one.gap_guest_us));
        row("gap, client ms", 2, &|one| ms(one.gap_client_us));
        row("pause ms", 2, &|one| ms(one.timings.pause_us));
        row("  stop", 2, &|one| ms(one.timings.stop_us));
        row("  harvest", 2, &|one| ms(one.timings.harvest_us));
        row("  final copy", 2, &|one| ms(one.timings.final_copy_us));
        row("  save (beside copy)", 2, &|one| ms(one.timings.save_us));
        row("  restore", 2, &|one| ms(one.timings.restore_us));
        row("  resume", 2, &|one| ms(one.timings.resume_us));
        row("final pages", 0, &|one| one.timings.final_pages as f64);
        row("rounds", 0, &|one| one.timings.rounds as f64);
        row("MiB sent", 0, &|one| one.timings.sent_bytes as f64 / 1_048_576.0);
        row("packets held", 0, &|one| one.timings.packets_held as f64);
    }

    fn costs(&self, text: &mut String) {
        let sent_gib: f64 = self.migrations.iter().map(|one| one.timings.sent_bytes as f64 / GIB).sum();
        let per_gib = |part: fn(&Cpu) -> f64| {
            self.migrations.iter().map(|one| part(&one.cpu)).sum::<f64>() / sent_gib.max(f64::MIN_POSITIVE)
        };
        let _ = writeln!(
            text,
            "CPU s per GiB sent: source {:.2} (daemon) + {:.2} (VMM), target {:.2} + {:.2}; VMM at rest {:.2} of a core",
            per_gib(|cpu| cpu.source_daemon),
            per_gib(|cpu| cpu.source_vmm),
            per_gib(|cpu| cpu.target_daemon),
            per_gib(|cpu| cpu.target_vmm),
            self.vmm_at_rest
        );
        let of_yardsticks = |figure: fn(&Yardstick) -> f64| Spread::of(self.yardsticks.iter().map(figure));
        let goodputs = self.migrations.iter().filter_map(|one| one.first_pass_bytes_per_s);
        let first = Spread::of(goodputs.map(|bytes| bytes as f64 / GIB));
        let (tcp, copy) = (of_yardsticks(|y| y.tcp_gib_per_s), of_yardsticks(|y| y.memcpy_gib_per_s));
        if let (Some(first), Some(tcp), Some(copy)) = (first, tcp, copy) {
            let _ = writeln!(
                text,
                "first pass {:.2} GiB/s (median of {}): {:.2} of plain TCP between the same hosts ({:.2} GiB/s), {:.3} of memcpy ({:.2} GiB/s)",
                first.p50,
                first.samples,
                first.p50 / tcp.mean,
                tcp.mean,
                first.p50 / copy.mean,
                copy.mean
            );
        }
        let cpu =
            (of_yardsticks(|y| y.tcp_sender_cpu_s_per_gib), of_yardsticks(|y| y.tcp_receiver_cpu_s_per_gib));
        if let (Some(sender), Some(receiver)) = cpu {
            let _ = writeln!(
                text,
                "plain TCP CPU s per GiB: source {:.2}, target {:.2}",
                sender.mean, receiver.mean
            );
        }
    }
}
