//! Spreads writes evenly over time: a token bucket in ticks of the TSC.
//!
//! After a pause of the machine the bucket holds at most [`CATCH_UP_MS`] worth of writes, so a guest that wakes up
//! on another host catches up a short pause exactly and does not answer a long one with a burst.

/// How much time's worth of writes may be made up for.
const CATCH_UP_MS: u64 = 50;

/// A budget of writes that grows with time.
#[derive(Debug, Clone)]
pub struct Budget {
    ticks_per_s: u64,
    rate: u64,
    /// Writes owed, times `ticks_per_s`.
    owed: u128,
    then: u64,
}

impl Budget {
    /// An empty budget of rate 0 for a clock of `ticks_per_s`.
    #[must_use]
    pub fn new(ticks_per_s: u64) -> Self {
        Self { ticks_per_s: ticks_per_s.max(1), rate: 0, owed: 0, then: 0 }
    }

    /// Sets the rate in writes a second. A changed rate starts with an empty budget.
    pub fn set_rate(&mut self, rate: u64, now: u64) {
        if rate != self.rate {
            (self.rate, self.owed, self.then) = (rate, 0, now);
        }
    }

    /// The number of writes that are due at `now`.
    pub fn due(&mut self, now: u64) -> u64 {
        let elapsed = now.saturating_sub(self.then);
        self.then = self.then.max(now);
        let cap = u128::from(self.rate) * u128::from(self.ticks_per_s) * u128::from(CATCH_UP_MS) / 1000;
        // At least one write must fit, however low the rate.
        let cap = cap.max(u128::from(self.ticks_per_s));
        self.owed = (self.owed + u128::from(elapsed) * u128::from(self.rate)).min(cap);
        u64::try_from(self.owed / u128::from(self.ticks_per_s)).unwrap_or(u64::MAX)
    }

    /// Takes `writes` out of the budget, at most what was due.
    pub fn spend(&mut self, writes: u64) {
        self.owed = self.owed.saturating_sub(u128::from(writes) * u128::from(self.ticks_per_s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_its_rate_exactly() {
        let mut budget = Budget::new(1_000_000);
        budget.set_rate(20_000, 0);
        let mut written = 0;
        for now in (0..=1_000_000).step_by(173) {
            let due = budget.due(now).min(7);
            budget.spend(due);
            written += due;
        }
        assert!((19_990..=20_000).contains(&written), "{written}");
    }

    #[test]
    fn catches_up_a_bounded_time() {
        let mut budget = Budget::new(1_000_000);
        budget.set_rate(20_000, 0);
        assert_eq!(budget.due(10_000_000), 1000);
    }

    #[test]
    fn low_rates_still_write() {
        let mut budget = Budget::new(1000);
        budget.set_rate(1, 0);
        assert_eq!(budget.due(999), 0);
        assert_eq!(budget.due(1000), 1);
    }

    #[test]
    fn a_clock_that_steps_back_is_harmless() {
        let mut budget = Budget::new(1000);
        budget.set_rate(1000, 500);
        assert_eq!(budget.due(400), 0);
        assert_eq!(budget.due(510), 10);
    }
}
