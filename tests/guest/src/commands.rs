//! Carries out the commands of the TCP port. README.md says what each does and answers.

use crate::machine::{End, Machine};
use crate::memory::orders::{Load, Tally, Task};
use crate::services::Reply;
use crate::virtio::blk::{Blk, BlkTally, BlkTask};
use crate::{cpu, trap};
use core::fmt::Write as _;
use guest_core::command::{Command, Damage};
use guest_core::gap::THRESHOLD_NAMES;
use guest_core::text::{OrNull, Quoted};

/// What a command comes to.
#[expect(clippy::large_enum_variant, reason = "there is no heap to box it on")]
pub enum Outcome {
    /// A reply at once.
    Reply(Reply),
    /// The reply comes when the task is done.
    Wait,
}

impl Outcome {
    /// A refusal.
    #[must_use]
    pub fn error(text: &str) -> Self {
        Self::Reply(Reply::from_args(format_args!(r#"{{"ok":false,"error":{}}}"#, Quoted(text))))
    }

    fn ok() -> Self {
        Self::Reply(Reply::from_args(format_args!(r#"{{"ok":true}}"#)))
    }
}

/// Carries out a line.
pub fn execute(line: &str, machine: &mut Machine) -> Outcome {
    let command = match Command::parse(line) {
        Ok(command) => command,
        Err(error) => return Outcome::error(error),
    };
    match command {
        Command::Ping => {
            let uptime = machine.clock.uptime_us();
            Outcome::Reply(Reply::from_args(format_args!(
                r#"{{"ok":true,"pong":true,"uptime_us":{uptime}}}"#
            )))
        }
        Command::Status => Outcome::Reply(status(machine)),
        Command::Dirty { rate, ws, entropy, pattern } => {
            let old = machine.load;
            machine.set_load(Load {
                rate: rate.unwrap_or(old.rate),
                ws: ws.unwrap_or(old.ws),
                entropy: entropy.unwrap_or(old.entropy),
                pattern: pattern.unwrap_or(old.pattern),
            });
            Outcome::Reply(load(machine.load))
        }
        Command::Populate { entropy } => {
            let entropy = entropy.unwrap_or(machine.load.entropy);
            start(machine, Task::Populate { entropy })
        }
        Command::Verify => start(machine, Task::Verify),
        Command::Corrupt { page, damage } => corrupt(machine, page, damage),
        Command::Gap => Outcome::Reply(gap(machine)),
        Command::GapReset => {
            let reply = gap(machine);
            machine.reset_gaps();
            Outcome::Reply(reply)
        }
        Command::State => Outcome::Reply(state(machine)),
        Command::Mode(mode) => {
            machine.mode = mode;
            let mode = mode.name();
            Outcome::Reply(Reply::from_args(format_args!(r#"{{"ok":true,"mode":"{mode}"}}"#)))
        }
        Command::BlkFill { blocks } => start_blk(machine, BlkTask::Fill, blocks),
        Command::BlkFlush => start_blk(machine, BlkTask::Flush, None),
        Command::BlkVerify => start_blk(machine, BlkTask::Verify, None),
        Command::BlkDirty { rate, ws } => blk_dirty(machine, rate, ws.unwrap_or(0)),
        Command::Shutdown => {
            machine.end_soon(End::Off);
            Outcome::ok()
        }
        Command::Panic => {
            machine.end_soon(End::Panic);
            Outcome::ok()
        }
    }
}

/// The reply to a task that is done.
#[must_use]
pub fn task_reply(task: Task, tally: &Tally, us: u64) -> Reply {
    let Tally { pages, unwritten, wrong: [stale, foreign, corrupt], first_wrong, sum_wrong } = *tally;
    match task {
        Task::Populate { .. } => Reply::from_args(format_args!(r#"{{"ok":true,"pages":{pages},"us":{us}}}"#)),
        Task::Verify => Reply::from_args(format_args!(
            r#"{{"ok":true,"pages":{pages},"unwritten":{unwritten},"wrong":{wrong},"first_wrong":{first},"stale":{stale},"foreign":{foreign},"corrupt":{corrupt},"sum_ok":{sum_ok},"us":{us}}}"#,
            wrong = stale + foreign + corrupt,
            first = OrNull(first_wrong),
            sum_ok = !sum_wrong,
        )),
    }
}

/// The reply to a disk task that is done.
#[must_use]
pub fn blk_reply(tally: &BlkTally, us: u64) -> Reply {
    let BlkTally { blocks, unwritten, wrong, first_wrong, errors } = *tally;
    let first = OrNull(first_wrong);
    Reply::from_args(format_args!(
        r#"{{"ok":true,"blocks":{blocks},"unwritten":{unwritten},"wrong":{wrong},"first_wrong":{first},"errors":{errors},"us":{us}}}"#
    ))
}

fn start(machine: &mut Machine, task: Task) -> Outcome {
    if machine.start(task) { Outcome::Wait } else { Outcome::error("busy") }
}

fn start_blk(machine: &mut Machine, task: BlkTask, blocks: Option<u64>) -> Outcome {
    match machine.start_blk(task, blocks) {
        Ok(()) => Outcome::Wait,
        Err(error) => Outcome::error(error),
    }
}

fn blk_dirty(machine: &mut Machine, rate: u64, ws: u64) -> Outcome {
    let Some(blk) = &mut machine.blk else { return Outcome::error("no block device") };
    blk.set_load(rate, ws, cpu::tsc());
    Outcome::Reply(Reply::from_args(format_args!(r#"{{"ok":true,"rate":{rate},"ws":{ws}}}"#)))
}

fn load(load: Load) -> Reply {
    let Load { rate, ws, entropy, pattern } = load;
    let pattern = pattern.name();
    Reply::from_args(format_args!(
        r#"{{"ok":true,"rate":{rate},"ws":{ws},"entropy":{entropy},"pattern":"{pattern}"}}"#
    ))
}

fn corrupt(machine: &Machine, page: Option<u64>, damage: Damage) -> Outcome {
    let page = page.unwrap_or(machine.managed.pages() / 2);
    match machine.managed.damage(page, damage) {
        Ok(()) => {
            let kind = damage.name();
            Outcome::Reply(Reply::from_args(format_args!(r#"{{"ok":true,"page":{page},"kind":"{kind}"}}"#)))
        }
        Err(error) => Outcome::error(error),
    }
}

fn gap(machine: &Machine) -> Reply {
    let (gaps, clock) = (&machine.gaps, &machine.clock);
    let mut reply = Reply::from_args(format_args!(
        r#"{{"ok":true,"gap_us_max":{},"at_uptime_us":{},"since_us":{},"iterations":{},"gap_us_max_aps":{},"above":{{"#,
        clock.us(gaps.max),
        clock.us(gaps.max_at.saturating_sub(clock.boot)),
        clock.us(cpu::tsc().saturating_sub(gaps.since)),
        gaps.iterations,
        machine.gap_max_others_us(),
    ));
    for (i, (name, count)) in THRESHOLD_NAMES.iter().zip(&gaps.above).enumerate() {
        let comma = if i == 0 { "" } else { "," };
        // A Text never fails.
        let _ = write!(reply, r#"{comma}"{name}":{count}"#);
    }
    let _ = reply.write_str("}}");
    reply
}

fn state(machine: &Machine) -> Reply {
    let found = machine.observer.compare();
    let first = found.first_wrong.map(Quoted);
    Reply::from_args(format_args!(
        r#"{{"ok":true,"checked":{},"wrong":{},"first_wrong":{},"vector_errors":{},"clock_backwards":{},"wall_us":{}}}"#,
        found.checked,
        found.wrong,
        OrNull(first),
        machine.vector_errors,
        machine.clock_backwards,
        OrNull(machine.wall_us()),
    ))
}

fn status(machine: &Machine) -> Reply {
    let Load { rate, ws, entropy, pattern } = machine.load;
    let job = match machine.task {
        None if machine.blk_task.is_some() => "blk",
        None => "none",
        Some((_, Task::Populate { .. }, _)) => "populate",
        Some((_, Task::Verify, _)) => "verify",
    };
    let (net_rx, net_tx) = machine.net_frames;
    let clock = &machine.clock;
    let mut reply = Reply::new();
    // A Text never fails; the longest reply fits.
    let _ = write!(
        reply,
        r#"{{"ok":true,"id":{},"boot_id":"{:016x}","boot_us":{},"uptime_us":{},"vcpus":{},"ram_bytes":{},"pages":{},"#,
        Quoted(machine.config.id.as_str()),
        machine.boot_id,
        machine.boot_us,
        clock.uptime_us(),
        machine.vcpus,
        machine.ram_bytes,
        machine.managed.pages(),
    );
    let _ = write!(
        reply,
        r#""tsc_hz":{},"tsc_source":"{}","kvmclock_ns":{},"clock_backwards":{},"ticks":{},"loops":{},"mode":"{}","#,
        clock.hz,
        clock.source,
        OrNull(machine.kvmclock_ns(cpu::tsc())),
        machine.clock_backwards,
        trap::count(trap::TIMER),
        machine.loops,
        machine.mode.name(),
    );
    let _ = write!(
        reply,
        r#""dirty_rate":{rate},"ws":{ws},"entropy":{entropy},"pattern":"{}","pages_written":{},"populated":{},"job":"{job}","#,
        pattern.name(),
        machine.pages_written(),
        machine.populated,
    );
    let _ = write!(
        reply,
        r#""gap_us_max":{},"net_rx":{net_rx},"net_tx":{net_tx},"rng_ok":{},"blk_ok":{},"blk_blocks":{},"blk_written":{},"blk_errors":{}}}"#,
        clock.us(machine.gap_max),
        machine.rng_ok,
        machine.blk.is_some(),
        machine.blk.as_ref().map_or(0, Blk::blocks),
        machine.blk.as_ref().map_or(0, |blk| blk.written),
        machine.blk.as_ref().map_or(0, |blk| blk.errors),
    );
    reply
}
