//! [`RuntimeOptions`]: which OCI runtime a task uses, and how. Owns the defaults, which are those
//! of containerd's shims.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::child_context::ChildContext;
use crate::id::Namespace;

/// How to call the OCI runtime for one task. The default is runc with its own defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimeOptions {
    /// The runtime's binary, a name on `PATH` or an absolute path; empty means `runc`.
    pub binary: String,
    /// The base of the runtime's state directory; the namespace is appended. Empty means
    /// `/run/containerd/runc`.
    pub root: String,
    /// Cgroups by systemd; `None` means: by the form of the spec's `cgroupsPath`.
    pub systemd_cgroup: Option<bool>,
    /// `--no-pivot`.
    pub no_pivot_root: bool,
    /// `--no-new-keyring`.
    pub no_new_keyring: bool,
    /// The owner of the standard streams.
    pub io_uid: u32,
    /// Their group.
    pub io_gid: u32,
    /// What the runtime and loggers inherit.
    pub context: ChildContext,
}

impl RuntimeOptions {
    /// The binary to call.
    pub fn binary_or_default(&self) -> &str {
        if self.binary.is_empty() {
            "runc"
        } else {
            &self.binary
        }
    }

    /// The runtime's state directory for one namespace. The default is that of containerd's shims.
    pub fn root_of(&self, namespace: &Namespace) -> PathBuf {
        let base = if self.root.is_empty() {
            "/run/containerd/runc"
        } else {
            &self.root
        };
        Path::new(base).join(namespace.as_str())
    }
}
