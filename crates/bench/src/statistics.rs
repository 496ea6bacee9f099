//! Medians, quantiles, and how far they can be trusted. Pure.

/// What many values say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) samples: usize,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    /// The median's interval: see [`interval`].
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Summary {
    /// None of no value.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        let (low, high) = interval(&sorted)?;
        Some(Self {
            samples: sorted.len(),
            median: median(&sorted)?,
            p95: quantile(&sorted, 0.95)?,
            p99: quantile(&sorted, 0.99)?,
            low,
            high,
        })
    }
}

/// The quotients of values that were taken in the same rounds: what slows a machine down for a
/// while slows down both.
pub(crate) fn ratios(values: &[f64], baseline: &[f64]) -> Vec<f64> {
    let pairs = values.iter().zip(baseline);
    let usable = pairs.filter(|(_, base)| **base > 0.0);
    usable.map(|(value, base)| value / base).collect()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The middle value, or the mean of the two middle ones.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len().is_multiple_of(2) {
        return Some(f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, upper));
    }
    Some(upper)
}

/// The smallest value that this share of all does not exceed.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among values that fit in memory"
    )]
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Where the true median is with 95 % probability, whatever the distribution: between two values
/// whose ranks are 0.98 times the root of the number away from the middle.
fn interval(sorted: &[f64]) -> Option<(f64, f64)> {
    let count = sorted.len();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among values that fit in memory"
    )]
    let (low, high) = {
        let (middle, reach) = (count as f64 / 2.0, 0.98 * (count as f64).sqrt());
        (
            (middle - reach).floor().max(0.0) as usize,
            (middle + reach).ceil() as usize,
        )
    };
    let last = count.checked_sub(1)?;
    Some((*sorted.get(low.min(last))?, *sorted.get(high.min(last))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: u32) -> Vec<f64> {
        (1..=count).rev().map(f64::from).collect()
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let summary = Summary::of(&numbers(100)).unwrap();
        assert_eq!(
            (summary.median, summary.p95, summary.p99),
            (50.5, 95.0, 99.0)
        );
        let summary = Summary::of(&numbers(5)).unwrap();
        assert_eq!((summary.median, summary.p95, summary.p99), (3.0, 5.0, 5.0));
    }

    #[test]
    fn the_interval_narrows_with_the_number_of_values() {
        let width = |count| {
            let summary = Summary::of(&numbers(count)).unwrap();
            assert!(summary.low <= summary.median && summary.median <= summary.high);
            (summary.high - summary.low) / f64::from(count)
        };
        assert!(width(400) < width(100) && width(100) < width(25));
        // Of few values nothing is known but their range.
        let few = Summary::of(&numbers(3)).unwrap();
        assert_eq!((few.low, few.high), (1.0, 3.0));
    }

    #[test]
    fn nothing_is_said_of_nothing() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[f64::NAN]), None);
    }

    #[test]
    fn ratios_are_of_pairs() {
        assert_eq!(ratios(&[2.0, 6.0, 1.0], &[1.0, 2.0, 0.0]), [2.0, 3.0]);
        assert_eq!(ratios(&[2.0], &[1.0, 2.0]), [2.0]);
    }
}
