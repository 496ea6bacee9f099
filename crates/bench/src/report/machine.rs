//! [`Machine`]: where a run was made, and under what load. Figures without it mean nothing.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The machine of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) architecture: String,
    pub(crate) processors: usize,
    pub(crate) memory_mb: u64,
    pub(crate) kernel: String,
    pub(crate) cgroups: String,
    /// Processes that ran or wanted to, on average over a minute, before and after.
    pub(crate) load_before: f64,
    pub(crate) load_after: f64,
    /// How long the run took.
    pub(crate) seconds: u64,
    /// The command line.
    pub(crate) command: String,
}

impl Machine {
    /// This one, now.
    pub(crate) fn here() -> Self {
        let load = load();
        Self {
            date: said_by("date", &["--utc", "+%Y-%m-%d %H:%M"]),
            commit: said_by("git", &["describe", "--always", "--dirty"]),
            architecture: std::env::consts::ARCH.into(),
            processors: std::thread::available_parallelism().map_or(0, Into::into),
            memory_mb: memory_mb(),
            kernel: said_by("uname", &["--kernel-release"]),
            cgroups: cgroups().into(),
            load_before: load,
            load_after: load,
            seconds: 0,
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        }
    }

    /// Another run on it.
    pub(super) fn add(&mut self, other: &Self) {
        self.load_before = self.load_before.max(other.load_before);
        self.load_after = self.load_after.max(other.load_after);
        self.seconds += other.seconds;
    }

    /// In one sentence.
    pub(crate) fn sentence(&self) -> String {
        format!(
            "{}, commit {}: {}, {} processors, {} MB of memory, Linux {}, cgroups {}; load {:.1} \
             before and {:.1} after {} s of measuring",
            self.date,
            self.commit,
            self.architecture,
            self.processors,
            self.memory_mb,
            self.kernel,
            self.cgroups,
            self.load_before,
            self.load_after,
            self.seconds
        )
    }
}

/// The average of the last minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|load| load.parse().ok()).unwrap_or_default()
}

fn memory_mb() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kilobytes = total.and_then(|total| total.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or_default() / 1024
}

fn cgroups() -> &'static str {
    let has = |path: &str| std::path::Path::new(path).exists();
    match (
        has("/sys/fs/cgroup/cgroup.controllers"),
        has("/sys/fs/cgroup/unified"),
    ) {
        (true, _) => "v2",
        (false, true) => "hybrid",
        (false, false) => "v1",
    }
}

/// The first line that a program prints, or nothing.
pub(crate) fn said_by(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
impl Machine {
    pub(crate) fn example() -> Self {
        Self {
            date: "2026-11-29 10:00".into(),
            commit: "abcdef0".into(),
            architecture: "x86_64".into(),
            processors: 2,
            memory_mb: 24_000,
            kernel: "6.18.0".into(),
            cgroups: "hybrid".into(),
            load_before: 0.3,
            load_after: 2.0,
            seconds: 170,
            command: "--quick".into(),
        }
    }
}
