//! The counters of a cgroup, as the kernel names them: `file` and `key`, such as `memory.stat` and
//! `cache`. Owns the reading and parsing; which counter a face shows under which name is the face's
//! business.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Cgroup, CgroupError};
use crate::kernel_file;

/// Files of v1 worth reading, by controller.
const V1: [(&str, &[&str]); 5] = [
    ("pids", &["pids.current", "pids.max"]),
    ("cpuacct", &["cpuacct.usage", "cpuacct.stat"]),
    ("cpu", &["cpu.stat"]),
    (
        "memory",
        &[
            "memory.stat",
            "memory.oom_control",
            "memory.usage_in_bytes",
            "memory.max_usage_in_bytes",
            "memory.failcnt",
            "memory.limit_in_bytes",
            "memory.memsw.usage_in_bytes",
            "memory.memsw.max_usage_in_bytes",
            "memory.memsw.failcnt",
            "memory.memsw.limit_in_bytes",
            "memory.kmem.usage_in_bytes",
            "memory.kmem.max_usage_in_bytes",
            "memory.kmem.failcnt",
            "memory.kmem.limit_in_bytes",
            "memory.kmem.tcp.usage_in_bytes",
            "memory.kmem.tcp.max_usage_in_bytes",
            "memory.kmem.tcp.failcnt",
            "memory.kmem.tcp.limit_in_bytes",
        ],
    ),
    (
        "blkio",
        &[
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_serviced_recursive",
        ],
    ),
];

/// Files of v2 worth reading.
const V2: [&str; 14] = [
    "pids.current",
    "pids.max",
    "cpu.stat",
    "memory.stat",
    "memory.events",
    "memory.current",
    "memory.max",
    "memory.peak",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "io.stat",
    "cgroup.stat",
    "cgroup.events",
];

/// The counters of one cgroup at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// They are of cgroup v2; the names differ from v1's.
    pub unified: bool,
    /// By file and key; a file with one number has the empty key. "max" is [`u64::MAX`].
    counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// Counters that are kept per block device.
    pub devices: Vec<DeviceCounter>,
    /// CPU time in nanoseconds per CPU (v1 only).
    pub per_cpu: Vec<u64>,
}

/// One counter of one block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounter {
    /// The file it is from, such as `io.stat`.
    pub file: String,
    /// The device's major number.
    pub major: u64,
    /// Its minor number.
    pub minor: u64,
    /// What is counted, such as `Read` (v1) or `rbytes` (v2).
    pub operation: String,
    /// How much of it.
    pub value: u64,
}

impl Cgroup {
    /// What it uses. Missing controllers count zero; an error means that the cgroup is gone.
    /// Blocks.
    pub(crate) fn metrics(&self) -> Result<Metrics, CgroupError> {
        let directory = self.directory().unwrap_or(Path::new("/"));
        fs::metadata(directory).map_err(|source| CgroupError::Read {
            path: directory.into(),
            source,
        })?;
        Ok(Metrics::read(self))
    }
}

impl Metrics {
    /// A counter; 0 if the kernel does not keep it.
    pub fn get(&self, file: &str, key: &str) -> u64 {
        self.counters
            .get(file)
            .and_then(|keys| keys.get(key))
            .copied()
            .unwrap_or(0)
    }

    /// The one number of a file; 0 if the kernel does not keep it.
    pub fn single(&self, file: &str) -> u64 {
        self.get(file, "")
    }

    pub(super) fn read(cgroup: &Cgroup) -> Self {
        let mut metrics = Self {
            unified: matches!(cgroup, Cgroup::V2(_)),
            ..Self::default()
        };
        match cgroup {
            Cgroup::V2(directory) => {
                for file in V2 {
                    metrics.read_file(directory, file);
                }
            }
            Cgroup::V1(controllers) => {
                for (controller, files) in V1 {
                    let Some(directory) = controllers.get(controller) else {
                        continue;
                    };
                    for file in files {
                        metrics.read_file(directory, file);
                    }
                    if controller == "cpuacct" {
                        let text = kernel_file::read(directory.join("cpuacct.usage_percpu"))
                            .unwrap_or_default();
                        metrics.per_cpu = text.split_whitespace().filter_map(number).collect();
                    }
                }
            }
        }
        metrics
    }

