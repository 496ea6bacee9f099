//! What goes into and comes out of [`Sandboxes`](super::Sandboxes): plain data with checked names.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::cgroup::home;
use crate::id::SandboxKey;
use crate::sandbox::observer::{SandboxChange, SandboxObserver};
use crate::sandbox::users::Users;

/// The longest name of a machine that the kernel takes.
const MAX_HOSTNAME: usize = 64;

/// Where [`Sandboxes`](super::Sandboxes) work.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// A directory of our own, on tmpfs; that of the tasks.
    pub state_dir: PathBuf,
    /// Where containerd's CRI looks for a pod's files: its root directory.
    pub cri_root: PathBuf,
    /// Where it looks for a pod's shared memory: its state directory.
    pub cri_state: PathBuf,
    /// A pod with a network of its own may bind every port without a capability.
    pub unprivileged_ports: bool,
    /// The same for ICMP echo sockets.
    pub unprivileged_ping: bool,
    /// Hears of what becomes of sandboxes.
    pub observer: Option<Arc<dyn SandboxObserver>>,
}

impl SandboxConfig {
    /// Tells the observer.
    pub(super) fn tell(&self, key: &SandboxKey, change: SandboxChange) {
        if let Some(observer) = &self.observer {
            observer.changed(key, change);
        }
    }
}

/// Whether a pod has a namespace of its own or the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// One for all containers of the pod.
    Pod,
    /// The node's.
    Node,
}

/// A pod's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The network namespace that is pinned at this path, with a name of the machine of its own.
    Pod(PathBuf),
    /// The node's network and name.
    Node,
}

/// What a container's pid namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Processes {
    /// One for each container.
    Container,
    /// One for all containers of the pod, with an init process of its own.
    Pod,
    /// The node's.
    Node,
}

/// The lines of a pod's `/etc/resolv.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// The resolver's options.
    pub options: Vec<String>,
}

/// A request for a new sandbox.
#[derive(Clone, Debug)]
pub struct CreateSandbox {
    /// Its name.
    pub key: SandboxKey,
    /// What tells the pod from all others, attempts included: one that is ready excludes another.
    pub name: String,
    /// The machine's name; empty for the node's.
    pub hostname: String,
    /// Its network.
    pub network: Network,
    /// Its System V IPC, POSIX queues and `/dev/shm`.
    pub ipc: Reach,
    /// Its containers' processes.
    pub processes: Processes,
    /// The users of a user namespace of its own; `None` for the node's.
    pub users: Option<Users>,
    /// The cgroup that its containers' are below, as the CRI names it: a path or a slice of
    /// systemd's.
    pub cgroup_parent: String,
    /// How names are looked up; `None` for the node's way.
    pub dns: Option<Dns>,
    /// Kernel parameters of its own namespaces, by name.
    pub sysctls: BTreeMap<String, String>,
    /// Opaque to us: given back with the sandbox.
    pub labels: BTreeMap<String, String>,
}

impl CreateSandbox {
    /// The cgroup of its init process, if it has one.
    pub(super) fn cgroup(&self) -> PathBuf {
        home::path(&self.cgroup_parent, self.key.id.as_str())
    }

    /// Why this cannot be a sandbox's, if so.
    pub(super) fn fault(&self) -> Option<String> {
        let hostname = &self.hostname;
        if hostname.len() > MAX_HOSTNAME {
            return Some(format!(
                "the hostname has {} bytes, the kernel takes {MAX_HOSTNAME}",
                hostname.len()
            ));
        }
        if hostname.chars().any(char::is_control) {
            return Some(format!("hostname {hostname:?} has a control character"));
        }
        if let Network::Pod(path) = &self.network
            && !path.is_absolute()
        {
            let path = path.display();
            return Some(format!("netns_path {path} is not an absolute path"));
        }
        if let Some(fault) = self.users.as_ref().and_then(Users::fault) {
            return Some(fault);
        }
        let parts = Path::new(&self.cgroup_parent).components();
        if self.cgroup_parent.chars().any(char::is_control)
            || parts.into_iter().any(|part| part == Component::ParentDir)
        {
            let parent = &self.cgroup_parent;
            return Some(format!("cgroup_parent {parent:?} is no path of a cgroup"));
        }
        let dns = self.dns.iter();
        let mut words = dns.flat_map(|dns| [&dns.servers, &dns.searches, &dns.options].into_iter());
        let bad = words.find_map(|list| {
            let mut bad = list.iter().filter(|word| word.contains(char::is_control));
            bad.next()
        });
        bad.map(|word| format!("dns_config has {word:?}, with a control character"))
    }
}

/// When and how a sandbox ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// 0 after a stop, 137 if its init process was killed, 255 if its namespaces were lost.
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

impl Ended {
    /// At this moment.
    pub(super) fn now(code: u32) -> Self {
        let at = SystemTime::now();
        Self { code, at }
    }

    /// The same, as an observer hears it.
    pub(super) fn change(self) -> SandboxChange {
        let Self { code, at } = self;
        SandboxChange::Ended { code, at }
    }
}

/// A sandbox at one moment.
#[derive(Clone, Debug)]
pub struct SandboxSnapshot {
    /// When it was created.
    pub created_at: SystemTime,
    /// Whether containers can be started in it.
    pub is_ready: bool,
    /// How it ended, if it did.
    pub ended: Option<Ended>,
    /// The labels of its request.
    pub labels: BTreeMap<String, String>,
    /// Its network.
    pub network: Network,
}
