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
        assert_eq!(visible("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
    }
}
