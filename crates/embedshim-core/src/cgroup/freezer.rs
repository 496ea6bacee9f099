//! The freezer of cgroup version 1, in which a frozen process takes no signal, not even SIGKILL.
//! Owns that one which was killed ends all the same. In version 2 the kernel sees to that by
//! itself.

use std::fs;
use std::path::{Path, PathBuf};

use super::Cgroup;
use crate::kernel_file;

const STATE: &str = "freezer.state";
const THAWED: &str = "THAWED";

impl Cgroup {
    /// Thaws it and all below it: what was killed there can end. Blocks.
    pub(crate) fn thaw(&self) {
        let mut to_visit: Vec<PathBuf> = self.freezer().map(Path::to_owned).into_iter().collect();
        while let Some(directory) = to_visit.pop() {
            if is_frozen(&directory) {
                // It is gone, or a cgroup above it is frozen, which stays as it is.
                let _ = fs::write(directory.join(STATE), THAWED);
            }
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let directories = entries.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
            to_visit.extend(directories.map(|entry| entry.path()));
        }
    }

    /// Takes a killed process out of the freezer if it is frozen there: it ends, and the others
    /// stay as they are. Blocks.
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
    kernel_file::read(directory.join(STATE)).is_ok_and(|state| state.trim() != THAWED)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    const ROOT: &str = "/sys/fs/cgroup/freezer";

    /// A cgroup with one below it and a process in each, gone when it is dropped.
    struct Two {
        directories: [PathBuf; 2],
        children: [Child; 2],
    }

    impl Two {
        fn new(name: &str) -> Self {
            let own = Path::new(ROOT).join(format!("embedshim-{name}-{}", std::process::id()));
            let directories = [own.clone(), own.join("below")];
            let children = directories.each_ref().map(|directory| {
                fs::create_dir_all(directory).unwrap();
                let child = Command::new("sleep").arg("1000").spawn().unwrap();
                fs::write(directory.join("cgroup.procs"), child.id().to_string()).unwrap();
                child
            });
            Self {
                directories,
                children,
            }
        }

        fn cgroup(&self) -> Cgroup {
            let freezer = ("freezer".to_owned(), self.directories[0].clone());
            Cgroup::V1(BTreeMap::from([freezer]))
        }

        fn freeze(&self) {
            for directory in &self.directories {
                fs::write(directory.join(STATE), "FROZEN").unwrap();
            }
        }

        fn ends(child: &mut Child) -> bool {
            let give_up = Instant::now() + Duration::from_secs(20);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > give_up {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            true
        }
    }

    impl Drop for Two {
        fn drop(&mut self) {
            self.cgroup().thaw();
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
            for directory in self.directories.iter().rev() {
                let _ = fs::remove_dir(directory);
            }
        }
    }

    fn has_freezer() -> bool {
        let is_there = Path::new(ROOT).is_dir();
        if !is_there {
            eprintln!("skipped, because there is no freezer of cgroup version 1");
        }
        is_there
    }

    #[test]
    fn what_was_killed_in_frozen_cgroups_ends_when_they_are_thawed() {
        if !has_freezer() {
            return;
        }
        let mut two = Two::new("thaw");
        two.freeze();
        for child in &mut two.children {
            child.kill().unwrap();
        }
        two.cgroup().thaw();
        assert!(two.children.iter_mut().all(Two::ends));
    }

    #[test]
    fn a_killed_process_is_taken_out_of_the_freezer_and_no_other() {
        if !has_freezer() {
            return;
        }
        let mut two = Two::new("release");
        two.freeze();
        let [other, killed] = &mut two.children;
        killed.kill().unwrap();
        let cgroup = Cgroup::V1(BTreeMap::from([(
            "freezer".to_owned(),
            two.directories[0].clone(),
        )]));
        cgroup.release_killed(i32::try_from(killed.id()).unwrap());
        assert!(Two::ends(killed));
        assert!(other.try_wait().unwrap().is_none());
        assert!(two.directories.iter().all(|directory| is_frozen(directory)));
    }
}
