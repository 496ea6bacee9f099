//! [`Random`]: numbers that are a function of the seed and of who draws them, so that a run can be
//! told from its seed. Splitmix64; never asks the machine for anything.

use std::time::Duration;

/// A stream of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of one of many: a worker's, the life's of a worker, the killer's.
    pub(crate) fn of(seed: u64, path: &[u64]) -> Self {
        let mut state = Self(seed);
        for &part in path {
            state = Self(state.next() ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        }
        state
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// One of `0..limit`; 0 if there is none.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// An exit code that says nothing of the kind "went well", "signal" or "unknown".
    pub(crate) fn code(&mut self) -> u32 {
        u32::try_from(1 + self.below(120)).unwrap_or(1)
    }

    pub(crate) fn millis(&mut self, limit: u64) -> u64 {
        self.below(limit)
    }

    /// The time until the next of events that come at random, `mean` apart; at most ten times that.
    #[expect(
        clippy::cast_precision_loss,
        reason = "53 bits of randomness are enough"
    )]
    pub(crate) fn gap(&mut self, mean: Duration) -> Duration {
        let uniform = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        mean.mul_f64((-(1.0 - uniform).ln()).min(10.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_another_gives_others() {
        let numbers = |seed, path: &[u64]| {
            let mut random = Random::of(seed, path);
            [random.next(), random.next(), random.next()]
        };
        assert_eq!(numbers(7, &[1, 2]), numbers(7, &[1, 2]));
        assert_ne!(numbers(7, &[1, 2]), numbers(8, &[1, 2]));
        assert_ne!(numbers(7, &[1, 2]), numbers(7, &[2, 1]));
    }

    #[test]
    fn gaps_have_their_mean() {
        let mut random = Random::of(1, &[]);
        let sum: Duration = (0..10_000)
            .map(|_| random.gap(Duration::from_millis(100)))
            .sum();
        let mean = sum.as_secs_f64() / 10_000.0;
        assert!((0.09..0.11).contains(&mean), "{mean}");
    }
}
