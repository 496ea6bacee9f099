//! The freezer of cgroup version 1, in which a frozen process takes no signal, not even SIGKILL. Owns
//! that one which was killed ends all the same. In version 2 the kernel sees to that by itself.

use std::fs;
use std::path::{Path, PathBuf};

use super::Cgroup;

const STATE: &str = "freezer.state";
const THAWED: &str = "THAWED";

impl Cgroup {
    /// Thaws it and all below it: what was killed there can end. Blocks.
    pub(crate) fn thaw(&self) {
        let mut to_visit: Vec<PathBuf> = self.freezer().map(Path::to_owned).into_iter().collect();
        while let Some(directory) = to_visit.pop() {
            if is_frozen(&directory) {
                // It is gone, or a cgroup above it is frozen, which is not ours.
                let _ = fs::write(directory.join(STATE), THAWED);
            }
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let directories = entries.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
            to_visit.extend(directories.map(|entry| entry.path()));
        }
    }

    /// Takes a killed process out of the freezer if it is frozen there: it ends, and the others stay as
    /// they are. Blocks.
    pub(crate) fn release_killed(&self, pid: i32) {
        let Some(freezer) = self.freezer() else {
            return;
        };
        let own = Self::containing(pid).ok();
        let own = own.as_ref().and_then(Self::freezer);
        if !own.is_some_and(|own| own.starts_with(freezer) && is_frozen(own)) {
            return;
        }
        // The root of the hierarchy has no state.
        let mut above = freezer.ancestors().skip(1);
        if let Some(target) = above.find(|directory| !is_frozen(directory)) {
            // It has ended meanwhile, perhaps.
            let _ = fs::write(target.join("cgroup.procs"), pid.to_string());
        }
    }

    fn freezer(&self) -> Option<&Path> {
        match self {
            Self::V1(controllers) => controllers.get("freezer").map(PathBuf::as_path),
            Self::V2(_) => None,
        }
    }
}

/// Frozen or about to be, by itself or by a cgroup above it.
fn is_frozen(directory: &Path) -> bool {
    fs::read_to_string(directory.join(STATE)).is_ok_and(|state| state.trim() != THAWED)
}
