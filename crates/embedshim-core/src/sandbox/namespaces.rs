//! The namespaces of a sandbox: made by a thread that enters them, sets them up, pins them and
//! ends; with a child's help where a thread cannot make them. Never enters a namespace with a
//! thread that goes on.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use exit_monitor::process::{Process, ProcessIdentity};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs, statfs};

use crate::failpoint;
use crate::sandbox::api::{CreateSandbox, Network, Processes};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::holder::{self, Base, Child, Plan};
use crate::sandbox::isolation::Isolation;
use crate::sandbox::place::Place;
use crate::sandbox::sysctls::{self, Sysctl};
use crate::sandbox::users::{self, Users};
use crate::user_namespace;

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);

/// What a sandbox's namespaces are made from.
pub(super) struct Making<'a> {
    pub(super) request: &'a CreateSandbox,
    pub(super) isolation: &'a Isolation,
    pub(super) place: &'a Place,
    pub(super) sysctls: &'a [Sysctl],
    /// Of a sandbox whose containers share their processes.
    pub(super) base: Option<&'a Base>,
    /// Notes the init process, so that it is ended if this daemon dies.
    pub(super) note: &'a (dyn Fn(ProcessIdentity) -> Result<(), SandboxError> + Sync),
}

/// Makes, sets up and pins them. Blocks until the thread has ended.
pub(super) fn make(making: &Making<'_>) -> Result<(), SandboxError> {
    let key = &making.request.key;
    // A thread of its own: one of a pool would take the next work into these namespaces.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("sandbox".into());
        let spawned = thread.spawn_scoped(scope, || making.within());
        let doing = "cannot start a thread for";
        let thread = spawned.map_err(failed(key, doing, Path::new("ns")))?;
        let panicked = |_| SandboxError::Internal("a thread panicked".into());
        thread.join().map_err(panicked)?
    })
}

impl Making<'_> {
    /// What the thread does.
    fn within(&self) -> Result<(), SandboxError> {
        let network = match &self.request.network {
            Network::Pod(path) => Some(self.enter_network(path)?),
            Network::Node => None,
        };
        if !self.isolation.needs_a_process() {
            let unshared = unshare(self.isolation.made());
            unshared.map_err(self.failed_at("cannot make namespaces for", "ns"))?;
            return self.set_up(Path::new("/proc/thread-self/ns"));
        }
        let child = self.start_child(network.as_ref())?;
        let namespaces = PathBuf::from(format!("/proc/{}/ns", child.pid()));
        if self.request.processes == Processes::Pod {
            self.keep(child.pid())?;
        }
        for name in self.isolation.pinned() {
            // The thread needs neither, and could not enter the first.
            if !matches!(name, "user" | "pid") {
                let path = namespaces.join(name);
                let entered =
                    File::open(&path).and_then(|file| Ok(setns(file, CloneFlags::empty())?));
                let doing = "cannot enter a namespace at";
                entered.map_err(failed::<io::Error>(&self.request.key, doing, &path))?;
            }
        }
        self.set_up(&namespaces)?;
        failpoint::step("before the child of a sandbox goes on");
        let released = child.release();
        released.map_err(self.failed_at("cannot start the init process of", "ns/pid"))
    }

    /// Gives this thread's namespaces what the pod asks for, and pins what is in `namespaces`.
    fn set_up(&self, namespaces: &Path) -> Result<(), SandboxError> {
        let key = &self.request.key;
        if self.isolation.has_network() && !self.request.hostname.is_empty() {
            let name = Path::new(&self.request.hostname);
            let set = nix::unistd::sethostname(name);
            set.map_err(failed(key, "cannot set the hostname", name))?;
        }
        for name in self.isolation.pinned() {
            failpoint::step("before a namespace is pinned");
            let pin = self.place.pin(name);
            let pinned = mount_at(&namespaces.join(name), &pin);
            pinned.map_err(failed::<io::Error>(key, "cannot pin a namespace at", &pin))?;
        }
        failpoint::step("after the namespaces were pinned");
        // At last: it may cost the thread its rights.
        sysctls::write(self.request, self.sysctls)
    }

    /// Joins the network namespace at `path`; anything else there is an error.
    fn enter_network(&self, path: &Path) -> Result<OwnedFd, SandboxError> {
        let entered = enter_network(path);
        let doing = "cannot enter the network";
        entered.map_err(failed::<io::Error>(&self.request.key, doing, path))
    }

    /// A process in namespaces of the pod's, which waits.
    fn start_child(&self, network: Option<&OwnedFd>) -> Result<Child, SandboxError> {
        let users = self.request.users.as_ref();
        let user_namespace = users
            .map(|users| user_namespace_of(users, network))
            .transpose();
        let user_namespace =
            user_namespace.map_err(self.failed_at("cannot have the user namespace", "ns/user"))?;
        let ids = users.map_or(users::unprivileged(), Users::unprivileged);
        let plan = Plan {
            users: user_namespace.as_ref().map(AsFd::as_fd),
            network: network.map(AsFd::as_fd),
            own: self.isolation.made(),
            init: self.base.map(|base| base.init(ids)),
        };
        failpoint::step("before the child of a sandbox is started");
        Child::start(&plan).map_err(self.failed_at("cannot make namespaces for", "ns"))
    }

    /// Notes an init process before it can outlive this daemon.
    fn keep(&self, pid: i32) -> Result<(), SandboxError> {
        let opened = Process::open(pid).map_err(io::Error::other);
        let process =
            opened.map_err(self.failed_at("cannot watch the init process of", "ns/pid"))?;
        (self.note)(process.identity())?;
        holder::settle(pid, &self.request.cgroup());
        Ok(())
    }

    fn failed_at<E: Into<io::Error>>(
        &self,
        doing: &'static str,
        what: &'static str,
    ) -> impl FnOnce(E) -> SandboxError {
        failed(&self.request.key, doing, Path::new(what))
    }
}

/// With a network of the pod's, that network's: the CRI has made it with this mapping.
fn user_namespace_of(users: &Users, network: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    if let Some(network) = network {
        return holder::owner_of(network.as_fd());
    }
    let [users, groups] = users.maps();
    user_namespace::make(&users, &groups)
}

fn enter_network(path: &Path) -> io::Result<OwnedFd> {
    // Opening a fifo must not wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if fstatfs(&file)?.filesystem_type() != NSFS {
        return Err(io::Error::other("it is no namespace"));
    }
    if file.metadata()?.ino() == fs::metadata("/proc/thread-self/ns/net")?.ino() {
        return Err(io::Error::other("it is the node's own network"));
    }
    setns(&file, CloneFlags::CLONE_NEWNET)?;
    Ok(file.into())
}

/// Mounts a namespace at `pin`.
fn mount_at(namespace: &Path, pin: &Path) -> io::Result<()> {
    File::create_new(pin)?;
    let none = None::<&str>;
    mount(Some(namespace), pin, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// Whether a namespace is pinned there.
pub(super) fn is_pinned(pin: &Path) -> bool {
    statfs(pin).is_ok_and(|found| found.filesystem_type() == NSFS)
}
