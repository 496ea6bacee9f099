//! Cgroups of containers: which processes are in them, what they use, and whether the kernel killed
//! for memory. Owns where a container's cgroup is, on v1, v2 and hybrid machines; never creates or
//! configures a container's, the runtime does.

mod freezer;
mod hierarchies;
pub(crate) mod home;
mod metrics;
mod oom;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub use metrics::{DeviceCounter, Metrics};
pub(crate) use oom::OomWatcher;

use crate::kernel_file;
use crate::mountinfo::MountPoint;

/// The v1 controllers whose cgroups are worth asking for a container's processes, best first.
const FOR_PROCESSES: [&str; 5] = ["pids", "memory", "devices", "freezer", "cpu"];
/// Where the mounts are told of.
const MOUNTS: &str = "/proc/self/mountinfo";
/// How long processes may take to die.
const KILL: Duration = Duration::from_secs(2);
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// The cgroup of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Cgroup {
    /// One directory per controller.
    V1(BTreeMap<String, PathBuf>),
    /// The one directory.
    V2(PathBuf),
}

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CgroupError {
    /// A file of the kernel's.
    #[error("cannot read {path}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process is in no cgroup that says anything about it.
    #[error("process {pid} is in no cgroup of a known controller")]
    None {
        /// Which.
        pid: i32,
    },
    /// The container runs in the cgroup of the daemon or of the whole machine, so what is in it is
    /// not the container.
    #[error("process {pid} shares the cgroup {path} with others", path = .path.display())]
    Shared {
        /// Which.
        pid: i32,
        /// Whose.
        path: PathBuf,
    },
}

impl Cgroup {
    /// Finds the cgroup of a container by its init. Blocks on procfs.
    pub(crate) fn of_process(pid: i32) -> Result<Self, CgroupError> {
        let (found, mounts) = Self::find(pid)?;
        let own = Self::at("self", &mounts)?;
        let directory = found.directory().ok_or(CgroupError::None { pid })?;
        let is_root = mounts.iter().any(|mount| mount.path == directory);
        if is_root || own.as_ref().and_then(Self::directory) == Some(directory) {
            return Err(CgroupError::Shared {
                pid,
                path: directory.to_owned(),
            });
        }
        Ok(found)
    }

    /// The cgroup that a process is in, perhaps with others.
    fn containing(pid: i32) -> Result<Self, CgroupError> {
        Self::find(pid).map(|(found, _)| found)
    }

    /// By the mounts that are known; if it is not there, by those of now.
    fn find(pid: i32) -> Result<(Self, Arc<[MountPoint]>), CgroupError> {
        let process = pid.to_string();
        let is_there = |found: &Self| found.directory().is_some_and(Path::is_dir);
        let mounts = Self::read(MOUNTS, |_| hierarchies::known())?;
        if let Some(found) = Self::at(&process, &mounts)?.filter(is_there) {
            return Ok((found, mounts));
        }
        let mounts = Self::read(MOUNTS, |_| hierarchies::read())?;
        let found = Self::at(&process, &mounts)?.ok_or(CgroupError::None { pid })?;
        Ok((found, mounts))
    }

    fn at(process: &str, mounts: &[MountPoint]) -> Result<Option<Self>, CgroupError> {
        let text = Self::read(&format!("/proc/{process}/cgroup"), |path| {
            kernel_file::read(path)
        })?;
        Ok(locate(&text, mounts))
    }

    fn read<T>(path: &str, read: impl FnOnce(&str) -> io::Result<T>) -> Result<T, CgroupError> {
        read(path).map_err(|source| CgroupError::Read {
            path: path.into(),
            source,
        })
    }

