//! [`ChildContext`]: what a program that is started for a task inherits, as a shim of the task's
//! own would pass it on: containerd's environment and limits, and nothing of the daemon's. Owns how
//! it is noted and how it is given to a child.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};

use crate::sys;

/// Which service manager a process answers to is not for its children: runc would answer, too
/// (go-runc leaves it out as well), and so is which descriptors it was given.
const NOT_INHERITED: [&str; 5] = [
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_USEC",
];
/// An `oom_score_adj` is never more.
const MAX_OOM_SCORE: i32 = 1000;

/// What the OCI runtime, its hooks and loggers inherit. The default is the daemon's own environment
/// and limits. Equal ones share their memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Inherited", into = "Inherited")]
pub struct ChildContext(Arc<Inherited>);

/// The content of a [`ChildContext`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inherited {
    /// `NAME=value` each; none for the daemon's.
    pub environment: Vec<String>,
    /// `RLIMIT_NOFILE`, soft and hard.
    pub open_files: Option<(u64, u64)>,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// The file mode creation mask.
    pub umask: Option<u32>,
}

impl From<Inherited> for ChildContext {
    fn from(inherited: Inherited) -> Self {
        static KNOWN: Mutex<Vec<Weak<Inherited>>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut living = known.iter().filter_map(Weak::upgrade);
        if let Some(same) = living.find(|other| **other == inherited) {
            return Self(same);
        }
        let new = Arc::new(inherited);
        known.retain(|other| other.strong_count() > 0);
        known.push(Arc::downgrade(&new));
        Self(new)
    }
}

impl From<ChildContext> for Inherited {
    fn from(context: ChildContext) -> Self {
        Arc::unwrap_or_clone(context.0)
    }
}

impl ChildContext {
    /// What a shim that this process started would pass on: for a launcher that containerd has
    /// started. Its score for the OOM killer is one more than this process's, as for containerd's
    /// shims.
    /// Changes the umask for a moment, so only a process of one thread may call it.
    pub fn of_launcher() -> Self {
        let mask = umask(Mode::empty());
        umask(mask);
        let score = std::fs::read_to_string("/proc/self/oom_score_adj").ok();
        let score = score.and_then(|score| score.trim().parse::<i32>().ok());
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some(format!("{}={}", name.to_str()?, value.to_str()?))
        };
        Self::from(Inherited {
            environment: std::env::vars_os().filter_map(text).collect(),
            open_files: getrlimit(Resource::RLIMIT_NOFILE).ok(),
            oom_score_adj: score.map(|score| score.saturating_add(1).min(MAX_OOM_SCORE)),
            umask: Some(mask.bits()),
        })
    }

    /// The value of a variable that a child will have.
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        let mut variables = self.0.environment.iter();
        variables.find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    }

    /// Gives it to a child that is to be started in this directory, or in `/` if that is not there
    /// any more. Blocks on the directory.
    pub(crate) fn give(&self, command: &mut Command, directory: &Path) {
        let is_there = directory.is_dir();
        command.current_dir(if is_there { directory } else { Path::new("/") });
        if !self.0.environment.is_empty() {
            let variables = self.0.environment.iter();
            command
                .env_clear()
                .envs(variables.filter_map(|variable| variable.split_once('=')));
        }
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        sys::before_exec(
            command,
            &sys::BeforeExec {
                open_files: self.0.open_files,
                oom_score_adj: self.0.oom_score_adj,
                umask: self.0.umask,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inherited(environment: &[&str]) -> Inherited {
        Inherited {
            environment: environment.iter().map(|&text| text.to_owned()).collect(),
            open_files: Some((100, 200)),
            oom_score_adj: None,
            umask: Some(0o027),
        }
    }

    #[test]
    fn a_child_has_what_was_noted_and_nothing_else() {
        let context = ChildContext::from(inherited(&[
            "A=1",
            "NOTIFY_SOCKET=/x",
            "PATH=/bin:/usr/bin",
        ]));
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "ulimit -Sn; ulimit -Hn; umask; pwd; env | sort | grep -v ^_= | grep -v ^PWD | grep -v ^SHLVL; grep SigIgn /proc/self/status",
        ]);
        context.give(&mut command, directory.path());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let path = directory.path().canonicalize().unwrap();
        let expected = format!(
            "100\n200\n0027\n{}\nA=1\nPATH=/bin:/usr/bin\nSigIgn:\t{:016x}\n",
            path.display(),
            ignored_from_the_start()
        );
        assert_eq!(text, expected);
    }

    /// The signals that this process ignores since its start: a shell's background job ignores
    /// SIGINT and SIGQUIT. Rust's runtime ignores SIGPIPE, glibc's `posix_spawn` signal 32.
    fn ignored_from_the_start() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
        [libc::SIGPIPE, 32]
            .iter()
            .fold(ignored, |rest, signal| rest & !(1 << (signal - 1)))
    }

    #[test]
    fn equal_ones_share_their_memory() {
        let one = ChildContext::from(inherited(&["A=1"]));
        let text = serde_json::to_string(&one).unwrap();
        let other: ChildContext = serde_json::from_str(&text).unwrap();
        assert!(Arc::ptr_eq(&one.0, &other.0));
    }
}
