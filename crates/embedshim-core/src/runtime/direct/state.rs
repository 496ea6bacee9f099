//! [`State`]: what runc has noted of a container, in `state.json` of its directory. Owns that it is
//! believed only as far as it is understood: a field that is not known makes the whole unknown.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::kernel_file;
use crate::process::ProcessIdentity;
use crate::spec::nullable;

/// runc's name for it.
const FILE: &str = "state.json";
/// The specification of a container is in it, of which more would not be read either.
const MAX_SIZE: u64 = 16 * 1024 * 1024;
/// Hooks that are run before a container is created, or never by `start` or `delete`.
const OF_CREATE: [&str; 3] = ["prestart", "createRuntime", "createContainer"];

/// What runc has noted of one container, and its directory.
#[derive(Debug)]
pub(super) struct State {
    pub(super) directory: OwnedFd,
    document: Document,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    id: String,
    init_process_pid: i32,
    init_process_start: u64,
    #[serde(rename = "created")]
    _created: IgnoredAny,
    config: Config,
    #[serde(default)]
    rootless: bool,
    #[serde(default, deserialize_with = "nullable")]
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(rename = "namespace_paths")]
    _namespaces: IgnoredAny,
    #[serde(default, rename = "external_descriptors")]
    _descriptors: IgnoredAny,
    #[serde(default, deserialize_with = "nullable")]
    intel_rdt_path: String,
}