    /// The directory that lists its processes, for people.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        self.directory().map(Path::to_owned)
    }

    /// The memory that is charged to it; `None` where that is not counted. Blocks on the cgroup
    /// file system.
    pub(crate) fn memory_used(&self) -> Option<u64> {
        let file = match self {
            Self::V1(controllers) => controllers.get("memory")?.join("memory.usage_in_bytes"),
            Self::V2(path) => path.join("memory.current"),
        };
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// The directory that lists its processes.
    fn directory(&self) -> Option<&Path> {
        match self {
            Self::V1(controllers) => FOR_PROCESSES
                .iter()
                .find_map(|controller| controllers.get(*controller))
                .map(PathBuf::as_path),
            Self::V2(path) => Some(path),
        }
    }

    /// The processes in it and below it; none if it is gone. Blocks on the cgroup file system.
    pub(crate) fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut to_visit: Vec<PathBuf> = self.directory().map(Path::to_owned).into_iter().collect();
        while let Some(directory) = to_visit.pop() {
            match kernel_file::read(directory.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                Err(e) if is_gone(&e) => continue,
                // A threaded v2 cgroup has no list of processes; those are in its parent's.
                Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
                Err(e) => return Err(e),
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            to_visit.extend(
                entries
                    .flatten()
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path()),
            );
        }
        // 0 is a process of another pid namespace.
        pids.retain(|&pid| pid > 0);
        Ok(pids)
    }

    /// Kills everything in it and below it, and waits until it is empty, for at most 2 s. Blocks.
    pub(crate) fn kill_all(&self) -> io::Result<()> {
        if let Self::V2(path) = self {
            // Atomic, since Linux 5.14.
            let _ = fs::write(path.join("cgroup.kill"), "1");
        }
        let give_up = Instant::now() + KILL;
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids {
                // A number read from the cgroup this instant; on v1 there is nothing better.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            self.thaw();
            if Instant::now() >= give_up {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "its processes do not die",
                ));
            }
            std::thread::sleep(KILL_PAUSE);
        }
    }

    /// Removes what a runtime that was killed has left of a cgroup at `path`, from the root of each
    /// hierarchy. Only what is empty, or will be within 2 s: the runtime's own process ends when it
    /// finds itself alone. Blocks.
    pub(crate) fn remove_left(path: &Path) -> io::Result<()> {
        let mounts = hierarchies::known()?;
        let give_up = Instant::now() + KILL;
        for mount in mounts.iter() {
            let Some(directory) = below(mount, path).filter(|found| *found != mount.path) else {
                continue;
            };
            while let Err(error) = fs::remove_dir(&directory) {
                if is_gone(&error) {
                    break;
                }
                let is_busy = error.raw_os_error() == Some(Errno::EBUSY as i32);
                if !is_busy || Instant::now() >= give_up {
                    return Err(error);
                }
                std::thread::sleep(KILL_PAUSE);
            }
        }
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

/// `/proc/PID/cgroup` has a line `number:controllers:path` for each hierarchy; v2's has no
/// controllers. On hybrid machines the v1 controllers do the work and v2's hierarchy is empty.
///
/// A hierarchy can be mounted several times: CRIU mounts all of them in a directory of its own
/// while it restores a container, for everyone to see. The oldest mount, which comes first, is the
/// machine's.
fn locate(text: &str, mounts: &[MountPoint]) -> Option<Cgroup> {
    let mut controllers = BTreeMap::new();
    let mut unified = None;
    let mut v1: HashMap<&str, Vec<&MountPoint>> = HashMap::new();
    for mount in mounts.iter().filter(|mount| mount.kind == "cgroup") {
        for option in &mount.options {
            v1.entry(option).or_default().push(mount);
        }
    }
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(names), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        if names.is_empty() {
            unified = mounts
                .iter()
                .filter(|mount| mount.kind == "cgroup2")
                .find_map(|mount| below(mount, path.as_ref()));
        }
        for name in names
            .split(',')
            .filter(|name| !name.is_empty() && !name.starts_with("name="))
        {
            let mut mounts = v1.get(name).into_iter().flatten();
            if let Some(directory) = mounts.find_map(|mount| below(mount, path.as_ref())) {
                controllers.insert(name.to_owned(), directory);
            }
        }
    }
    let found = Cgroup::V1(controllers);
    if found.directory().is_some() {
        Some(found)
    } else {
        unified.map(Cgroup::V2)
    }
}

