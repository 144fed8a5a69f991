//! When to stop copying and switch over: a pure policy over what the rounds measured.
//!
//! The pause that would follow if the switch-over began now is predicted as fixed costs (stopping, saving, loading,
//! resuming) plus what is dirty divided by the goodput seen. Within the budget: switch over. Otherwise another round, as
//! long as rounds shrink the prediction. Once they no longer do, or there were too many, switch over at a moment about as
//! good as the best seen, unless that would break the hard cap: then rounds go on, and the migration says it is stalled.

use crate::units::PAGE_BYTES;

/// What a page costs on a lane besides its content, in bytes: its share of headers, and the transport's.
const PAGE_OVERHEAD_BYTES: u64 = 96;
/// Goodput assumed before anything was measured, in bytes per second: slow, so that a first guess never hurries.
const GOODPUT_UNKNOWN: u64 = 100 << 20;
/// Rounds shorter than this, in bytes, say little about goodput: the transport's buffers swallow them whole.
const TELLING_BYTES: u64 = 4 << 20;

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Pause to aim for, in microseconds.
    pub downtime_budget_us: u64,
    /// Pause besides the last pages: stop, save, load, resume and two one-way trips, in microseconds.
    pub fixed_us: u64,
    /// Rounds after which copying on is no use.
    pub rounds_max: u32,
    /// Rounds in a row that fail to better the best prediction by a tenth, after which copying on is no use.
    pub stall_rounds: u32,
    /// A pause longer than this, in microseconds, is not taken even when nothing gets better; `None`: any is.
    pub hard_cap_us: Option<u64>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime_budget_us: 10_000,
            fixed_us: 1_500,
            rounds_max: 30,
            stall_rounds: 3,
            hard_cap_us: None,
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    NextRound,
    /// Pause now.
    Switchover,
    /// Another round, but nothing gets better and the hard cap forbids the pause: the operator should slow the guest, raise the
    /// cap or cancel.
    Stalled,
}

/// Rounds that may be taken to shorten a pause that is within the budget already.
const POLISH_ROUNDS_MAX: u32 = 3;

/// What is expected, as of the last [`Convergence::decide`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forecast {
    /// The pause if it began now, in microseconds.
    pub downtime_us: u64,
    /// Until the switch-over, in microseconds; 0 when it is due or cannot be told.
    pub eta_us: u64,
    /// Pages dirtied per second.
    pub dirty_pages_per_s: u64,
    /// Goodput, in bytes per second.
    pub bytes_per_s: u64,
}

/// The policy and what it has seen.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    /// Bytes and microseconds of the telling rounds, older ones halved with each new one.
    bytes: u64,
    us: u64,
    last_round_us: u64,
    decided_round: u32,
    rounds: u32,
    best_us: u64,
    rounds_since_best: u32,
    /// Rounds taken although the budget was met.
    polished: u32,
    forecast: Forecast,
}

impl Convergence {
    /// Nothing seen yet.
    pub const fn new(policy: Policy) -> Self {
        Self {
            policy,
            bytes: 0,
            us: 0,
            last_round_us: 0,
            decided_round: 0,
            rounds: 0,
            best_us: u64::MAX,
            rounds_since_best: 0,
            polished: 0,
            forecast: Forecast { downtime_us: 0, eta_us: 0, dirty_pages_per_s: 0, bytes_per_s: 0 },
        }
    }

    /// A round put `bytes` on the lanes in `us` microseconds.
    pub fn round_sent(&mut self, bytes: u64, us: u64) {
        self.last_round_us = us.max(1);
        if self.us == 0 || bytes >= TELLING_BYTES {
            self.bytes = (self.bytes / 2).saturating_add(bytes);
            self.us = (self.us / 2).saturating_add(us.max(1));
        }
    }

    /// After `round`, `dirty_pages` are to be sent: what now? Asked twice for one round (after a wait for the lanes to run
    /// empty), it answers anew but counts the round once.
    pub fn decide(&mut self, round: u32, dirty_pages: u64) -> Decision {
        self.forecast = self.predict(dirty_pages);
        let predicted = self.forecast.downtime_us;
        if round > self.decided_round {
            self.decided_round = round;
            self.rounds = self.rounds.saturating_add(1);
            self.rounds_since_best = self.rounds_since_best.saturating_add(1);
        }
        if predicted < self.best_us.saturating_sub(self.best_us / 10) {
            self.rounds_since_best = 0;
        }
        let much_better = predicted < self.best_us.saturating_sub(self.best_us / 4);
        self.best_us = self.best_us.min(predicted);
        if predicted <= self.policy.downtime_budget_us {
            // Within the budget. A round costs a few milliseconds in which the guest runs; while each one still takes a good part off a pause
            // that is mostly copying, it is worth them.
            let copying_us = predicted.saturating_sub(self.policy.fixed_us);
            let may = self.polished < POLISH_ROUNDS_MAX && self.rounds < self.policy.rounds_max;
            let polish = may && much_better && copying_us > self.policy.fixed_us / 2;
            self.polished = self.polished.saturating_add(u32::from(polish));
            return if polish { Decision::NextRound } else { Decision::Switchover };
        }
        let spent = self.rounds >= self.policy.rounds_max;
        if !spent && self.rounds_since_best < self.policy.stall_rounds {
            return Decision::NextRound;
        }
        if self.policy.hard_cap_us.is_some_and(|cap| predicted > cap) {
            return Decision::Stalled;
        }
        // A moment about as good as the best seen; but wait for it no longer than it took to find out.
        let good = predicted <= self.best_us.saturating_add(self.best_us / 4);
        let waited = self.rounds_since_best >= self.policy.stall_rounds.saturating_mul(2);
        if good || waited || spent { Decision::Switchover } else { Decision::NextRound }
    }

    /// What the last decision was based on.
    pub const fn forecast(&self) -> Forecast {
        self.forecast
    }

    fn predict(&self, dirty_pages: u64) -> Forecast {
        let bytes_per_s = match self.us {
            0 => GOODPUT_UNKNOWN,
            us => ratio(self.bytes, 1_000_000, us).max(1),
        };
        let copy_us =
            ratio(dirty_pages.saturating_mul(PAGE_BYTES + PAGE_OVERHEAD_BYTES), 1_000_000, bytes_per_s);
        let downtime_us = self.policy.fixed_us.saturating_add(copy_us);
        let dirty_pages_per_s = ratio(dirty_pages, 1_000_000, self.last_round_us.max(1));
        // Each round leaves the share `dirtied / sent` of the one before: a geometric series until the budget is met.
        let dirtied_per_s = dirty_pages_per_s.saturating_mul(PAGE_BYTES);
        let eta_us = if downtime_us <= self.policy.downtime_budget_us || dirtied_per_s >= bytes_per_s {
            0
        } else {
            ratio(copy_us, bytes_per_s, bytes_per_s - dirtied_per_s)
        };
        Forecast { downtime_us, eta_us, dirty_pages_per_s, bytes_per_s }
    }
}

/// `a * b / c` without overflow, saturating; `c` is not 0.
fn ratio(a: u64, b: u64, c: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b) / u128::from(c.max(1));
    u64::try_from(wide).unwrap_or(u64::MAX)
}
