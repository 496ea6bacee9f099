//! The namespaces of a sandbox: made by a thread that enters them, sets them up, pins them and
//! ends. Owns which kernel parameters are a pod's own; never enters a namespace with a thread that
//! goes on.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs, statfs};

use crate::failpoint;

use crate::sandbox::api::{CreateSandbox, Network, Reach, SandboxConfig};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::place::Place;

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);
/// Kernel parameters of an ipc namespace, beside all below `fs.mqueue.`.
const OF_IPC: [&str; 9] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.msg_next_id",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Makes, sets up and pins them. Blocks until the thread has ended.
pub(super) fn make(
    config: &SandboxConfig,
    request: &CreateSandbox,
    place: &Place,
) -> Result<(), SandboxError> {
    let sysctls = sysctls(config, request)?;
    let (request, place) = (request.clone(), place.clone());
    let key = request.key.clone();
    // A thread of its own: one of a pool would take the next work into these namespaces.
    let spawned = std::thread::Builder::new()
        .name("sandbox".into())
        .spawn(move || within(&request, &place, &sysctls));
    let thread = spawned.map_err(failed(&key, "cannot start a thread for", Path::new("ns")))?;
    let panicked = |_| SandboxError::Internal("a thread panicked".into());
    thread.join().map_err(panicked)?
}

/// What the thread does.
fn within(
    request: &CreateSandbox,
    place: &Place,
    sysctls: &[(PathBuf, String)],
) -> Result<(), SandboxError> {
    let key = &request.key;
    let mut own = Vec::new();
    if request.ipc == Reach::Pod {
        own.push((CloneFlags::CLONE_NEWIPC, "ipc"));
    }
    if let Network::Pod(path) = &request.network {
        own.push((CloneFlags::CLONE_NEWUTS, "uts"));
        enter_network(path).map_err(failed::<io::Error>(key, "cannot enter the network", path))?;
    }
    let flags = own.iter().map(|(flag, _)| *flag).collect();
    unshare(flags).map_err(failed(key, "cannot make namespaces for", Path::new("ns")))?;
    if matches!(request.network, Network::Pod(_)) && !request.hostname.is_empty() {
        let name = Path::new(&request.hostname);
        nix::unistd::sethostname(name).map_err(failed(key, "cannot set the hostname", name))?;
    }
    for (path, value) in sysctls {
        write_sysctl(path, value).map_err(failed(key, "cannot set the kernel parameter", path))?;
    }
    for (_, name) in own {
        failpoint::step("before a namespace is pinned");
        let pin = place.pin(name);
        pin_own(name, &pin).map_err(failed::<io::Error>(key, "cannot pin a namespace at", &pin))?;
    }
    failpoint::step("after the namespaces were pinned");
    Ok(())
}

/// Joins the network namespace at `path`; anything else there is an error.
fn enter_network(path: &Path) -> io::Result<()> {
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
    Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
}

/// Mounts this thread's namespace of that name at `pin`.
fn pin_own(name: &str, pin: &Path) -> io::Result<()> {
    File::create_new(pin)?;
    let own = Path::new("/proc/thread-self/ns").join(name);
    let none = None::<&str>;
    mount(Some(&own), pin, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// Whether a namespace is pinned there.
pub(super) fn is_pinned(pin: &Path) -> bool {
    statfs(pin).is_ok_and(|found| found.filesystem_type() == NSFS)
}

fn write_sysctl(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    // In one write: the kernel takes each for a value.
    file.write_all(value.as_bytes())
}

/// The files of a pod's kernel parameters, with the defaults of the CRI's own controller. One that
/// is not of the pod's own namespaces is refused.
fn sysctls(
    config: &SandboxConfig,
    request: &CreateSandbox,
) -> Result<Vec<(PathBuf, String)>, SandboxError> {
    let has_network = matches!(request.network, Network::Pod(_));
    let mut all = BTreeMap::new();
    if has_network && config.unprivileged_ports {
        all.insert(
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "0".to_owned(),
        );
    }
    if has_network && config.unprivileged_ping {
        all.insert(
            "net.ipv4.ping_group_range".to_owned(),
            "0 2147483647".to_owned(),
        );
    }
    for (name, value) in &request.sysctls {
        let is_own = match dotted(name) {
            Some(name) if name.starts_with("net.") => has_network,
            Some(name) => {
                request.ipc == Reach::Pod
                    && (OF_IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue."))
            }
            None => false,
        };
        let Some(dotted) = dotted(name).filter(|_| is_own) else {
            return Err(SandboxError::Invalid {
                key: request.key.clone(),
                why: format!("sysctl {name:?} is not of a namespace that the pod has of its own"),
            });
        };
        all.insert(dotted, value.clone());
    }
    // With slashes a component may have dots, as names of interfaces do: those are kept as they are
    // by writing the name's dots as slashes and its slashes as dots.
    let path = |name: &str| {
        let swapped = name.chars().map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        });
        Path::new("/proc/sys").join(swapped.collect::<String>())
    };
    Ok(all
        .into_iter()
        .map(|(name, value)| (path(&name), value))
        .collect())
}

/// The name in the form `net.ipv4.ip_forward`, where a slash stands for a dot within a component;
/// `None` if it is no name. In the other form, `net/ipv4/ip_forward`, the two are the other way
/// round: the first that occurs tells (sysctl.d(5)).
fn dotted(name: &str) -> Option<String> {
    let first = name.find(['.', '/'])?;
    let has_slashes = name.get(first..)?.starts_with('/');
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    let dotted: String = if has_slashes {
        name.chars().map(swap).collect()
    } else {
        name.to_owned()
    };
    let is_component = |part: &str| {
        let is_letter = |b: u8| b.is_ascii_alphanumeric() || b"_-/:@".contains(&b);
        !part.is_empty() && part.bytes().all(is_letter) && part != "/" && part != "//"
    };
    dotted.split('.').all(is_component).then_some(dotted)
}

/// The namespaces that a ready sandbox must have pinned.
pub(super) fn pins(network: &Network, ipc: Reach, place: &Place) -> Vec<PathBuf> {
    let uts = matches!(network, Network::Pod(_)).then(|| place.pin("uts"));
    let ipc = (ipc == Reach::Pod).then(|| place.pin("ipc"));
    uts.into_iter().chain(ipc).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_parameter_has_one_name() {
        let names = [
            ("net.ipv4.ip_forward", Some("net.ipv4.ip_forward")),
            ("net/ipv4/ip_forward", Some("net.ipv4.ip_forward")),
            ("net/ipv4/conf/eth0.5/mtu", Some("net.ipv4.conf.eth0/5.mtu")),
            ("net.ipv4.conf.eth0/5.mtu", Some("net.ipv4.conf.eth0/5.mtu")),
        ];
        for (name, expected) in names {
            assert_eq!(dotted(name).as_deref(), expected, "{name}");
        }
        for bad in [
            "",
            "net",
            "net..x",
            "net/../kernel/core_pattern",
            "net/./x",
            "net.//.kernel.core_pattern",
            "/net/x",
            "net.ipv4.",
            "net.a b",
            "net.x\0",
        ] {
            assert_eq!(dotted(bad), None, "{bad}");
        }
    }
}
