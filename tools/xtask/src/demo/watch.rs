//! Two observers that look for a second running copy, neither of which believes what our own programs report.
//!
//! * The guest's counters, asked for over a TCP connection all the while: if two copies ran, answers would come from one that is behind, with time or
//!   counters that step back. A changed boot id is a reboot.
//! * The kernel's own accounting of time spent in guest mode, for each VMM process: once the copy on the target has run guest code, the copy
//!   on the source must never run any again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::guest::{Commands, Status};
use crate::fleet::layout::FleetName;
use crate::fleet::processes;

/// How many samples pass until new VMM processes are looked for: reading all of `/proc` costs more than a sample.
const SAMPLES_PER_SEARCH: u32 = 10;
/// How often both are looked at.
const PACE: Duration = Duration::from_millis(10);
/// Clocks of guest and client may differ by this share, in parts per thousand: the guest knows its TSC's frequency by a calibration.
const DRIFT_PERMILLE_MAX: u64 = 5;
/// Rounding of both clocks, in microseconds.
const CLOCK_GRAIN_US: u64 = 1000;
/// Guest time is counted in ticks; one may be booked late.
const TICKS_LATE_MAX: u64 = 1;

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    counters: JoinHandle<Result<()>>,
    copies: JoinHandle<Result<()>>,
}

/// What was seen.
#[derive(Debug)]
pub struct Seen {
    /// Why the guest's uptime is not what it should be.
    pub uptime_wrong: Option<String>,
    /// Why two copies must have run.
    pub two_copies: Option<String>,
}

impl Watch {
    /// Starts both observers.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(fleet: &FleetName, guest: Commands) -> Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let spawn = |name: &str, work: Box<dyn FnOnce() -> Result<()> + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(work).context("starting an observer")
        };
        let (flag, fleet) = (Arc::clone(&stop), fleet.clone());
        let copies = spawn("copies", Box::new(move || watch_copies(&fleet, &flag)))?;
        let flag = Arc::clone(&stop);
        let counters = spawn("counters", Box::new(move || watch_counters(guest, &flag)))?;
        Ok(Self { stop, counters, copies })
    }

    /// Ends both and says what they saw.
    pub fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let end = |thread: JoinHandle<Result<()>>| {
            let ended = thread.join().unwrap_or_else(|_| Err(anyhow!("an observer panicked")));
            ended.err().map(|error| format!("{error:#}"))
        };
        Seen { uptime_wrong: end(self.counters), two_copies: end(self.copies) }
    }
}

/// Asks the guest for its counters until told to stop; an error is what must not be.
fn watch_counters(mut guest: Commands, stop: &AtomicBool) -> Result<()> {
    let first = Answer::ask(&mut guest)?;
    let mut last = first.status.clone();
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(PACE);
        let now = Answer::ask(&mut guest)?;
        compare(&last, &now.status)?;
        now.agrees_with_our_clock(&first)?;
        last = now.status;
    }
    Ok(())
}

/// What the guest said, and between which moments it must have looked at its clock.
struct Answer {
    asked: Instant,
    answered: Instant,
    status: Status,
}

impl Answer {
    fn ask(guest: &mut Commands) -> Result<Self> {
        let asked = Instant::now();
        let status = guest.ask("status")?;
        Ok(Self { asked, answered: Instant::now(), status })
    }

    /// As much time must have passed in the guest as here, within what the answers' ways leave open.
    fn agrees_with_our_clock(&self, first: &Self) -> Result<()> {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let least = us(self.asked.saturating_duration_since(first.answered));
        let most = us(self.answered.saturating_duration_since(first.asked));
        let guests = self.status.uptime_us.saturating_sub(first.status.uptime_us);
        let drift = most * DRIFT_PERMILLE_MAX / 1000 + CLOCK_GRAIN_US;
        if guests + drift < least || guests > most + drift {
            bail!("{least} to {most} us passed here and {guests} us in the guest");
        }
        Ok(())
    }
}

fn compare(earlier: &Status, later: &Status) -> Result<()> {
    if earlier.boot_id != later.boot_id {
        bail!("the guest was booted anew: boot id {} became {}", earlier.boot_id, later.boot_id);
    }
    for (name, before, after) in [
        ("uptime_us", earlier.uptime_us, later.uptime_us),
        ("ticks", earlier.ticks, later.ticks),
        ("pages_written", earlier.pages_written, later.pages_written),
    ] {
        if after < before {
            bail!("the guest's {name} went back from {before} to {after}");
        }
    }
    Ok(())
}

