//! [`HostRoot`]: whether a process is root in this process's own namespaces. Owns what of `/proc`
//! may be believed about a process that a container could have started; reads nothing that the
//! process says of itself.

use std::fs;
use std::path::{Path, PathBuf};

/// What a container's process cannot have in common with us, whatever it may do inside.
const NAMESPACES: [&str; 3] = ["ns/pid", "ns/user", "ns/mnt"];

/// Root in this process's own namespaces: what it says of itself can be believed, since it could do
/// as it likes anyway.
#[derive(Debug)]
pub struct HostRoot(Vec<PathBuf>);

impl HostRoot {
    /// Reads our namespaces; `None` if procfs does not tell them.
    pub fn find() -> Option<Self> {
        namespaces(Path::new("/proc/self")).map(Self)
    }

    /// Whether this process is its. Nothing of what is read here is the process's own word.
    pub fn owns(&self, pid: i32) -> bool {
        let process = PathBuf::from(format!("/proc/{pid}"));
        namespaces(&process).is_some_and(|its| its == self.0) && is_root(&process)
    }
}

fn namespaces(process: &Path) -> Option<Vec<PathBuf>> {
    let link = |namespace| fs::read_link(process.join(namespace)).ok();
    NAMESPACES.into_iter().map(link).collect()
}

/// All four of its user ids are 0.
fn is_root(process: &Path) -> bool {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.is_some_and(|uids| uids.split_whitespace().all(|uid| uid == "0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_with_a_mount_namespace_of_its_own_is_not_the_hosts() {
        let root = HostRoot::find().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        if !root.owns(own) {
            eprintln!("skipped, because this is not root");
            return;
        }
        let mut child = Command::new("unshare")
            .args(["--mount", "sleep", "1000"])
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while root.owns(pid) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let is_owned = root.owns(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_owned);
    }
}