#[derive(Debug, Deserialize)]
struct Config {
    #[serde(rename = "Hooks", default, deserialize_with = "nullable")]
    hooks: BTreeMap<String, Option<Vec<IgnoredAny>>>,
    #[serde(default, deserialize_with = "nullable")]
    namespaces: Vec<Namespace>,
    cgroups: Cgroups,
    #[serde(default)]
    seccomp: Option<Seccomp>,
    #[serde(default)]
    intel_rdt: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

#[derive(Debug, Deserialize)]
struct Cgroups {
    #[serde(rename = "Systemd", default)]
    is_by_systemd: bool,
    #[serde(rename = "Rootless", default)]
    is_rootless: bool,
}

#[derive(Debug, Deserialize)]
struct Seccomp {
    #[serde(default, deserialize_with = "nullable")]
    listener_path: String,
}

impl State {
    /// What is noted in this directory, if it is understood and is of this container and this init.
    /// `None`: runc is to be asked. Blocks on the file system.
    pub(super) fn read(directory: &Path, id: &str, init: ProcessIdentity) -> Option<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(directory, flags, Mode::empty()).ok()?;
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = File::from(openat(directory.as_fd(), FILE, flags, Mode::empty()).ok()?);
        let meta = file.metadata().ok()?;
        // Only root can have written it.
        if !meta.is_file() || meta.uid() != 0 || meta.mode() & 0o022 != 0 || meta.len() > MAX_SIZE {
            return None;
        }
        let mut text = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0) + 1);
        file.take(MAX_SIZE).read_to_end(&mut text).ok()?;
        let document: Document = serde_json::from_slice(&text).ok()?;
        let is_its = document.id == id
            && document.init_process_pid == init.pid
            && document.init_process_start == init.start_ticks;
        is_its.then_some(Self {
            directory,
            document,
        })
    }

    /// Whether `runc start` would do no more than to let the init go on.
    pub(super) fn is_start_plain(&self) -> bool {
        self.has_no_hooks_but(&["poststop"]) && self.is_plain()
    }

    /// Whether `runc delete` would do no more than to remove cgroups and its own directory, of a
    /// container whose init has ended.
    pub(super) fn is_delete_plain(&self) -> bool {
        let config = &self.document.config;
        let is_private = |space: &Namespace| space.kind == "NEWPID" && space.path.is_empty();
        self.has_no_hooks_but(&["startContainer", "poststart"])
            && config.namespaces.iter().any(is_private)
            && config.intel_rdt.is_none()
            && self.document.intel_rdt_path.is_empty()
            && !config.cgroups.is_by_systemd
            && self.is_plain()
    }

    /// Not without the rights that a runtime has that root has called, and without a program that
    /// has been told of its system calls.
    fn is_plain(&self) -> bool {
        let config = &self.document.config;
        let listens = config.seccomp.as_ref();
        !self.document.rootless
            && !config.cgroups.is_rootless
            && listens.is_none_or(|seccomp| seccomp.listener_path.is_empty())
            && self.is_thawed()
    }

    fn has_no_hooks_but(&self, others: &[&str]) -> bool {
        let mut hooks = self.document.config.hooks.iter();
        hooks.all(|(name, hooks)| {
            let name = name.as_str();
            let is_any = hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
            !is_any || OF_CREATE.contains(&name) || others.contains(&name)
        })
    }

    /// Where its cgroups are, as runc calls them: by controller, and the empty name for version 2.
    pub(super) fn cgroups(&self) -> &BTreeMap<String, PathBuf> {
        &self.document.cgroup_paths
    }

    /// Whether runc would call it paused, and refuse both. A cgroup that is gone is not frozen.
    fn is_thawed(&self) -> bool {
        let paths = self.cgroups();
        let (file, thawed) = match (paths.get("freezer"), paths.get("")) {
            (Some(freezer), _) => (freezer.join("freezer.state"), "THAWED"),
            (None, Some(unified)) if paths.len() == 1 => (unified.join("cgroup.freeze"), "0"),
            _ => return true,
        };
        match kernel_file::read(file) {
            Ok(state) => state.trim() == thawed,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    const INIT: ProcessIdentity = ProcessIdentity {
        pid: 7,
        start_ticks: 99,
        inode: None,
    };

    fn document() -> Value {
        json!({
            "id": "c", "init_process_pid": 7, "init_process_start": 99, "created": "2026",
            "rootless": false, "cgroup_paths": {"pids": "/nowhere/c"},
            "namespace_paths": {"NEWPID": "/proc/7/ns/pid"},
            "external_descriptors": ["/dev/null"], "intel_rdt_path": "",
            "config": {
                "Hooks": {"prestart": [{"path": "/x"}], "poststart": null, "poststop": []},
                "namespaces": [{"type": "NEWPID", "path": ""}],
                "cgroups": {"path": "/c", "Systemd": false, "Rootless": false},
                "seccomp": null, "rootfs": "/r"
            }
        })
    }

    fn read(document: &Value) -> Option<State> {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), document.to_string()).unwrap();
        State::read(directory.path(), "c", INIT)
    }

    /// What of start and delete is plain after this change.
    fn plain(pointer: &str, value: Value) -> Option<(bool, bool)> {
        let mut document = document();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        document.pointer_mut(parent).unwrap()[name] = value;
        read(&document).map(|state| (state.is_start_plain(), state.is_delete_plain()))
    }

    fn is_root() -> bool {
        let is_root = nix::unistd::geteuid().is_root();
        if !is_root {
            eprintln!("skipped, because only root's state is believed");
        }
        is_root
    }

    #[test]
    fn what_has_something_to_do_for_runc_is_left_to_it() {
        if !is_root() {
            return;
        }
        let hook = json!([{"path": "/bin/true"}]);
        let cases = [
            ("/id", json!("c"), (true, true)),
            ("/config/Hooks", json!(null), (true, true)),
            ("/config/Hooks/createRuntime", hook.clone(), (true, true)),
            ("/config/Hooks/poststart", hook.clone(), (false, true)),
            ("/config/Hooks/startContainer", hook.clone(), (false, true)),
            ("/config/Hooks/poststop", hook.clone(), (true, false)),
            ("/config/Hooks/another", hook, (false, false)),
            (
                "/config/namespaces",
                json!([{"type": "NEWPID", "path": "/p"}]),
                (true, false),
            ),
            ("/config/namespaces", json!(null), (true, false)),
            ("/config/intel_rdt", json!({}), (true, false)),
            ("/intel_rdt_path", json!("/sys/fs/resctrl/c"), (true, false)),
            ("/config/cgroups/Systemd", json!(true), (true, false)),
            ("/config/cgroups/Rootless", json!(true), (false, false)),
            ("/rootless", json!(true), (false, false)),
            (
                "/config/seccomp",
                json!({"listener_path": ""}),
                (true, true),
            ),
            (
                "/config/seccomp",
                json!({"listener_path": "/s"}),
                (false, false),
            ),
        ];
        for (pointer, value, expected) in cases {
            assert_eq!(
                plain(pointer, value.clone()),
                Some(expected),
                "{pointer}: {value}"
            );
        }
    }

    #[test]
    fn what_is_not_understood_or_of_another_is_not_believed() {
        if !is_root() {
            return;
        }
        for (pointer, value) in [
            ("/init_process_pid", json!(8)),
            ("/init_process_start", json!(98)),
            ("/id", json!("d")),
            ("/intel_rdt_mon_path", json!("/x")),
            ("/config", json!(null)),
        ] {
            assert_eq!(plain(pointer, value.clone()), None, "{pointer}: {value}");
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        fs::write(&file, document().to_string()).unwrap();
        assert!(State::read(directory.path(), "c", INIT).is_some());
        std::os::unix::fs::chown(&file, Some(1), None).unwrap();
        assert!(State::read(directory.path(), "c", INIT).is_none());
    }

    #[test]
    fn a_frozen_container_is_left_to_runc() {
        if !is_root() {
            return;
        }
        let cgroup = tempfile::tempdir().unwrap();
        let plain_with = |paths: Value| plain("/cgroup_paths", paths);
        let v1 = json!({"freezer": cgroup.path(), "": "/nowhere"});
        assert_eq!(plain_with(v1.clone()), Some((true, true)));
        for state in ["FREEZING\n", "FROZEN\n"] {
            fs::write(cgroup.path().join("freezer.state"), state).unwrap();
            assert_eq!(plain_with(v1.clone()), Some((false, false)));
        }
        let v2 = json!({"": cgroup.path()});
        fs::write(cgroup.path().join("cgroup.freeze"), "0\n").unwrap();
        assert_eq!(plain_with(v2.clone()), Some((true, true)));
        fs::write(cgroup.path().join("cgroup.freeze"), "1\n").unwrap();
        assert_eq!(plain_with(v2), Some((false, false)));
    }
}
