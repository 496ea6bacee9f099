//! What the kernel says of processes: memory, descriptors, time on a processor, waking up.

use std::fs;
use std::time::Duration;

use anyhow::Context;

/// Memory that is not backed by files, in kB: what a process has allocated.
pub(crate) fn anonymous_kb(pid: i32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).context(path)?;
    field(&text, "Anonymous:").context("no anonymous memory")
}

/// Of several processes.
pub(crate) fn anonymous_of(pids: &[i32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| anonymous_kb(*pid)).sum()
}

/// Open descriptors.
pub(crate) fn descriptors(pid: i32) -> anyhow::Result<u32> {
    Ok(u32::try_from(
        fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
    )?)
}

/// How often its threads have waited, and milliseconds of its threads on a processor. Threads that
/// have ended are not in it.
pub(crate) fn activity(pid: i32) -> anyhow::Result<(f64, f64)> {
    let (mut waits, mut milliseconds) = (0.0, 0.0);
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |file: &str| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        waits += field(&read("status"), "voluntary_ctxt_switches:").unwrap_or_default();
        let nanoseconds = read("schedstat");
        let nanoseconds = nanoseconds.split_whitespace().next();
        let nanoseconds = nanoseconds.and_then(|number| number.parse::<f64>().ok());
        milliseconds += nanoseconds.unwrap_or_default() / 1e6;
    }
    Ok((waits, milliseconds))
}

/// User and system time of all threads, those that have ended as well, to a hundredth of a second.
pub(crate) fn processor_time(pid: i32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).context(path)?;
    // After the name, which may have anything in it.
    let fields = text.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks = ticks.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    // USER_HZ is 100 on every architecture that we run on.
    Ok(Duration::from_millis(ticks.iter().sum::<u64>() * 10))
}

/// The number after a name, which may have a unit.
fn field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_numbers_after_their_names() {
        let text = "Rss:      12 kB\nAnonymous:       1536 kB\n";
        assert_eq!(field(text, "Anonymous:"), Some(1536.0));
        assert_eq!(field(text, "Swap:"), None);
    }

    #[test]
    fn this_process_has_memory_and_descriptors() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(anonymous_kb(pid).unwrap() > 0.0);
        assert!(descriptors(pid).unwrap() > 2);
        assert!(activity(pid).unwrap().1 > 0.0);
    }
}
