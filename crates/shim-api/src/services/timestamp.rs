//! Times as protobuf's `Timestamp`. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

/// Go's zero time, which containerd's shims answer for a time that has not come.
pub(crate) const GO_ZERO_SECONDS: i64 = -62_135_596_800;

/// A time, which can be before the epoch.
pub(crate) fn of(time: SystemTime) -> MessageField<Timestamp> {
    let (seconds, nanos) = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (whole(since), fraction(since)),
        Err(before) => {
            let before = before.duration();
            let nanos = fraction(before);
            if nanos == 0 {
                (-whole(before), 0)
            } else {
                (-whole(before) - 1, 1_000_000_000 - nanos)
            }
        }
    };
    MessageField::some(Timestamp {
        seconds,
        nanos,
        ..Timestamp::default()
    })
}

/// A time, or Go's zero time for one that has not come.
pub(crate) fn of_or_go_zero(time: Option<SystemTime>) -> MessageField<Timestamp> {
    match time {
        Some(time) => of(time),
        None => MessageField::some(Timestamp {
            seconds: GO_ZERO_SECONDS,
            ..Timestamp::default()
        }),
    }
}

fn whole(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

fn fraction(duration: Duration) -> i32 {
    i32::try_from(duration.subsec_nanos()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_have_positive_fractions() {
        let at = |time| {
            of(time)
                .as_ref()
                .map(|t: &Timestamp| (t.seconds, t.nanos))
                .unwrap()
        };
        assert_eq!(
            at(UNIX_EPOCH + Duration::from_millis(1500)),
            (1, 500_000_000)
        );
        assert_eq!(
            at(UNIX_EPOCH - Duration::from_millis(1500)),
            (-2, 500_000_000)
        );
        assert_eq!(of_or_go_zero(None).seconds, GO_ZERO_SECONDS);
    }
}
