//! Times and sizes in words for people. Pure.

/// A time in its two largest units, such as `3m 12s`.
pub(super) fn time(seconds: f64) -> String {
    if seconds < 1.0 {
        return format!("{:.0}ms", seconds.max(0.0) * 1000.0);
    }
    // Saturates: a time of the daemon's is finite and not negative.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float saturates, and is above 1 here"
    )]
    let whole = seconds as u64;
    let (days, hours) = (whole / 86_400, whole / 3600 % 24);
    let (minutes, rest) = (whole / 60 % 60, whole % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// A time, or a dash.
pub(super) fn time_or_dash(seconds: Option<f64>) -> String {
    seconds.map_or_else(dash, time)
}

/// A moment, as in `2025-11-29T14:03:20.250Z`; the epoch is the first that there is.
pub(super) fn clock(since_epoch: f64) -> String {
    // Saturates, as above.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float saturates, and is not negative here"
    )]
    let millis = (since_epoch.clamp(0.0, LAST_MOMENT) * 1000.0).round() as u64;
    let (seconds, millis) = (millis / 1000, millis % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// The end of the year 9999.
const LAST_MOMENT: f64 = 253_402_300_799.0;

/// The Gregorian date of a day since the epoch. Counts from the first of March of the year 0, so
/// that the day that leap years have more is the last of its year.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, months have 31, 30, 31, 30, 31 days, again and again.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next, month, day)
}

/// A size in the binary unit that leaves at most four digits, such as `3.4 MiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "it is shown with one digit")]
    let mut value = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 1024.0 {
        let Some(next) = units.next() else { break };
        value /= 1024.0;
        unit = Some(next);
    }
    format!("{value:.1} {}", unit.unwrap_or(&""))
}

pub(super) fn dash() -> String {
    "-".to_owned()
}

/// `1 task`, `2 tasks`.
pub(super) fn count(number: u64, of: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {of}{plural}")
}

/// `1 process`, `2 processes`.
pub(super) fn processes(number: usize) -> String {
    let plural = if number == 1 { "" } else { "es" };
    format!("{number} process{plural}")
}

/// Text that a container or a client has chosen: characters that would move the cursor are shown,
/// not sent.
pub(super) fn visible(text: &str) -> String {
    let shown = text.chars().flat_map(|c| {
        let escaped = c.is_control().then(|| c.escape_default().collect());
        escaped.unwrap_or_else(|| vec![c])
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_have_the_unit_that_people_use() {
        let times = [0.0, 0.2, 1.0, 59.9, 61.0, 3_661.0, 90_000.0, f64::MAX];
        let times = times.map(time);
        assert_eq!(
            times[..7],
            ["0ms", "200ms", "1s", "59s", "1m 1s", "1h 1m", "1d 1h"]
        );
        let sizes = [0, 1023, 1024, 3_565_158, u64::MAX].map(size);
        assert_eq!(
            sizes,
            ["0 B", "1023 B", "1.0 KiB", "3.4 MiB", "16384.0 PiB"]
        );
        let moments = [
            0.0,
            951_782_400.0,
            1_764_425_000.25,
            4_107_542_399.999,
            f64::MAX,
        ];
        let moments = moments.map(clock);
        let expected = [
            "1970-01-01T00:00:00.000Z",
            "2000-02-29T00:00:00.000Z",
            "2025-11-29T14:03:20.250Z",
            "2100-02-28T23:59:59.999Z",
            "9999-12-31T23:59:59.000Z",
        ];
        assert_eq!(moments, expected);
        assert_eq!(visible("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
    }
}
