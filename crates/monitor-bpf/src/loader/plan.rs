//! What goes into a loader and what comes out of it. Loads nothing.

use std::error::Error;
use std::path::{Path, PathBuf};

use aya::maps::MapData;

use crate::pins::Pins;

/// What loads the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loader {
    /// aya.
    #[default]
    Aya,
    /// libbpf-rs.
    #[cfg(feature = "libbpf")]
    Libbpf,
}

/// What went wrong in a loader, with its causes.
pub(crate) type LoadError = Box<dyn Error + Send + Sync>;

/// What is to be loaded.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) loader: Loader,
    pub(crate) capacity: u32,
    /// Where maps are pinned, and taken from if they are there.
    pub(crate) pins: Option<&'a Pins>,
    /// The kernel's types, where it does not describe them itself.
    pub(crate) btf: Option<&'a Path>,
    /// The kernel has `bpf_ktime_get_boot_ns()` (5.8).
    pub(crate) has_boot_clock: bool,
}

/// Loaded and attached.
pub(crate) struct Loaded {
    pub(crate) tracked: MapData,
    pub(crate) exited: MapData,
    pub(crate) links: Vec<Link>,
}

/// The attachment. While it or its pin exists, the kernel records.
#[derive(Debug)]
pub(crate) enum Link {
    Aya(aya::programs::links::FdLink),
    Pinned(
        #[expect(dead_code, reason = "held for what holding it does")]
        aya::programs::links::PinnedLink,
    ),
    #[cfg(feature = "libbpf")]
    Libbpf(libbpf_rs::Link),
}

impl Link {
    /// Pins it (Linux 5.7).
    pub(crate) fn pin(self, path: PathBuf) -> Result<Self, LoadError> {
        Ok(match self {
            Self::Aya(link) => Self::Pinned(link.pin(path)?),
            pinned @ Self::Pinned(_) => pinned,
            #[cfg(feature = "libbpf")]
            Self::Libbpf(mut link) => {
                link.pin(path)?;
                Self::Libbpf(link)
            }
        })
    }
}