/// Guest time of the processes that have run guest code, in the order in which they began to.
#[derive(Debug, Default)]
struct Copies {
    /// Process, and its guest time when its successor was first seen running (`None` for the newest).
    order: Vec<(i32, Option<u64>)>,
}

impl Copies {
    /// Takes in one sample of (process, guest time in ticks).
    fn sample(&mut self, ticks: &[(i32, u64)]) -> Result<()> {
        for &(pid, time) in ticks {
            let known = self.order.iter().any(|&(other, _)| other == pid);
            if !known && time > 0 {
                if let Some((before, end)) = self.order.last_mut() {
                    *end = ticks.iter().find(|(other, _)| other == before).map(|&(_, time)| time);
                }
                self.order.push((pid, None));
            }
        }
        for &(pid, time) in ticks {
            let end = self.order.iter().find(|(other, _)| *other == pid).and_then(|&(_, end)| end);
            if end.is_some_and(|end| time > end + TICKS_LATE_MAX) {
                bail!("process {pid} ran guest code after its successor had begun to: two copies ran");
            }
        }
        Ok(())
    }
}

fn watch_copies(fleet: &FleetName, stop: &AtomicBool) -> Result<()> {
    let mut copies = Copies::default();
    let mut vmms = Vec::new();
    for sample in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if sample % SAMPLES_PER_SEARCH == 0 {
            vmms = processes::of_fleet(fleet);
            vmms.retain(|process| process.program == processes::VMM_PROGRAM);
        }
        let ticks: Vec<_> = vmms.iter().filter_map(|vmm| Some((vmm.pid, guest_ticks(vmm.pid)?))).collect();
        copies.sample(&ticks)?;
        std::thread::sleep(PACE);
    }
    Ok(())
}

/// Time that all threads of a process spent in guest mode, in clock ticks (field 43 of `/proc/PID/stat`).
fn guest_ticks(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name may hold spaces and parentheses; what follows the last one does not.
    let (_, after_name) = text.rsplit_once(')')?;
    after_name.split_whitespace().nth(40)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(boot_id: &str, uptime_us: u64, pages_written: u64) -> Status {
        Status { boot_id: boot_id.to_owned(), uptime_us, ram_bytes: 0, ticks: uptime_us, pages_written }
    }

    #[test]
    fn a_clock_or_counter_that_steps_back_is_seen() {
        let before = status("a", 100, 7);
        assert!(compare(&before, &status("a", 100, 7)).is_ok());
        assert!(compare(&before, &status("a", 200, 8)).is_ok());
        for bad in [status("b", 200, 8), status("a", 99, 8), status("a", 200, 6)] {
            assert!(compare(&before, &bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn time_that_the_guest_lost_or_gained_is_seen() {
        let start = Instant::now();
        let answer = |asked_ms: u64, answered_ms: u64, uptime_us: u64| Answer {
            asked: start + Duration::from_millis(asked_ms),
            answered: start + Duration::from_millis(answered_ms),
            status: status("a", uptime_us, 0),
        };
        let first = answer(0, 10, 5_000_000);
        for right in
            [answer(1010, 1020, 6_010_000), answer(1010, 3000, 7_900_000), answer(1010, 3000, 6_000_000)]
        {
            right.agrees_with_our_clock(&first).unwrap();
        }
        for wrong in [answer(1010, 1020, 5_900_000), answer(1010, 1020, 6_100_000), answer(1010, 1020, 0)] {
            assert!(wrong.agrees_with_our_clock(&first).is_err());
        }
    }

    #[test]
    fn one_copy_after_the_other_is_right() {
        let mut copies = Copies::default();
        for sample in [
            &[(1, 5)][..],
            &[(1, 9)],
            &[(1, 12), (2, 0)],
            &[(1, 12), (2, 3)],
            &[(1, 13), (2, 9)],
            &[(2, 11), (3, 0)],
            &[(2, 11), (3, 2)],
        ] {
            copies.sample(sample).unwrap();
        }
    }

    #[test]
    fn a_source_that_runs_on_is_seen() {
        let mut copies = Copies::default();
        for sample in [&[(1, 5)][..], &[(1, 9), (2, 0)], &[(1, 12), (2, 3)]] {
            copies.sample(sample).unwrap();
        }
        assert!(copies.sample(&[(1, 15), (2, 5)]).is_err());
    }
}
