//! [`Place`]: the directory of one sandbox, its files for `/etc`, its shared memory, and the links
//! by which containerd's CRI finds them. Owns that nothing of the host is written through a link
//! that others made, and that everything of it can be removed at any step.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, readlinkat, symlinkat, unlinkat};
use tracing::warn;

use crate::failpoint;
use crate::id::SandboxKey;
use crate::mountinfo::read_mountinfo;
use crate::sandbox::api::{CreateSandbox, Dns, Reach, SandboxConfig};
use crate::sandbox::error::{SandboxError, failed};

/// Directory of the sandboxes below the state directory.
const PLACES: &str = "pods";
/// Directory of a pod's links below each of the CRI's directories.
const LINKS: &str = "sandboxes";
/// What containerd has beside each of the CRI's directories.
const NEIGHBOURS: [&str; 2] = [
    "io.containerd.metadata.v1.bolt",
    "io.containerd.runtime.v2.task",
];
const SHM: &str = "shm";
const NAMESPACES: &str = "ns";
const FILES: [&str; 3] = [HOSTNAME, HOSTS, RESOLV];
const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV: &str = "resolv.conf";
/// What is pinned below [`NAMESPACES`].
pub(super) const PINS: [&str; 4] = ["ipc", "uts", "user", "pid"];
/// 64 MiB, as the CRI's own controller gives, with the mode of `/tmp`.
const SHM_OPTIONS: &str = "mode=1777,size=67108864";
/// No more of a file of the host is copied.
const MAX_COPY: u64 = 1024 * 1024;

/// The directory of one sandbox, and where it is linked.
#[derive(Clone, Debug)]
pub(super) struct Place {
    key: SandboxKey,
    directory: PathBuf,
    /// The CRI's directories, each with the setting that names it.
    cri: [(&'static str, PathBuf); 2],
}

/// The directory of all places.
pub(super) fn places(state_dir: &Path) -> PathBuf {
    state_dir.join(PLACES)
}

/// Makes the directory of all places a private mount: what is mounted below it is in no other mount
/// namespace then, not even in those that follow the host's. Blocks on the file system.
pub(super) fn make_private(state_dir: &Path) -> io::Result<()> {
    let places = places(state_dir);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&places)?;
    let is_mount = read_mountinfo()?.iter().any(|mount| mount.path == places);
    let none = None::<&str>;
    if !is_mount {
        mount(Some(&places), &places, none, MsFlags::MS_BIND, none)?;
    }
    // Also after a daemon that was killed between the two.
    Ok(mount(none, &places, none, MsFlags::MS_PRIVATE, none)?)
}

impl Place {
    pub(super) fn new(config: &SandboxConfig, key: &SandboxKey) -> Self {
        let directory = places(&config.state_dir)
            .join(key.namespace.as_str())
            .join(key.id.as_str());
        Self {
            key: key.clone(),
            directory,
            cri: [
                ("cri_root", config.cri_root.clone()),
                ("cri_state", config.cri_state.clone()),
            ],
        }
    }

    /// Where a namespace of the sandbox is pinned.
    pub(super) fn pin(&self, namespace: &str) -> PathBuf {
        self.pins().join(namespace)
    }

    /// The directory of all of them.
    pub(super) fn pins(&self) -> PathBuf {
        self.directory.join(NAMESPACES)
    }

    /// Where in a container the files belong, and the shared memory of a pod that has its own; and
    /// where they are.
    pub(super) fn mounts(&self, ipc: Reach) -> Vec<(PathBuf, PathBuf)> {
        let file = |name: &str| (Path::new("/etc").join(name), self.directory.join(name));
        let memory = (PathBuf::from("/dev/shm"), self.directory.join(SHM));
        let memory = (ipc == Reach::Pod).then_some(memory);
        FILES.into_iter().map(file).chain(memory).collect()
    }

