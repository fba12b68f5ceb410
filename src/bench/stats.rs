//! Percentiles.

use serde::{Deserialize, Serialize};

/// The nearest-rank percentile of ascending values: the smallest one that at least `percent` % of them
/// do not exceed. Always a value that was measured. `None` without values.
pub fn percentile(sorted: &[f64], percent: u32) -> Option<f64> {
    let rank = (sorted.len() * percent as usize).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The middle value, or the mean of the two middle ones.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    Some((sorted[last / 2] + sorted[sorted.len() / 2]) / 2.0)
}

/// A summary of measured values, in their unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    pub mean: f64,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Distribution {
    /// `None` without values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        Some(Self {
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            min: *sorted.first()?,
            p50: percentile(&sorted, 50)?,
            p90: percentile(&sorted, 90)?,
            p95: percentile(&sorted, 95)?,
            p99: percentile(&sorted, 99)?,
            max: *sorted.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, tried on every value.
    fn naive(values: &[f64], percent: usize) -> f64 {
        let enough = |limit: f64| {
            values.iter().filter(|&&v| v <= limit).count() * 100 >= percent * values.len()
        };
        let candidates = values.iter().copied().filter(|&v| enough(v));
        candidates.fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn percentiles_match_their_definition(
            values in prop::collection::vec(0..50_i32, 1..300),
            percent in 1..=100_u32,
        ) {
            let mut values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let want = naive(&values, percent as usize);
            let all = Distribution::of(values.iter().copied()).unwrap();
            prop_assert_eq!(all.p99, naive(&values, 99));
            prop_assert_eq!(all.p50, naive(&values, 50));
            values.sort_by(f64::total_cmp);
            prop_assert_eq!(percentile(&values, percent), Some(want));
            prop_assert_eq!((all.min, all.max), (values[0], *values.last().unwrap()));
        }
    }

    #[test]
    fn nothing_has_no_percentiles() {
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(Distribution::of([]), None);
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
    }
}
