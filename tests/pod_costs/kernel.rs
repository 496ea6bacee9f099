//! [`KernelMemory`]: what the kernel has allocated for everything that this process starts, and for
//! the pods of a sandbox. Owns the memory cgroup in which all of that is counted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Where the memory controller is, with cgroup v1 and v2.
const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A memory cgroup that this process is in, and so is what it starts.
pub(crate) struct KernelMemory {
    own: PathBuf,
    root: &'static Path,
}

impl KernelMemory {
    /// Makes the cgroup, and moves this process there.
    pub(crate) fn begin() -> anyhow::Result<Self> {
        let root = Path::new(if Path::new(V1).exists() { V1 } else { V2 });
        let own = root.join(format!("pod-costs-{}", std::process::id()));
        fs::create_dir(&own).with_context(|| own.display().to_string())?;
        let memory = Self { own, root };
        move_to(&memory.own)?;
        Ok(memory)
    }

    /// Kilobytes, with those of the cgroup `pods`, which need not exist yet.
    pub(crate) fn kilobytes(&self, pods: &str) -> anyhow::Result<f64> {
        let own = charged(&self.own).context("the kernel does not count its memory by cgroups")?;
        Ok(own + charged(&self.root.join(pods)).unwrap_or_default())
    }
}

impl Drop for KernelMemory {
    fn drop(&mut self) {
        let left = move_to(self.root).and_then(|()| Ok(fs::remove_dir(&self.own)?));
        if let Err(error) = left {
            eprintln!("{} is left: {error:#}", self.own.display());
        }
    }
}

fn move_to(cgroup: &Path) -> anyhow::Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string()).with_context(|| file.display().to_string())
}

/// What the kernel has allocated for the processes of a cgroup and of those below it.
fn charged(cgroup: &Path) -> Option<f64> {
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).ok();
    let bytes: f64 = match read("memory.kmem.usage_in_bytes") {
        Some(text) => text.trim().parse().ok()?,
        None => read("memory.stat")?
            .lines()
            .find_map(|line| line.strip_prefix("kernel "))?
            .parse()
            .ok()?,
    };
    Some(bytes / 1024.0)
}
