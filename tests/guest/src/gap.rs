//! The largest time between two turns of a loop, and how many were long.
//!
//! Works in TSC ticks, so that a sample costs a subtraction and a comparison; microseconds only for reports.

/// Gaps longer than each of these are counted, in units of 100 us.
pub const THRESHOLDS_100US: [u64; 9] = [1, 5, 10, 20, 50, 100, 200, 500, 1000];
/// Their names in reports.
pub const THRESHOLD_NAMES: [&str; 9] =
    ["100us", "500us", "1ms", "2ms", "5ms", "10ms", "20ms", "50ms", "100ms"];

/// Records gaps since its creation or last reset.
#[derive(Debug, Clone)]
pub struct Gaps {
    thresholds: [u64; 9],
    last: u64,
    /// When the observation began, in ticks.
    pub since: u64,
    /// The largest gap, in ticks.
    pub max: u64,
    /// When the largest gap ended, in ticks.
    pub max_at: u64,
    /// Samples taken.
    pub iterations: u64,
    /// Number of gaps above each threshold.
    pub above: [u64; 9],
}

impl Gaps {
    /// Starts to observe at `now`.
    #[must_use]
    pub fn new(ticks_per_s: u64, now: u64) -> Self {
        let thresholds = THRESHOLDS_100US.map(|t| ticks_per_s / 10_000 * t);
        Self { thresholds, last: now, since: now, max: 0, max_at: now, iterations: 0, above: [0; 9] }
    }

    /// Takes note of a turn of the loop; the length of the gap before it, in ticks.
    pub fn sample(&mut self, now: u64) -> u64 {
        let gap = now.saturating_sub(self.last);
        self.last = now;
        self.iterations += 1;
        if gap > self.max {
            (self.max, self.max_at) = (gap, now);
        }
        if gap > self.thresholds[0] {
            for (count, threshold) in self.above.iter_mut().zip(&self.thresholds) {
                *count += u64::from(gap > *threshold);
            }
        }
        gap
    }

    /// Lets a gap that was meant to be (a halt without work) go unnoticed.
    pub fn skip(&mut self, now: u64) {
        self.last = now;
    }

    /// Forgets what was seen. The gap that is under way is kept.
    pub fn reset(&mut self) {
        (self.since, self.max, self.max_at, self.iterations, self.above) =
            (self.last, 0, self.last, 0, [0; 9]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_finds_the_largest() {
        let mut gaps = Gaps::new(1_000_000, 0);
        for now in [50, 200, 1300, 1310, 26_310] {
            gaps.sample(now);
        }
        assert_eq!((gaps.max, gaps.max_at, gaps.iterations), (25_000, 26_310, 5));
        assert_eq!(gaps.above, [3, 2, 2, 1, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn reset_keeps_the_gap_under_way() {
        let mut gaps = Gaps::new(1_000_000, 0);
        gaps.sample(100);
        gaps.reset();
        assert_eq!(gaps.sample(600), 500);
        assert_eq!((gaps.max, gaps.iterations), (500, 1));
    }

    #[test]
    fn names_fit_thresholds() {
        for (name, t) in THRESHOLD_NAMES.iter().zip(THRESHOLDS_100US) {
            let us = t * 100;
            let expected = if us < 1000 { format!("{us}us") } else { format!("{}ms", us / 1000) };
            assert_eq!(*name, expected);
        }
    }
}
