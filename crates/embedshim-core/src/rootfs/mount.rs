//! [`Mount`]: what is to be mounted, and why it could not be. Mounts nothing.

use std::io;
use std::path::PathBuf;

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
pub enum MountError {
    /// An option that this crate does not interpret, or that does not fit.
    #[error("mount option {option:?} of {kind} on {target} is not supported{why}", target = .target.display())]
    Unsupported {
        /// The option.
        option: String,
        /// The file-system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// What else there is to say.
        why: &'static str,
    },
    /// The options are longer than mount(2) takes.
    #[error("the options of {kind} on {target} are {length} bytes long, mount takes {limit}", target = .target.display())]
    OptionsTooLong {
        /// The file-system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// How long they are.
        length: usize,
        /// How long they may be.
        limit: usize,
    },
    /// A directory to mount on.
    #[error("cannot {doing} mount point {target}", target = .target.display())]
    Target {
        /// "make" or "open".
        doing: &'static str,
        /// Which.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// mount(2) refused.
    #[error("cannot mount {kind} {from} on {target}", target = .target.display())]
    Mount {
        /// The file-system type.
        kind: String,
        /// The source.
        from: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// umount2(2) refused. The text is runc-v2's.
    #[error("failed rootfs umount: {target}", target = .target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel's list of mounts cannot be read.
    #[error("cannot read /proc/self/mountinfo")]
    MountInfo(#[source] io::Error),
}
