//! The way of a container into its sandbox: containerd writes `/proc/PID/ns/NAME` of the sandbox's
//! process into the container's spec. A sandbox of embedshim has no process, and its PID is 0. Owns
//! what becomes of these paths. What is not rewritten fails in the OCI runtime: the kernel has no
//! `/proc/0`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::sandbox::api::{Network, Processes, Reach};
use crate::sandbox::isolation::Isolation;

/// Where containerd thinks that the namespaces of process 0 are.
const NO_PROCESS: &str = "/proc/0/";
const SPEC: &str = "config.json";
/// A spec of more than this is no spec.
const MAX_SPEC: u64 = 16 * 1024 * 1024;

/// What containers of a sandbox join.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) isolation: Isolation,
    /// The directory in which the sandbox's own namespaces are pinned.
    pub(super) pins: PathBuf,
}

/// The specification of a sandbox: see [`super::Sandboxes::spec`]. `mounts` are what is mounted
/// where, and from where.
pub(super) fn of_sandbox(shared: &Shared, mounts: &[(PathBuf, PathBuf)]) -> Value {
    let all = ["user", "network", "ipc", "uts", "pid"].into_iter();
    let named = all.filter_map(|kind| {
        let path = path_of(kind, shared).ok()??;
        Some(json!({"type": kind, "path": path.to_string_lossy()}))
    });
    let is_alone = shared.isolation.processes == Processes::Container;
    let own_pid = is_alone.then(|| json!({"type": "pid"}));
    let namespaces: Vec<Value> = named.chain(own_pid).collect();
    let mount = |(destination, source): &(PathBuf, PathBuf)| {
        json!({
            "destination": destination.to_string_lossy(),
            "type": "bind",
            "source": source.to_string_lossy(),
            "options": ["rbind", "rprivate"],
        })
    };
    json!({
        "ociVersion": "1.0.2",
        "mounts": mounts.iter().map(mount).collect::<Vec<Value>>(),
        "linux": {"namespaces": namespaces},
    })
}

