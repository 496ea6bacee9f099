//! [`Activation`]: what the service manager hands to this process at its start: `LISTEN_FDS` and
//! its companions, as of `sd_listen_fds(3)`, `NOTIFY_SOCKET` and the watchdog. Owns taking all of
//! it out of the environment, once; what the descriptors are for is the daemon's to know.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::time::Duration;

use embedshim_core::fdstore::{FdName, InheritedFds};
use embedshim_core::process::{OpenError, Process};
use nix::unistd::{Pid, getpid, getppid};

use crate::sys;

/// The longest list of names, with a colon after each. `execve` takes no string of more than 128
/// KiB, and `LISTEN_FDNAMES=` with all names is one: with a longer one no successor could start.
pub(crate) const MAX_NAMES_LENGTH: usize = 128 * 1024 - 64;

/// The variable by which a keeper tells how the daemon before has ended.
pub(crate) const PREDECESSOR: &str = "EMBEDSHIM_PREDECESSOR";

/// The number of the first descriptor, `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;
/// The name that `sd_listen_fds_with_names(3)` gives a descriptor without one.
const DEFAULT_NAME: &str = "unknown";

/// How long a keeper that is not the parent of this process may take to have ended.
const ENDING: Duration = Duration::from_millis(100);

/// What came with the start of this process.
#[derive(Debug, Default)]
pub(crate) struct Activation {
    /// The descriptors that a predecessor had stored, by name.
    pub(crate) inherited: InheritedFds,
    /// Names that are not an [`FdName`] of this version; their descriptors are closed.
    pub(crate) unknown_names: Vec<String>,
    /// The address of the manager's socket.
    pub(crate) notify_socket: Option<OsString>,
    /// The most descriptors that the manager stores, if it says so.
    pub(crate) store_limit: Option<usize>,
    /// The pid of the keeper that has started this process; `None` if systemd did.
    pub(crate) keeper: Option<i32>,
    /// The time within which the manager has to hear that this process is alive.
    pub(crate) watchdog: Option<Duration>,
    /// How the daemon before this one has ended, as the keeper has seen it.
    pub(crate) predecessor: Option<String>,
}

impl Activation {
    /// Takes everything, and removes the variables from the environment, so that no child takes
    /// them for its own. Must be the first thing that `main` does.
    pub(crate) fn take() -> Self {
        let [count, names, pid, parent] =
            ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PPID"]
                .map(|name| Some(sys::take_variable(name)?.to_string_lossy().into_owned()));
        // systemd sets `FDSTORE` from version 254 on; for an older one the unit sets the other.
        let limits = ["FDSTORE", "EMBEDSHIM_FDSTORE_MAX"]
            .map(|name| sys::take_variable(name)?.to_str()?.parse().ok());
        let mut activation = Self {
            store_limit: limits.into_iter().flatten().next(),
            predecessor: sys::take_variable(PREDECESSOR)
                .map(|how| how.to_string_lossy().into_owned()),
            notify_socket: sys::take_variable("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
            ..Self::default()
        };
        let watchdog = ["WATCHDOG_USEC", "WATCHDOG_PID"]
            .map(|name| Some(sys::take_variable(name)?.to_string_lossy().into_owned()));
        let is_for_us = is_for_us(pid.as_deref(), parent.as_deref());
        activation.watchdog = watchdog_period(watchdog, is_for_us);
        if !is_for_us {
            return activation;
        }
        activation.keeper = parent.and_then(|parent| parent.parse().ok());
        let count = count.and_then(|count| count.parse().ok()).unwrap_or(0);
        activation.take_descriptors(count, &names.unwrap_or_default());
        activation
    }

    /// Takes `count` descriptors, each with its name of a list with colons between the names.
    fn take_descriptors(&mut self, count: usize, names: &str) {
        let mut names = names.split(':');
        for number in (FIRST..).take(count) {
            // A count that is too high ends at the first number that is not open.
            let Ok(descriptor) = sys::own(number) else {
                break;
            };
            let text = names.next().unwrap_or(DEFAULT_NAME);
            match text.parse::<FdName>() {
                Ok(name) => self.inherited.insert(name, descriptor),
                Err(_) => self.unknown_names.push(text.into()),
            }
        }
    }
}

/// The watchdog's period as of `sd_watchdog_enabled(3)`: microseconds, and the pid of the process
/// it is meant for, if that is said.
fn watchdog_period([time, pid]: [Option<String>; 2], is_for_us: bool) -> Option<Duration> {
    let own = getpid().to_string();
    if !pid.map_or(is_for_us, |pid| pid == own) {
        return None;
    }
    let period = Duration::from_micros(time?.parse().ok()?);
    Some(period).filter(|period| !period.is_zero())
}

/// Whether the variables are meant for this process: they can be inherited by others. systemd gives
/// the pid of the process; the keeper, which cannot know that before the process exists, gives its
/// own.
fn is_for_us(pid: Option<&str>, parent: Option<&str>) -> bool {
    let number = |text: &str| text.parse().ok().map(Pid::from_raw);
    match (pid, parent) {
        (Some(pid), _) => number(pid) == Some(getpid()),
        (None, Some(parent)) => number(parent).is_some_and(|parent| {
            // A keeper that was killed right after it started this process is not its parent now.
            parent == getppid() || ends(parent)
        }),
        (None, None) => false,
    }
}

/// Whether this process has ended. One that is about to is waited for: its children get another
/// parent right before that.
fn ends(pid: Pid) -> bool {
    let process = match Process::open(pid.as_raw()) {
        Ok(process) => process,
        Err(error) => return matches!(error, OpenError::Gone { .. }),
    };
    (0..ENDING.as_millis()).any(|_| {
        let has_ended = process.has_ended().unwrap_or(false);
        if !has_ended {
            std::thread::sleep(Duration::from_millis(1));
        }
        has_ended
    })
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
