//! How far this process's clocks are from the kernel's own. Owns what a time namespace (Linux 5.6)
//! means for the program: `/proc/PID/stat` and `clock_gettime` tell times with the reader's offset,
//! kernel structures and BPF helpers have them without.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::time::{ClockId, clock_gettime};

/// `PROC_TIME_INIT_INO` of linux/proc_ns.h.
const INITIAL_TIME_NAMESPACE: u64 = 0xEFFF_FFFA;

/// What our clocks are ahead of the kernel's, in nanoseconds. The kernel adds them as we do, in
/// unsigned arithmetic that wraps around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offsets {
    monotonic: u64,
    boot: u64,
}

impl Offsets {
    /// Those of our time namespace; they cannot change while a process is in it. None where they
    /// cannot be told count as zero, which [proving](crate::proof) then finds out.
    pub(crate) fn own() -> Self {
        if is_initial() {
            return Self::default();
        }
        let inode = |name| fs::metadata(format!("/proc/self/ns/{name}")).map(|found| found.ino());
        // The file is about the namespace that our children get (timens_offsets in proc(5)).
        match (inode("time"), inode("time_for_children")) {
            (Ok(ours), Ok(childrens)) if ours == childrens => {
                let text = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
                Self::parse(&text)
            }
            _ => Self::default(),
        }
    }

    fn parse(text: &str) -> Self {
        let of = |clock: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(clock))?;
            let mut numbers = line.split_whitespace().map(str::parse::<i64>);
            let (seconds, rest) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
            let nanoseconds = seconds.checked_mul(1_000_000_000)?.checked_add(rest)?;
            Some(nanoseconds.cast_unsigned())
        };
        Self {
            monotonic: of("monotonic").unwrap_or_default(),
            boot: of("boottime").unwrap_or_default(),
        }
    }

    /// What the boot clock is ahead, as the program adds it.
    pub(crate) fn boot(self) -> u64 {
        self.boot
    }

    /// How long this machine has slept since it was booted: what the kernel's boot clock is ahead
    /// of its monotonic one.
    pub(crate) fn asleep(self) -> u64 {
        let now = |clock| {
            let now = clock_gettime(clock).ok()?;
            let seconds = u64::try_from(now.tv_sec()).ok()?;
            let rest = u64::try_from(now.tv_nsec()).ok()?;
            seconds.checked_mul(1_000_000_000)?.checked_add(rest)
        };
        let boot = now(ClockId::CLOCK_BOOTTIME).map(|now| now.wrapping_sub(self.boot));
        let running = now(ClockId::CLOCK_MONOTONIC).map(|now| now.wrapping_sub(self.monotonic));
        let difference = boot
            .zip(running)
            .map(|(boot, running)| boot.saturating_sub(running));
        difference.unwrap_or_default()
    }
}

/// Whether our time is the machine's. So it is where the kernel has no time namespaces.
pub(crate) fn is_initial() -> bool {
    let found = fs::metadata("/proc/self/ns/time");
    found.map_or(true, |found| found.ino() == INITIAL_TIME_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_with_their_sign() {
        let read =
            Offsets::parse("monotonic           7         5\nboottime         -2 500000000\n");
        assert_eq!(read.monotonic, 7_000_000_005);
        assert_eq!(read.boot.cast_signed(), -1_500_000_000);
        for strange in [
            "",
            "boottime\n",
            "boottime 9999999999999 0\n",
            "boottime x y\n",
        ] {
            assert_eq!(Offsets::parse(strange), Offsets::default(), "{strange}");
        }
    }
}
