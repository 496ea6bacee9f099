//! [`Footprint`]: everything that containers of a sandbox have on the machine at one moment. What
//! is there afterwards and was not before has been left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use testbed::sandbox::{Sandbox, until};

/// Mounts, cgroups, runtime state, bundles, records, the daemon's descriptors, and its and its
/// keeper's children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    traces: BTreeSet<String>,
    descriptors: Vec<String>,
}

impl Footprint {
    /// The footprint now.
    pub fn of(sandbox: &Sandbox) -> Self {
        let mut traces = BTreeSet::new();
        let prefix = sandbox.directory().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let targets = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|target| target.starts_with(&prefix));
        traces.extend(targets.map(|target| format!("mount {target}")));
        let root = Path::new("/sys/fs/cgroup");
        // Of version 1 each has its directory; version 2, where it is alone, is the root itself.
        for hierarchy in entries(root).into_iter().chain([root.to_owned()]) {
            let cgroups = entries(&hierarchy.join(sandbox.namespace()))
                .into_iter()
                .filter(|path| path.is_dir());
            traces.extend(cgroups.map(|cgroup| format!("cgroup {}", cgroup.display())));
        }
        let directories = [
            Path::new("/run/containerd/runc").join(sandbox.namespace()),
            sandbox
                .bundle("x")
                .parent()
                .unwrap_or(Path::new("/nonexistent"))
                .to_owned(),
            sandbox.state_dir().join("tasks"),
            sandbox.state_dir().join("sandboxes"),
            sandbox.state_dir().join("pods/k8s.io"),
            sandbox
                .directory()
                .join("root/io.containerd.grpc.v1.cri/sandboxes"),
            sandbox
                .directory()
                .join("state/io.containerd.grpc.v1.cri/sandboxes"),
        ];
        for directory in directories {
            traces.extend(
                entries(&directory)
                    .iter()
                    .map(|path| format!("file {}", path.display())),
            );
        }
        let daemon = sandbox.daemon_pid();
        let keeper = sandbox.keeper_pid();
        // The children of a daemon that has ended are the keeper's.
        for parent in daemon.into_iter().chain(keeper) {
            let path = format!("/proc/{parent}/task/{parent}/children");
            let children = fs::read_to_string(path).unwrap_or_default();
            let others = children
                .split_whitespace()
                .filter(|child| child.parse().ok() != daemon);
            traces.extend(others.map(|child| format!("child {child}")));
        }
        let descriptors = daemon.map(descriptors).unwrap_or_default();
        Self {
            traces,
            descriptors,
        }
    }

    /// Waits until nothing is left that was not there before. The daemon's descriptors may be
    /// fewer, not more.
    pub fn wait_for_return(&self, sandbox: &Sandbox) -> anyhow::Result<()> {
        self.wait_for_return_except(sandbox, &[])
    }

    /// The same, but these may stay.
    pub fn wait_for_return_except(
        &self,
        sandbox: &Sandbox,
        excepted: &[PathBuf],
    ) -> anyhow::Result<()> {
        let excepted: BTreeSet<String> = excepted
            .iter()
            .map(|path| format!("file {}", path.display()))
            .collect();
        let mut last = Vec::new();
        let returned = until("everything is gone", || {
            let now = Self::of(sandbox);
            let left = now.traces.difference(&self.traces);
            last = left
                .filter(|trace| !excepted.contains(*trace))
                .cloned()
                .collect();
            if now.descriptors.len() > self.descriptors.len() {
                last.push(format!(
                    "descriptors: {:?}, before: {:?}",
                    now.descriptors, self.descriptors
                ));
            }
            Ok(last.is_empty())
        });
        if returned.is_err() {
            bail!("left behind: {}", last.join(", "));
        }
        returned.context("footprint")
    }
}

/// What the daemon's descriptors point to. Connections of our own probing come and go, with their
/// journals, and are not counted.
fn descriptors(pid: i32) -> Vec<String> {
    let links = entries(Path::new(&format!("/proc/{pid}/fd")));
    let targets = links.iter().filter_map(|link| fs::read_link(link).ok());
    targets
        .map(|target| target.display().to_string())
        .filter(|target| !target.starts_with("socket:") && !target.contains("/es/connections/"))
        .collect()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}