    /// A file that is missing belongs to a controller or kernel that does not count this.
    fn read_file(&mut self, directory: &Path, file: &str) {
        if let Ok(text) = kernel_file::read(directory.join(file)) {
            self.parse(file, &text);
        }
    }

    /// The kernel's formats: one number; `key number`; `8:0 Read number`; `8:0 rbytes=number ...`.
    fn parse(&mut self, file: &str, text: &str) {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(first), second) = (words.next(), words.next()) else {
                continue;
            };
            if let Some((major, minor)) = device(first) {
                let rest = second.into_iter().chain(words);
                self.parse_device(file, major, minor, &rest.collect::<Vec<_>>());
            } else {
                let (key, value) = second.map_or(("", first), |value| (first, value));
                if let Some(value) = number(value) {
                    self.counters
                        .entry(file.to_owned())
                        .or_default()
                        .insert(key.to_owned(), value);
                }
            }
        }
    }

    fn parse_device(&mut self, file: &str, major: u64, minor: u64, words: &[&str]) {
        let mut push = |operation: &str, value: &str| {
            if let Some(value) = number(value) {
                let (file, operation) = (file.to_owned(), operation.to_owned());
                self.devices.push(DeviceCounter {
                    file,
                    major,
                    minor,
                    operation,
                    value,
                });
            }
        };
        if let [operation, value] = words
            && !operation.contains('=')
        {
            push(operation, value);
            return;
        }
        for (operation, value) in words.iter().filter_map(|word| word.split_once('=')) {
            push(operation, value);
        }
    }
}

fn device(word: &str) -> Option<(u64, u64)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn number(word: &str) -> Option<u64> {
    if word == "max" {
        Some(u64::MAX)
    } else {
        word.parse().ok()
    }
}

/// One key of a file of `key number` lines.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, v)| number(v))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::tests::Own;

    #[test]
    fn every_format_of_the_kernel_is_read() {
        let mut metrics = Metrics::default();
        metrics.parse("pids.max", "max\n");
        metrics.parse("pids.current", "7\n");
        metrics.parse("memory.events", "low 0\noom 2\noom_kill 1\n");
        metrics.parse(
            "io.stat",
            "8:0 rbytes=90112 wbytes=0 rios=22 wios=0\n8:16 \n",
        );
        metrics.parse(
            "blkio.throttle.io_serviced_recursive",
            "254:0 Read 3\n254:0 Write 4\nTotal 7\n",
        );
        metrics.parse("rubbish", "a b c\n\n: :\n9x\n");
        assert_eq!(metrics.single("pids.max"), u64::MAX);
        assert_eq!(metrics.single("pids.current"), 7);
        assert_eq!(metrics.get("memory.events", "oom_kill"), 1);
        assert_eq!(metrics.get("memory.events", "never_heard_of"), 0);
        assert_eq!(metrics.devices.len(), 6);
        assert_eq!(metrics.devices[1].operation, "wbytes");
        assert_eq!(
            (metrics.devices[5].major, metrics.devices[5].value),
            (254, 4)
        );
    }

    #[test]
    fn a_living_cgroup_has_numbers_and_a_removed_one_an_error() {
        let mut own = Own::new("metrics");
        own.run("exec sleep 1000");
        while own.cgroup.pids().unwrap().is_empty() {
            std::thread::yield_now();
        }
        let metrics = own.cgroup.metrics().unwrap();
        assert_eq!(metrics.single("pids.current"), 1);
        // The kernel brings memory.stat up to date only every 2 s; a limit is there at once.
        assert!(metrics.single("memory.limit_in_bytes") > 0);
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(serde_json::from_str::<Metrics>(&json).unwrap(), metrics);
        let cgroup = own.cgroup.clone();
        drop(own);
        cgroup.metrics().unwrap_err();
    }
}
