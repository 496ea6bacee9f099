//! The descriptors that whoever started us has kept for us: `LISTEN_FDS` and its companions, as of `sd_listen_fds(3)`. Owns taking
//! them out of the environment, once; what they are for is the daemon's.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::time::Duration;

use embedshim_core::fdstore::{FdName, InheritedFds};
use embedshim_core::process::{OpenError, Process};
use nix::unistd::{Pid, getpid, getppid};

use crate::sys;

/// The first one.
const FIRST: RawFd = 3;
/// What `sd_listen_fds_with_names(3)` says of one without a name.
const NAMELESS: &str = "unknown";

/// What came with the start of this process.
#[derive(Debug, Default)]
pub(crate) struct Start {
    /// What a predecessor has left.
    pub(crate) inherited: InheritedFds,
    /// Names that say nothing to us; their descriptors are closed.
    pub(crate) unknown: Vec<String>,
    /// Where the manager listens.
    pub(crate) notify_socket: Option<OsString>,
    /// The most descriptors that the manager holds, if it says so.
    pub(crate) store_limit: Option<usize>,
    /// The keeper that has started us, if it was not systemd.
    pub(crate) keeper: Option<i32>,
    /// Within which time the manager wants to hear that we are alive.
    pub(crate) watchdog: Option<Duration>,
}

impl Start {
    /// Takes everything, and the variables out of the environment: no child may take them for its own. Must be the first thing that
    /// `main` does.
    pub(crate) fn take() -> Self {
        let [count, names, pid, parent] =
            ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PPID"]
                .map(|name| Some(sys::take_variable(name)?.to_string_lossy().into_owned()));
        // systemd tells it from version 254 on; for an older one the unit does.
        let limits = ["FDSTORE", "EMBEDSHIM_FDSTORE_MAX"]
            .map(|name| sys::take_variable(name)?.to_str()?.parse().ok());
        let mut start = Self {
            store_limit: limits.into_iter().flatten().next(),
            notify_socket: sys::take_variable("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
            ..Self::default()
        };
        let watchdog = ["WATCHDOG_USEC", "WATCHDOG_PID"]
            .map(|name| Some(sys::take_variable(name)?.to_string_lossy().into_owned()));
        let is_for_us = is_for_us(pid.as_deref(), parent.as_deref());
        start.watchdog = period(watchdog, is_for_us);
        if !is_for_us {
            return start;
        }
        start.keeper = parent.and_then(|parent| parent.parse().ok());
        let count = count.and_then(|count| count.parse().ok()).unwrap_or(0);
        let names = names.unwrap_or_default();
        let mut names = names.split(':');
        for number in (FIRST..).take(count) {
            // A count that is too high ends at the first number that is not open.
            let Ok(descriptor) = sys::own(number) else {
                break;
            };
            let text = names.next().unwrap_or(NAMELESS);
            match text.parse::<FdName>() {
                Ok(name) => start.inherited.insert(name, descriptor),
                Err(_) => start.unknown.push(text.into()),
            }
        }
        start
    }
}

/// As `sd_watchdog_enabled(3)`: the time in microseconds, and whose it is, if that is said.
fn period([time, pid]: [Option<String>; 2], is_for_us: bool) -> Option<Duration> {
    let own = getpid().to_string();
    if !pid.map_or(is_for_us, |pid| pid == own) {
        return None;
    }
    let period = Duration::from_micros(time?.parse().ok()?);
    Some(period).filter(|period| !period.is_zero())
}

/// Variables can be inherited by whom they are not meant for. The keeper cannot know our pid before we exist, so it tells its own.
fn is_for_us(pid: Option<&str>, parent: Option<&str>) -> bool {
    let number = |text: &str| text.parse().ok().map(Pid::from_raw);
    match (pid, parent) {
        (Some(pid), _) => number(pid) == Some(getpid()),
        (None, Some(parent)) => number(parent).is_some_and(|parent| {
            // It may have been killed right after it has started us.
            parent == getppid() || has_ended(parent)
        }),
        (None, None) => false,
    }
}

fn has_ended(pid: Pid) -> bool {
    match Process::open(pid.as_raw()) {
        Ok(process) => process.has_ended().unwrap_or(false),
        Err(error) => matches!(error, OpenError::Gone { .. }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_descriptors_are_taken() {
        let own = getpid().to_string();
        let parent = getppid().to_string();
        assert!(is_for_us(Some(&own), None));
        assert!(is_for_us(None, Some(&parent)));
        for (pid, of_parent) in [
            (None, None),
            (Some("1"), Some(parent.as_str())),
            (Some(""), Some(&parent)),
            (Some("x"), None),
            (None, Some(own.as_str())),
        ] {
            assert!(!is_for_us(pid, of_parent), "{pid:?} {of_parent:?}");
        }
    }
}