/// A cgroup path at this mount of its hierarchy, which may show only a part of it.
fn below(mount: &MountPoint, path: &Path) -> Option<PathBuf> {
    let relative = path.strip_prefix(&mount.root).ok()?;
    // A cgroup outside our cgroup namespace has a path with "..": it can't be reached from here.
    let is_inside = relative
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    is_inside.then(|| {
        if relative.as_os_str().is_empty() {
            mount.path.clone()
        } else {
            mount.path.join(relative)
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A v1 cgroup of the test in the given controllers, removed with everything in it.
    pub(crate) struct Own {
        pub(crate) cgroup: Cgroup,
        child: Option<Child>,
    }

    impl Own {
        pub(crate) fn new(name: &str) -> Self {
            let name = format!("embedshim-test-{name}-{}", std::process::id());
            let mounts = hierarchies::read().unwrap();
            let mut controllers = BTreeMap::new();
            for controller in ["pids", "memory"] {
                let mount = mounts
                    .iter()
                    .find(|m| m.kind == "cgroup" && m.options.iter().any(|o| o == controller));
                let mount = mount.unwrap_or_else(|| {
                    panic!("this test needs the cgroup v1 controller {controller}")
                });
                let directory = mount.path.join(&name);
                fs::create_dir_all(&directory).unwrap();
                controllers.insert(controller.to_owned(), directory);
            }
            Self {
                cgroup: Cgroup::V1(controllers),
                child: None,
            }
        }

        pub(crate) fn path(&self, controller: &str) -> &Path {
            let Cgroup::V1(controllers) = &self.cgroup else {
                unreachable!()
            };
            &controllers[controller]
        }

        /// Runs a shell script in it.
        pub(crate) fn run(&mut self, script: &str) -> i32 {
            let enter = ["pids", "memory"]
                .map(|c| format!("echo $$ > {}/cgroup.procs", self.path(c).display()));
            let script = format!("{} && {script}", enter.join(" && "));
            let child = self
                .child
                .insert(Command::new("sh").args(["-c", &script]).spawn().unwrap());
            i32::try_from(child.id()).unwrap()
        }

        pub(crate) fn wait(&mut self) {
            if let Some(mut child) = self.child.take() {
                let _ = child.wait();
            }
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            if let Some(child) = &mut self.child {
                let _ = child.kill();
            }
            self.wait();
            let _ = self.cgroup.kill_all();
            let Cgroup::V1(controllers) = &self.cgroup else {
                return;
            };
            for directory in controllers.values() {
                let _ = fs::remove_dir(directory);
            }
        }
    }

    fn mount(kind: &str, root: &str, path: &str, options: &str) -> MountPoint {
        let options = options.split(',').map(str::to_owned).collect();
        MountPoint {
            root: root.into(),
            path: path.into(),
            kind: kind.into(),
            options,
        }
    }

    #[test]
    fn hybrid_machines_count_by_v1_and_pure_ones_by_v2() {
        let hybrid = [
            mount("cgroup2", "/", "/c/unified", "rw"),
            mount("cgroup", "/", "/c/cpu,cpuacct", "rw,cpu,cpuacct"),
            mount("cgroup", "/part", "/c/memory", "rw,memory"),
        ];
        let text = "5:memory:/part/a\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/a\n";
        let Some(Cgroup::V1(found)) = locate(text, &hybrid) else {
            panic!("not v1")
        };
        assert_eq!(found["cpuacct"], Path::new("/c/cpu,cpuacct/a"));
        assert_eq!(found["memory"], Path::new("/c/memory/a"));
        let pure = [mount("cgroup2", "/", "/sys/fs/cgroup", "rw")];
        assert_eq!(
            locate("0::/k/a\n", &pure),
            Some(Cgroup::V2("/sys/fs/cgroup/k/a".into()))
        );
        assert_eq!(locate("0::/../a\n", &pure), None);
    }

    #[test]
    fn a_hierarchy_that_is_mounted_twice_is_used_where_it_was_mounted_first() {
        let twice = [
            mount("cgroup", "/", "/c/memory", "rw,memory"),
            mount("cgroup2", "/", "/c/unified", "rw"),
            mount("cgroup", "/", "/b/.criu.cgyard/memory", "rw,memory"),
            mount("cgroup2", "/", "/b/.criu.cgyard/unified", "rw"),
        ];
        let Some(Cgroup::V1(found)) = locate("5:memory:/a\n0::/a\n", &twice) else {
            panic!("not v1")
        };
        assert_eq!(found["memory"], Path::new("/c/memory/a"));
        let pure = &twice[1..2];
        let again = [pure[0].clone(), twice[3].clone()];
        let expected = Some(Cgroup::V2("/c/unified/a".into()));
        assert_eq!(locate("0::/a\n", pure), expected);
        assert_eq!(locate("0::/a\n", &again), expected);
    }

    #[test]
    fn a_shared_cgroup_is_nobodys() {
        let error = Cgroup::of_process(i32::try_from(std::process::id()).unwrap()).unwrap_err();
        assert!(matches!(error, CgroupError::Shared { .. }), "{error}");
    }

    #[test]
    fn processes_in_sub_cgroups_are_found_and_killed() {
        let mut own = Own::new("kill");
        let pid = own.run("exec sleep 1000");
        while own.cgroup.pids().unwrap() != [pid] {
            std::thread::yield_now();
        }
        assert_eq!(
            Cgroup::of_process(pid).unwrap().directory(),
            own.cgroup.directory()
        );
        let sub = own.path("pids").join("sub");
        fs::create_dir_all(&sub).unwrap();
        fs::write(sub.join("cgroup.procs"), pid.to_string()).unwrap();
        assert_eq!(own.cgroup.pids().unwrap(), [pid]);
        let killing = own.cgroup.clone();
        let killer = std::thread::spawn(move || killing.kill_all());
        own.wait();
        killer.join().unwrap().unwrap();
        assert!(own.cgroup.pids().unwrap().is_empty());
        fs::remove_dir(sub).unwrap();
    }
}
