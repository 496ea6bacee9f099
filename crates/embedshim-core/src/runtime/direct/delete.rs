//! `delete` without a process of runc: of a container whose init has ended, and with it all that
//! ran in its pid namespace, cgroups and runc's directory are left. Owns that nothing but cgroups
//! is removed as such, and those first: as long as runc's directory is there, runc can do the rest.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use tracing::debug;

use super::state::State;
use crate::failpoint;
use crate::process::ProcessIdentity;

/// runc tries as often, with pauses that begin with this and double.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);
/// No container makes so many cgroups below its own: runc may try.
const MANY: usize = 10_000;

/// Removes what is left of a container whose `init` has ended; false if runc has to. Blocks on the
/// file system, for 150 ms if a cgroup is busy.
pub(super) fn delete(directory: &Path, id: &str, init: ProcessIdentity) -> bool {
    let state = State::read(directory, id, init);
    let Some(state) = state.filter(State::is_delete_plain) else {
        return false;
    };
    let paths: BTreeSet<&Path> = state.cgroups().values().map(PathBuf::as_path).collect();
    if !paths.iter().all(|path| is_cgroup_or_gone(path)) {
        return false;
    }
    failpoint::step("before the cgroups are removed");
    if let Err(error) = remove_cgroups(paths) {
        debug!(id, %error, "cannot remove a cgroup: calling the OCI runtime");
        return false;
    }
    failpoint::step("after the cgroups were removed");
    let removed = fs::remove_dir_all(directory);
    failpoint::step("after the runtime's directory was removed");
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            debug!(id, %error, "cannot remove the OCI runtime's directory: calling it");
            false
        }
        _ => true,
    }
}

/// Whether it is a cgroup and not the root of a hierarchy, or is not there any more.
fn is_cgroup_or_gone(path: &Path) -> bool {
    let mut parts = path.components();
    let is_plain = parts.next() == Some(Component::RootDir)
        && parts.all(|part| matches!(part, Component::Normal(_)));
    let Some(parent) = path.parent().filter(|_| is_plain) else {
        return false;
    };
    let (own, above) = match (fs::symlink_metadata(path), fs::symlink_metadata(parent)) {
        (Ok(own), Ok(above)) => (own, above),
        (Err(error), _) => return error.kind() == io::ErrorKind::NotFound,
        (_, Err(_)) => return false,
    };
    let kind = statfs(path).map(|found| found.filesystem_type());
    let is_in_cgroupfs =
        kind.is_ok_and(|kind| kind == CGROUP_SUPER_MAGIC || kind == CGROUP2_SUPER_MAGIC);
    // What is above the root of a hierarchy is on another file system.
    own.is_dir() && own.dev() == above.dev() && is_in_cgroupfs
}

/// Removes all of them, each with those below it. Processes that have just ended may hold one for a
/// moment.
fn remove_cgroups(mut paths: BTreeSet<&Path>) -> io::Result<()> {
    let mut pause = PAUSE;
    for attempt in 1..=ATTEMPTS {
        let mut last = Ok(());
        paths.retain(|path| match remove_tree(path) {
            Ok(()) => false,
            Err(error) => {
                last = Err(error);
                true
            }
        });
        if paths.is_empty() || attempt == ATTEMPTS {
            return last;
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    Ok(())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    if remove(path).is_ok() {
        return Ok(());
    }
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next) {
        let below = match fs::read_dir(directory) {
            Err(error) if is_gone(&error) => Vec::new(),
            entries => entries?.collect::<io::Result<Vec<_>>>()?,
        };
        let directories = below
            .iter()
            .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
        found.extend(directories.map(fs::DirEntry::path));
        next += 1;
        if found.len() > MANY {
            return Err(io::Error::other("it has too many cgroups below it"));
        }
    }
    // Those that were found last are the lowest.
    found
        .iter()
        .rev()
        .try_for_each(|directory| remove(directory))
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if !is_gone(&error) => Err(error),
        _ => Ok(()),
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// Some hierarchy, version 1 or 2, to make cgroups in.
    fn hierarchy() -> Option<PathBuf> {
        let candidates = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(PathBuf::from);
        let is_root = nix::unistd::geteuid().is_root();
        let usable = |path: &PathBuf| is_root && path.join("cgroup.procs").exists();
        let found = candidates.into_iter().find(usable);
        if found.is_none() {
            eprintln!("skipped, because no cgroups can be made here");
        }
        found
    }

    struct Own(PathBuf, Option<Child>);

    impl Own {
        fn new(hierarchy: &Path, name: &str) -> Self {
            let own = hierarchy.join(format!("embedshim-direct-{name}-{}", std::process::id()));
            fs::create_dir_all(own.join("below/deeper")).unwrap();
            fs::create_dir_all(own.join("beside")).unwrap();
            Self(own, None)
        }

        fn run_in(&mut self, directory: &str) {
            let child = self
                .1
                .insert(Command::new("sleep").arg("1000").spawn().unwrap());
            let procs = self.0.join(directory).join("cgroup.procs");
            fs::write(procs, child.id().to_string()).unwrap();
        }

        fn kill(&mut self) {
            if let Some(mut child) = self.1.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            self.kill();
            let _ = remove_cgroups(BTreeSet::from([self.0.as_path()]));
        }
    }

    #[test]
    fn cgroups_go_with_those_below_them_and_busy_ones_stay() {
        let Some(hierarchy) = hierarchy() else { return };
        let mut own = Own::new(&hierarchy, "tree");
        own.run_in("below/deeper");
        let path = own.0.clone();
        assert!(is_cgroup_or_gone(&path));
        let refused = remove_cgroups(BTreeSet::from([path.as_path()]));
        assert!(refused.is_err() && path.exists());
        own.kill();
        remove_cgroups(BTreeSet::from([path.as_path()])).unwrap();
        assert!(!path.exists());
        assert!(is_cgroup_or_gone(&path), "it is gone");
    }

    #[test]
    fn what_is_no_cgroup_of_a_container_is_not_touched() {
        let Some(hierarchy) = hierarchy() else { return };
        let own = Own::new(&hierarchy, "path");
        let elsewhere = tempfile::tempdir().unwrap();
        let link = elsewhere.path().join("link");
        std::os::unix::fs::symlink(&own.0, &link).unwrap();
        for path in [
            &hierarchy,
            &link,
            &elsewhere.path().to_owned(),
            &own.0.join("below/.."),
            &PathBuf::from("relative"),
            &PathBuf::from("/"),
        ] {
            assert!(!is_cgroup_or_gone(path), "{}", path.display());
        }
    }
}
