//! The distribution of a figure over many runs, by nearest rank: each number printed is one that was measured.

use serde::Serialize;

/// Quantiles of one figure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Number of samples.
    pub samples: usize,
    /// The smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of 100 are at most this; the largest, if there are fewer than 100.
    pub p99: f64,
    /// The largest.
    pub max: f64,
    /// Mean.
    pub mean: f64,
}

impl Spread {
    /// Of these samples; `None` if there are none.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(max)
        };
        let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
        Some(Self { samples: sorted.len(), min, p50: at(50), p90: at(90), p99: at(99), max, mean })
    }

    /// One row of a table: p50, p90, p99, max.
    pub fn row(&self, name: &str, digits: usize) -> String {
        let Self { p50, p90, p99, max, .. } = self;
        format!("{name:<22} {p50:>10.digits$} {p90:>10.digits$} {p99:>10.digits$} {max:>10.digits$}")
    }

    /// The head of such a table.
    pub fn head(name: &str) -> String {
        format!("{name:<22} {:>10} {:>10} {:>10} {:>10}", "p50", "p90", "p99", "max")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_of_nearest_rank() {
        let spread = Spread::of((1..=50).rev().map(f64::from)).unwrap();
        assert_eq!((spread.min, spread.p50, spread.p90), (1.0, 25.0, 45.0));
        assert_eq!((spread.p99, spread.max, spread.mean), (50.0, 50.0, 25.5));
        let hundreds = Spread::of((1..=200).map(f64::from)).unwrap();
        assert_eq!((hundreds.p50, hundreds.p99), (100.0, 198.0));
        assert_eq!(Spread::of([7.0]).unwrap().p50, 7.0);
        assert_eq!(Spread::of([]), None);
    }
}
