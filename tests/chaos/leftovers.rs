//! What is left when everything has ended: nothing may be that was not there before the first life.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::bail;
use embedshim_tests::Footprint;
use testbed::sandbox::until;

use crate::daemon::Victim;
use crate::ground::Ground;

/// Directories of the state directory whose files belong to containers, connections or events that
/// are gone.
const DIRECTORIES: [&str; 6] = ["tasks", "connections", "events", "tty", "sandboxes", "pods"];

const OLD_LOG: &str = "embedshimd.log.1";

/// What was there before.
#[derive(Debug)]
pub(crate) struct Before {
    footprint: Footprint,
    own: Own,
    has_containerd: bool,
}

/// What daemon and keeper have for themselves.
#[derive(Debug)]
struct Own {
    files: BTreeMap<String, usize>,
    keeper: usize,
    daemon: usize,
}

impl Before {
    /// What is there now.
    pub(crate) fn look(ground: &Ground, has_containerd: bool) -> Self {
        Self {
            footprint: Footprint::of(&ground.sandbox()),
            own: Own::look(ground),
            has_containerd,
        }
    }

    /// Waits until all is as before.
    pub(crate) fn compare(&self, ground: &Ground) -> anyhow::Result<()> {
        self.compare_traces(ground)?;
        if !self.has_containerd {
            return self.own.compare(ground);
        }
        // With a bundle that it has forgotten it has a connection, too, which ends with it.
        ground.without_containerd(true, |_| self.own.compare(ground))
    }

    fn compare_traces(&self, ground: &Ground) -> anyhow::Result<()> {
        let sandbox = ground.sandbox();
        // containerd 1.6 never removes the bundle of a task that was deleted, or not yet created,
        // when it was itself ended: the shim tells of no task then, which it does not look for. Nor
        // does it remove a bundle that it had begun to remove, and had hidden for that by a dot.
        // What is ours of such a container must be gone like any other's.
        let forgotten: Vec<PathBuf> = ground
            .ledger
            .all_interrupted()
            .iter()
            .flat_map(|id| [sandbox.bundle(id), sandbox.bundle(&format!(".{id}"))])
            .collect();
        self.footprint.wait_for_return_except(&sandbox, &forgotten)
    }
}

impl Own {
    fn look(ground: &Ground) -> Self {
        Self {
            files: files(&ground.state_dir),
            keeper: ground.daemons.keeper().map_or(0, descriptors),
            daemon: ground.daemons.current().map_or(0, descriptors),
        }
    }

    fn compare(&self, ground: &Ground) -> anyhow::Result<()> {
        let mut left = Vec::new();
        let returned = until("files and descriptors are gone", || {
            left = self.left(&Self::look(ground));
            Ok(left.is_empty())
        });
        if returned.is_err() {
            bail!("left behind: {}", left.join(", "));
        }
        Ok(())
    }

    fn left(&self, now: &Self) -> Vec<String> {
        let mut left = Vec::new();
        for (name, count) in &now.files {
            let before = self.files.get(name).copied().unwrap_or(0);
            if *count > before {
                left.push(format!("{count} files in {name}, before: {before}"));
            }
        }
        for (who, before, now) in [
            ("keeper", self.keeper, now.keeper),
            ("daemon", self.daemon, now.daemon),
        ] {
            if now > before {
                left.push(format!("{now} descriptors of the {who}, before: {before}"));
            }
        }
        left
    }
}

/// The number of descriptors of a process, except of our own connections for probing, which come
/// and go.
fn descriptors(process: Victim) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.pid)).map_or(0, Iterator::count)
}

/// The number of files in each directory, and in the state directory itself.
fn files(state_dir: &Path) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for directory in DIRECTORIES {
        counts.insert(directory.to_owned(), count(&state_dir.join(directory)));
    }
    let entries = fs::read_dir(state_dir).into_iter().flatten().flatten();
    // The log has one predecessor, from its first 4 MiB on.
    let others = entries.filter(|entry| entry.file_name() != OLD_LOG);
    counts.insert("the state directory".into(), others.count());
    counts
}

fn count(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count(&entry.path()),
            _ => 1,
        })
        .sum()
}