/// Replaces the paths in a bundle's spec. Repeatable. Blocks on the file system.
pub(super) fn rewrite_bundle(bundle: &Path, shared: &Shared) -> io::Result<()> {
    let path = bundle.join(SPEC);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&path)?;
    let mode = file.metadata()?.permissions();
    let mut text = Vec::new();
    file.take(MAX_SPEC).read_to_end(&mut text)?;
    let mut spec: Value = serde_json::from_slice(&text)?;
    if !rewrite(&mut spec, shared).map_err(io::Error::other)? {
        return Ok(());
    }
    let draft = bundle.join(format!(".{SPEC}.draft"));
    let _ = fs::remove_file(&draft);
    let write = || {
        let mut file = File::create_new(&draft)?;
        file.set_permissions(mode)?;
        file.write_all(&serde_json::to_vec(&spec)?)?;
        fs::rename(&draft, &path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

/// Replaces the paths; whether there were any.
fn rewrite(spec: &mut Value, shared: &Shared) -> Result<bool, String> {
    let namespaces = spec.pointer_mut("/linux/namespaces");
    let Some(Value::Array(namespaces)) = namespaces else {
        return Ok(false);
    };
    let mut is_changed = false;
    let mut kept = Vec::with_capacity(namespaces.len());
    for mut namespace in std::mem::take(namespaces) {
        let path = namespace.get("path").and_then(Value::as_str);
        if !path.is_some_and(|path| path.starts_with(NO_PROCESS)) {
            kept.push(namespace);
            continue;
        }
        is_changed = true;
        let kind = namespace.get("type").and_then(Value::as_str);
        // A namespace that is not named is the runtime's, which is the node's.
        if let Some(path) = path_of(kind.unwrap_or_default(), shared)? {
            let path = path.to_str().ok_or("a path is not UTF-8")?;
            if let Some(fields) = namespace.as_object_mut() {
                fields.insert("path".into(), path.into());
            }
            kept.push(namespace);
        }
    }
    *namespaces = kept;
    Ok(is_changed)
}

/// Where the sandbox's namespace of this type is; `None` if it is the node's.
fn path_of(kind: &str, shared: &Shared) -> Result<Option<PathBuf>, String> {
    let Isolation {
        network,
        ipc,
        processes,
        users,
    } = &shared.isolation;
    let pinned = || Ok(Some(shared.pins.join(kind)));
    match (kind, network) {
        ("network", Network::Pod(path)) => Ok(Some(path.clone())),
        ("uts", Network::Pod(_)) => pinned(),
        ("ipc", _) if *ipc == Reach::Pod => pinned(),
        ("user", _) if *users == Reach::Pod => pinned(),
        ("pid", _) if *processes == Processes::Pod => pinned(),
        ("network" | "uts" | "ipc", _) => Ok(None),
        ("pid", _) if *processes == Processes::Node => Ok(None),
        _ => Err(format!(
            "the sandbox has no {kind:?} namespace that a container could join"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(network: Network, ipc: Reach, processes: Processes) -> Shared {
        let isolation = Isolation {
            network,
            ipc,
            processes,
            users: Reach::Node,
        };
        Shared {
            isolation,
            pins: "/pin".into(),
        }
    }

    fn spec() -> Value {
        json!({"linux": {"namespaces": [
            {"type": "mount"},
            {"type": "ipc", "path": "/proc/0/ns/ipc"},
            {"type": "uts", "path": "/proc/0/ns/uts"},
            {"type": "network", "path": "/proc/0/ns/net"},
            {"type": "pid"},
        ], "resources": {"memory": {"limit": 9_007_199_254_740_993_i64}}}})
    }

    #[test]
    fn a_pods_namespaces_are_joined_where_they_are_pinned() {
        let pod = shared(Network::Pod("/n".into()), Reach::Pod, Processes::Container);
        let mut rewritten = spec();
        assert!(rewrite(&mut rewritten, &pod).unwrap());
        assert!(!rewrite(&mut rewritten, &pod).unwrap(), "once is enough");
        let expected = json!([
            {"type": "mount"},
            {"type": "ipc", "path": "/pin/ipc"},
            {"type": "uts", "path": "/pin/uts"},
            {"type": "network", "path": "/n"},
            {"type": "pid"},
        ]);
        assert_eq!(rewritten["linux"]["namespaces"], expected);
        assert_eq!(
            rewritten["linux"]["resources"],
            spec()["linux"]["resources"]
        );
    }

    #[test]
    fn shared_processes_and_users_are_joined_where_they_are_pinned() {
        let mut pod = shared(Network::Node, Reach::Node, Processes::Pod);
        pod.isolation.users = Reach::Pod;
        let mut rewritten = json!({"linux": {"namespaces": [
            {"type": "user", "path": "/proc/0/ns/user"},
            {"type": "pid", "path": "/proc/0/ns/pid"},
        ]}});
        rewrite(&mut rewritten, &pod).unwrap();
        let expected = json!([
            {"type": "user", "path": "/pin/user"},
            {"type": "pid", "path": "/pin/pid"},
        ]);
        assert_eq!(rewritten["linux"]["namespaces"], expected);
        assert_eq!(of_sandbox(&pod, &[])["linux"]["namespaces"], expected);
    }

    #[test]
    fn the_nodes_namespaces_are_not_named() {
        let node = shared(Network::Node, Reach::Node, Processes::Node);
        let mut rewritten = spec();
        rewritten["linux"]["namespaces"][4] = json!({"type": "pid", "path": "/proc/0/ns/pid"});
        rewrite(&mut rewritten, &node).unwrap();
        assert_eq!(rewritten["linux"]["namespaces"], json!([{"type": "mount"}]));
    }

    #[test]
    fn what_the_sandbox_does_not_have_is_refused() {
        let pod = shared(Network::Node, Reach::Pod, Processes::Container);
        for kind in ["pid", "user", "cgroup", "mount", "time", ""] {
            let mut spec = json!({"linux": {"namespaces": [
                {"type": kind, "path": "/proc/0/ns/x"},
            ]}});
            assert!(rewrite(&mut spec, &pod).is_err(), "{kind}");
        }
    }

    #[test]
    fn a_sandboxs_own_spec_names_what_is_shared_and_nothing_of_the_nodes() {
        let mounts = [("/etc/hosts".into(), "/pods/n/p/hosts".into())];
        let pod = shared(Network::Pod("/n".into()), Reach::Pod, Processes::Container);
        let spec = of_sandbox(&pod, &mounts);
        let expected = json!([
            {"type": "network", "path": "/n"},
            {"type": "ipc", "path": "/pin/ipc"},
            {"type": "uts", "path": "/pin/uts"},
            {"type": "pid"},
        ]);
        assert_eq!(spec["linux"]["namespaces"], expected);
        assert_eq!(spec["mounts"][0]["source"], "/pods/n/p/hosts");
        let node = shared(Network::Node, Reach::Node, Processes::Node);
        assert_eq!(of_sandbox(&node, &[])["linux"]["namespaces"], json!([]));
    }

    #[test]
    fn a_spec_behind_a_link_is_not_touched() {
        let bundle = tempfile::tempdir().unwrap();
        let other = bundle.path().join("other");
        fs::write(&other, spec().to_string()).unwrap();
        let config = bundle.path().join(SPEC);
        std::os::unix::fs::symlink(&other, &config).unwrap();
        let pod = shared(Network::Pod("/n".into()), Reach::Pod, Processes::Container);
        rewrite_bundle(bundle.path(), &pod).unwrap_err();
        fs::remove_file(&config).unwrap();
        fs::rename(&other, &config).unwrap();
        rewrite_bundle(bundle.path(), &pod).unwrap();
        assert!(!fs::read_to_string(&config).unwrap().contains("/proc/0"));
        assert_eq!(fs::read_dir(bundle.path()).unwrap().count(), 1);
    }
}
