//! A pod's kernel parameters. Owns which of them are of namespaces that the pod has of its own, and
//! that no other is ever written.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

use crate::sandbox::api::{CreateSandbox, Network, Reach, SandboxConfig};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::users::Users;

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

/// What the names of a network namespace's begin with.
const NETWORK: &str = "/proc/sys/net/";

/// A kernel parameter's file, and its value.
pub(super) type Sysctl = (PathBuf, String);

/// Writes them for the namespaces of this thread, those of a network first. Where a user namespace
/// has the others, its root may write them and not the node's: the thread becomes that and stays
/// it. Blocks.
pub(super) fn write(request: &CreateSandbox, sysctls: &[Sysctl]) -> Result<(), SandboxError> {
    let is_of_network = |sysctl: &&Sysctl| sysctl.0.starts_with(NETWORK);
    let (network, other) = (
        sysctls.iter().filter(is_of_network),
        sysctls.iter().filter(|sysctl| !is_of_network(sysctl)),
    );
    let mut is_root = true;
    for (path, value) in network.chain(other) {
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let mut written = write_one(path, value);
        if is_root
            && written.as_ref().is_err_and(denied)
            && let Some((user, group)) = request.users.as_ref().and_then(Users::root)
        {
            is_root = false;
            written = become_root_of(user, group).and_then(|()| write_one(path, value));
        }
        let doing = "cannot set the kernel parameter";
        written.map_err(failed(&request.key, doing, path))?;
    }
    Ok(())
}

/// This thread alone.
fn become_root_of(user: u32, group: u32) -> io::Result<()> {
    let group = Gid::from_raw(group);
    set_thread_res_gid(group, group, group)?;
    let user = Uid::from_raw(user);
    Ok(set_thread_res_uid(user, user, user)?)
}

fn write_one(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    // In one write: the kernel takes each for a value.
    file.write_all(value.as_bytes())
}

/// The files of a pod's kernel parameters, with the defaults of the CRI's own controller. One that
/// is not of the pod's own namespaces is refused.
pub(super) fn of(
    config: &SandboxConfig,
    request: &CreateSandbox,
) -> Result<Vec<Sysctl>, SandboxError> {
    let has_network = matches!(request.network, Network::Pod(_));
    let mut all = BTreeMap::new();
    if has_network && config.unprivileged_ports {
        all.insert(
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "0".to_owned(),
        );
    }
    // In a user namespace of the pod's there is no such group of all.
    if has_network && config.unprivileged_ping && request.users.is_none() {
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
