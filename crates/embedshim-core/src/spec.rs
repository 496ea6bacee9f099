//! The few facts we need of a container's `config.json`; everything else is the OCI runtime's
//! business.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A spec of more than this is no spec.
const MAX_SPEC: u64 = 16 * 1024 * 1024;
/// The size of most of them, and more.
const USUAL: usize = 16 * 1024;

/// What the daemon reads of an OCI runtime spec.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Spec {
    #[serde(deserialize_with = "nullable")]
    linux: Linux,
}

/// What of a spec is remembered with the task: its successor need not read the bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Traits {
    /// Whether the end of the init ends all processes by itself: only in a pid namespace of its
    /// own.
    ///
    /// A container in a shared one has to be killed process by process (`ShouldKillAllOnExit`).
    pub(crate) own_pid_namespace: bool,
    /// Whether its cgroup is systemd's, by the form of its path, unless an option says it.
    pub(crate) systemd_cgroup: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Linux {
    #[serde(rename = "cgroupsPath", deserialize_with = "nullable")]
    cgroups_path: String,
    #[serde(deserialize_with = "nullable")]
    namespaces: Vec<LinuxNamespace>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct LinuxNamespace {
    #[serde(rename = "type", deserialize_with = "nullable")]
    kind: String,
    #[serde(deserialize_with = "nullable")]
    path: String,
}

/// Reads `null` as what is missing, as Go does.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Spec {
    /// Reads `config.json` of a bundle. Blocks on the file system; a fifo in its place is an empty
    /// document.
    pub(crate) fn read(bundle: &Path) -> Result<Self, Error> {
        use io::Read;
        let path = bundle.join("config.json");
        let failed = |doing| {
            let path = path.clone();
            move |source| Error::Path {
                doing,
                path,
                source,
            }
        };
        let mut text = Vec::with_capacity(USUAL);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed("cannot open the OCI spec"))?;
        file.take(MAX_SPEC)
            .read_to_end(&mut text)
            .map_err(failed("cannot read the OCI spec"))?;
        serde_json::from_slice(&text).map_err(|e| failed("cannot parse the OCI spec")(e.into()))
    }

    /// What of it is remembered.
    pub(crate) fn traits(&self) -> Traits {
        Traits {
            own_pid_namespace: self.has_own_pid_namespace(),
            systemd_cgroup: self.wants_systemd_cgroup(),
        }
    }

    /// runc's systemd form is `slice:prefix:name`; anything else is a plain path. Clients that
    /// can't send runc's options (CRI and nerdctl with a runtime type that is not runc's) still
    /// write this form (`docs/shim-contract.md`, "Options").
    fn wants_systemd_cgroup(&self) -> bool {
        let path = &self.linux.cgroups_path;
        !path.starts_with('/') && path.split(':').count() == 3
    }

    /// Where the runtime makes its cgroup, if that is said as a path from the root of each
    /// hierarchy.
    pub(crate) fn cgroups_path(&self) -> Option<&Path> {
        let path = Path::new(&self.linux.cgroups_path);
        path.is_absolute().then_some(path)
    }

    fn has_own_pid_namespace(&self) -> bool {
        self.linux
            .namespaces
            .iter()
            .any(|namespace| namespace.kind == "pid" && namespace.path.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_field_may_be_null() {
        for json in [
            r#"{"linux":null}"#,
            r#"{"linux":{"cgroupsPath":null,"namespaces":null}}"#,
            r#"{"linux":{"namespaces":[{"type":"pid","path":null},{"type":null}]}}"#,
        ] {
            assert!(!spec(json).wants_systemd_cgroup(), "{json}");
        }
        assert!(
            spec(r#"{"linux":{"namespaces":[{"type":"pid","path":null}]}}"#)
                .has_own_pid_namespace()
        );
    }

    #[test]
    fn the_systemd_form_is_recognised() {
        assert!(
            spec(r#"{"linux":{"cgroupsPath":"system.slice:docker:abc"}}"#).wants_systemd_cgroup()
        );
        assert!(!spec(r#"{"linux":{"cgroupsPath":"/default/abc"}}"#).wants_systemd_cgroup());
        assert!(!spec("{}").wants_systemd_cgroup());
    }

    #[test]
    fn a_joined_pid_namespace_is_not_its_own() {
        assert!(spec(r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#).has_own_pid_namespace());
        assert!(
            !spec(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#)
                .has_own_pid_namespace()
        );
        assert!(!spec(r#"{"linux":{"namespaces":[{"type":"mount"}]}}"#).has_own_pid_namespace());
    }
}
