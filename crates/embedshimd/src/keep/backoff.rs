//! [`Backoff`]: how long to wait before the daemon is started again. Pure.

use std::time::Duration;

/// A daemon that lived longer than this has not failed at its start.
const YOUNG: Duration = Duration::from_secs(1);
/// The first pause; each further one is twice as long.
const STEP: Duration = Duration::from_millis(100);
/// The longest pause for a daemon that was never ready: each attempt costs a start.
const LONGEST: Duration = Duration::from_secs(5);
/// The longest pause for a daemon that was ready: containerd waits for its answers.
const LONGEST_IF_READY: Duration = Duration::from_secs(1);

/// The number of failures in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait after a daemon has ended that `lived` so long.
    pub(super) fn pause(&mut self, lived: Duration, was_ready: bool) -> Duration {
        if was_ready && lived >= YOUNG {
            self.failures = 0;
            return Duration::ZERO;
        }
        self.failures = self.failures.saturating_add(1);
        let longest = if was_ready { LONGEST_IF_READY } else { LONGEST };
        match self.failures.checked_sub(2) {
            None => Duration::ZERO,
            Some(doubled) => STEP
                .saturating_mul(2u32.saturating_pow(doubled))
                .min(longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses(lived: Duration, was_ready: bool) -> Vec<u128> {
        let mut backoff = Backoff::default();
        let pauses = (0..10).map(|_| backoff.pause(lived, was_ready).as_millis());
        pauses.collect()
    }

    #[test]
    fn the_first_is_free_and_none_is_endless() {
        let young = Duration::from_millis(50);
        assert_eq!(
            pauses(young, false),
            [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
        );
        assert_eq!(
            pauses(young, true),
            [0, 100, 200, 400, 800, 1000, 1000, 1000, 1000, 1000]
        );
    }

    #[test]
    fn one_that_has_lived_is_replaced_at_once() {
        assert_eq!(pauses(YOUNG, true), [0; 10]);
        let mut backoff = Backoff { failures: 70 };
        assert_eq!(backoff.pause(Duration::ZERO, false), LONGEST);
        backoff.pause(YOUNG, true);
        assert_eq!(backoff.pause(Duration::ZERO, false), Duration::ZERO);
    }
}
