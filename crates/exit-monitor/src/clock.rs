//! [`BootTime`]. Owns the conversion between the kernel's boot clock, in which exits are recorded,
//! and the wall clock, in which containerd speaks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds on `CLOCK_BOOTTIME`: since boot, suspension included, the same for every process of
/// one time namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTime(pub u64);

impl BootTime {
    /// Now.
    pub fn now() -> Self {
        Self(nanoseconds(ClockId::CLOCK_BOOTTIME))
    }

    /// The wall-clock time of this moment, by today's relation of the two clocks.
    ///
    /// Take it once and keep the result: a clock that is set in between changes the relation.
    pub fn to_wall(self) -> SystemTime {
        let (boot, wall) = (Self::now(), SystemTime::now());
        let past = Duration::from_nanos(boot.0.saturating_sub(self.0));
        wall.checked_sub(past).unwrap_or(UNIX_EPOCH)
    }

    /// The moment that was this time on the wall, by today's relation of the two clocks.
    pub fn of_wall(wall: SystemTime) -> Self {
        let (boot, now) = (Self::now(), SystemTime::now());
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self(match now.duration_since(wall) {
            Ok(past) => boot.0.saturating_sub(nanoseconds(past)),
            Err(to_come) => boot.0.saturating_add(nanoseconds(to_come.duration())),
        })
    }

    /// In ticks, as `/proc/PID/stat` counts.
    pub fn ticks(self) -> u64 {
        self.0 / nanoseconds_per_tick()
    }

    /// The beginning of this tick, as `/proc/PID/stat` counts them.
    pub fn of_ticks(ticks: u64) -> Self {
        Self(ticks.saturating_mul(nanoseconds_per_tick()))
    }

    /// How long before this moment `earlier` was; zero if it comes later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn nanoseconds_per_tick() -> u64 {
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    (1_000_000_000 / per_second).max(1)
}

fn nanoseconds(clock: ClockId) -> u64 {
    // Both clocks exist on every kernel we run on (2.6.39); 0 would only make a time early.
    clock_gettime(clock).map_or(0, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        let rest = u64::try_from(t.tv_nsec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(rest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_past_boot_time_is_that_long_ago_on_the_wall() {
        let then = BootTime(BootTime::now().0 - 5_000_000_000);
        let ago = SystemTime::now().duration_since(then.to_wall()).unwrap();
        assert!((4_900..5_500).contains(&ago.as_millis()), "{ago:?}");
    }

    #[test]
    fn a_tick_begins_when_it_is_counted() {
        let now = BootTime::now();
        let tick = BootTime::of_ticks(now.ticks());
        assert!(now.since(tick) < Duration::from_secs(1), "{now:?} {tick:?}");
        assert_eq!(tick.ticks(), now.ticks());
        assert_eq!(tick.since(BootTime(u64::MAX)), Duration::ZERO);
    }
}