    /// Refuses directories that are not the CRI's: containers would silently lack their files. The
    /// CRI makes its own for the first pod with a pause container only; before that they are known
    /// by what containerd has beside them.
    pub(super) fn check_cri(&self) -> Result<(), SandboxError> {
        let is_there =
            |path: &Path, neighbour: &str| path.is_dir() || path.with_file_name(neighbour).is_dir();
        for ((setting, path), neighbour) in self.cri.iter().zip(NEIGHBOURS) {
            if !is_there(path, neighbour) {
                return Err(SandboxError::NotTheCri {
                    setting,
                    path: path.clone(),
                    neighbour,
                });
            }
        }
        Ok(())
    }

    /// Makes the directory with its files and the shared memory.
    pub(super) fn make_files(&self, request: &CreateSandbox) -> Result<(), SandboxError> {
        failpoint::step("before a sandbox's directory is made");
        let namespaces = self.pins();
        let make = |path: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(path)
        };
        make(&namespaces).map_err(failed(&self.key, "cannot make", &namespaces))?;
        let hostname = match request.hostname.as_str() {
            "" => nix::unistd::gethostname()
                .map_err(failed(&self.key, "cannot read the name of", Path::new("/")))?
                .to_string_lossy()
                .into_owned(),
            hostname => hostname.to_owned(),
        };
        self.write(HOSTNAME, format!("{hostname}\n").as_bytes())?;
        self.write(HOSTS, &self.copy_of("/etc/hosts")?)?;
        let resolv = request.dns.as_ref().map(resolv_conf).unwrap_or_default();
        if resolv.is_empty() {
            self.write(RESOLV, &self.copy_of("/etc/resolv.conf")?)?;
        } else {
            self.write(RESOLV, resolv.as_bytes())?;
        }
        if request.ipc == Reach::Pod {
            let shm = self.directory.join(SHM);
            make(&shm).map_err(failed(&self.key, "cannot make", &shm))?;
            failpoint::step("before a sandbox's shared memory is mounted");
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM_OPTIONS)).map_err(failed(
                &self.key,
                "cannot mount a tmpfs on",
                &shm,
            ))?;
        }
        failpoint::step("after a sandbox's files were made");
        Ok(())
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), SandboxError> {
        let path = self.directory.join(name);
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&path)?;
            // Every user of a container reads it, whatever the daemon's umask is.
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            file.write_all(content)
        };
        write().map_err(failed::<io::Error>(&self.key, "cannot write", &path))
    }

    /// A file of the host's; empty if the host has none.
    fn copy_of(&self, path: &str) -> Result<Vec<u8>, SandboxError> {
        let mut content = Vec::new();
        let read = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .and_then(|file| file.take(MAX_COPY).read_to_end(&mut content));
        match read {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(&self.key, "cannot read", Path::new(path))(error))
            }
            _ => Ok(content),
        }
    }

    /// Lets the CRI find the files. A name that is taken by anything else than our link is refused.
    pub(super) fn link(&self) -> Result<(), SandboxError> {
        for (_, cri) in &self.cri {
            failpoint::step("before a sandbox is linked");
            let at = cri.join(LINKS).join(self.key.id.as_str());
            let link = || {
                let links = open_links(cri, true)?;
                match symlinkat(&self.directory, &links, self.key.id.as_str()) {
                    Err(rustix::io::Errno::EXIST) if self.is_ours(&links) => Ok(()),
                    linked => Ok(linked?),
                }
            };
            link().map_err(failed::<io::Error>(&self.key, "cannot link", &at))?;
        }
        failpoint::step("after a sandbox was linked");
        Ok(())
    }

    fn is_ours(&self, links: &OwnedFd) -> bool {
        let target = readlinkat(links, self.key.id.as_str(), Vec::new());
        target
            .is_ok_and(|target| target.as_bytes() == self.directory.as_os_str().as_encoded_bytes())
    }

    /// Unmounts what keeps namespaces and memory. Repeatable.
    pub(super) fn release(&self) -> Result<(), SandboxError> {
        for path in PINS
            .map(|pin| self.pin(pin))
            .iter()
            .chain([&self.directory.join(SHM)])
        {
            failpoint::step("before a mount of a sandbox is removed");
            // More than once, if a daemon was killed between a mount and its record.
            while match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => true,
                // No mount point, or not there.
                Err(Errno::EINVAL | Errno::ENOENT) => false,
                Err(errno) => return Err(failed(&self.key, "cannot unmount", path)(errno)),
            } {}
        }
        Ok(())
    }

    /// Removes everything, whatever of it there is. Repeatable. Only what this module makes is
    /// removed: nothing is followed, and what others have put there is an error. Links that cannot
    /// be removed keep nothing else.
    pub(super) fn remove(&self) -> Result<(), SandboxError> {
        let unlinked = self.unlink();
        self.release()?;
        self.remove_files()?;
        unlinked
    }

    fn unlink(&self) -> Result<(), SandboxError> {
        for (_, cri) in &self.cri {
            failpoint::step("before a sandbox's link is removed");
            let at = cri.join(LINKS).join(self.key.id.as_str());
            let unlink = || {
                let links = match open_links(cri, false) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    links => links?,
                };
                if self.is_ours(&links) {
                    unlinkat(&links, self.key.id.as_str(), AtFlags::empty())?;
                }
                Ok(())
            };
            unlink().map_err(failed::<io::Error>(&self.key, "cannot unlink", &at))?;
        }
        Ok(())
    }

    fn remove_files(&self) -> Result<(), SandboxError> {
        failpoint::step("before a sandbox's files are removed");
        let namespaces = self.pins();
        let pins = PINS.map(|pin| self.pin(pin));
        let files = FILES.map(|file| self.directory.join(file));
        for file in pins.iter().chain(&files) {
            if_there(fs::remove_file(file)).map_err(failed(&self.key, "cannot remove", file))?;
        }
        for directory in [&namespaces, &self.directory.join(SHM), &self.directory] {
            if_there(fs::remove_dir(directory)).map_err(failed(
                &self.key,
                "cannot remove",
                directory,
            ))?;
        }
        Ok(())
    }
}

