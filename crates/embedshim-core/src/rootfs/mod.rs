//! Root filesystems: mounting what containerd asks for and unmounting it without a trace.

use serde::{Deserialize, Serialize};

/// One mount as containerd describes it (`containerd.types.Mount`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `bind`, `overlay`, `tmpfs` ...
    #[serde(rename = "type")]
    pub kind: String,
    /// What to mount.
    pub source: String,
    /// Where, below the rootfs; empty for the rootfs itself.
    #[serde(default)]
    pub target: String,
    /// fstab-style options.
    pub options: Vec<String>,
}

/// Why a rootfs could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {}
