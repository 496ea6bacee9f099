//! Two loaders for one object behind one interface: aya, which needs no C library, and libbpf (feature `libbpf`), which is the
//! reference. Owns what is told to the program before it is loaded; whatever is loaded, the maps are read by aya.

mod with_aya;
#[cfg(feature = "libbpf")]
mod with_libbpf;

use std::error::Error;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::include_bytes_aligned;
use aya::maps::MapData;

use crate::pins::Pins;

/// The CO-RE object of `bpf/exit.bpf.c`, from build.rs.
pub(crate) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/exit.bpf.o"));
/// Copies of one program: the object says why.
pub(crate) const PROGRAMS: [&str; 3] = ["record_exit", "record_exit_2", "record_exit_3"];
const TRACEPOINT: &str = "sched_process_exit";
/// `PROC_PID_INIT_INO` of linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

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

/// Loads and attaches.
pub(crate) fn load(plan: &Plan<'_>) -> Result<Loaded, LoadError> {
    match plan.loader {
        Loader::Aya => with_aya::load(plan),
        #[cfg(feature = "libbpf")]
        Loader::Libbpf => with_libbpf::load(plan),
    }
}

/// The inode of our pid namespace, or 0 for the initial one, where the kernel's own numbers are ours.
pub(crate) fn own_pid_namespace() -> u32 {
    let inode =
        std::fs::metadata("/proc/self/ns/pid").map_or(INITIAL_PID_NAMESPACE, |found| found.ino());
    if inode == INITIAL_PID_NAMESPACE {
        0
    } else {
        u32::try_from(inode).unwrap_or(0)
    }
}
