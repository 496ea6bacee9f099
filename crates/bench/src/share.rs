//! One share of the processors for the bench and for whatever it starts: a cgroup of version 1, in
//! which the kernel makes no groups of sessions (autogroup). Otherwise a daemon, in a session of
//! its own, gets a share that others have to divide, or waits for a turn that others do not give
//! up, and ratios are those of sessions on a busy machine.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

const HIERARCHY: &str = "/sys/fs/cgroup/cpu";
const PROCESSES: &str = "cgroup.procs";

/// Enters the cgroup; before any thread or process is started.
pub(crate) fn take() -> anyhow::Result<()> {
    let hierarchy = Path::new(HIERARCHY);
    ensure!(
        hierarchy.join(PROCESSES).exists(),
        "there is no {HIERARCHY}"
    );
    let own = hierarchy.join(env!("CARGO_PKG_NAME"));
    fs::create_dir_all(&own).with_context(|| own.display().to_string())?;
    enter(&own)
}

/// Leaves it, and removes it if nothing is left in it.
pub(crate) fn give_back() {
    let hierarchy = Path::new(HIERARCHY);
    if enter(hierarchy).is_ok() {
        let _ = fs::remove_dir(hierarchy.join(env!("CARGO_PKG_NAME")));
    }
}

fn enter(cgroup: &Path) -> anyhow::Result<()> {
    let file = cgroup.join(PROCESSES);
    fs::write(&file, std::process::id().to_string()).with_context(|| file.display().to_string())
}