/// Removes the links of sandboxes that are not there (any more), as after a reboot; `is_known` says
/// of which id there is one. Blocks on the file system.
pub(super) fn remove_dangling(config: &SandboxConfig, is_known: impl Fn(&OsStr) -> bool) {
    let places = places(&config.state_dir);
    for cri in [&config.cri_root, &config.cri_state] {
        for entry in fs::read_dir(cri.join(LINKS))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if !is_known(&entry.file_name())
                && fs::read_link(&path).is_ok_and(|target| target.starts_with(&places))
                && let Err(error) = fs::remove_file(&path)
            {
                warn!(path = %path.display(), %error, "cannot remove the link of a sandbox that is gone");
            }
        }
    }
}

/// The directory of links in one of the CRI's directories; links on the way are not followed.
fn open_links(cri: &Path, make: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let there_already = |result: rustix::io::Result<()>| match result {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => result,
    };
    if make {
        there_already(rustix::fs::mkdir(cri, Mode::from_raw_mode(0o700)))?;
    }
    let cri = rustix::fs::open(cri, flags, Mode::empty())?;
    if make {
        there_already(mkdirat(&cri, LINKS, Mode::from_raw_mode(0o755)))?;
    }
    Ok(openat(
        &cri,
        LINKS,
        flags | OFlags::NOFOLLOW,
        Mode::empty(),
    )?)
}

fn if_there(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The text of a `resolv.conf`; empty if nothing is said.
fn resolv_conf(dns: &Dns) -> String {
    let line = |key: &str, words: &[String]| match words {
        [] => String::new(),
        words => format!("{key} {}\n", words.join(" ")),
    };
    let server = |server| line("nameserver", std::slice::from_ref(server));
    let servers: String = dns.servers.iter().map(server).collect();
    line("search", &dns.searches) + &servers + &line("options", &dns.options)
}
