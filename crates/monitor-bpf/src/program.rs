//! The program attached and its maps open: loaded again, taken over from a predecessor, or put in
//! the place of an older version. Owns every error that the kernel's refusal can become, in words
//! an operator can act on.

use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use aya::programs::links::{LinkError, PinnedLink};
use tracing::{info, warn};

use crate::loader::{self, Link, LoadError, Loader, Plan};
use crate::maps::Maps;
use crate::pins::Pins;
use crate::proof::{self, Proof};

/// Where the kernel describes its types (5.2, `CONFIG_DEBUG_INFO_BTF`).
pub(crate) const OWN_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why exits cannot be recorded by BPF.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The pins would not be on a bpffs.
    #[error("{path} is not a bpffs; run: mount -t bpf bpf /sys/fs/bpf", path = .path.display())]
    NoBpffs {
        /// The nearest existing directory.
        path: PathBuf,
    },
    /// The kernel says no.
    #[error("no permission for BPF: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, are needed")]
    Denied(#[source] LoadError),
    /// The kernel does not describe its types, and no file does.
    #[error(
        "the kernel has no BTF at /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF), and none is configured (monitor.btf)"
    )]
    NoBtf,
    /// The kernel refused the program or a map; the message has its reason.
    #[error("the kernel does not take the BPF program")]
    Refused(#[source] LoadError),
    /// It is attached, and the exit of a child of this process was not recorded.
    #[error("exits are not recorded here: {0}")]
    RecordsNothing(String),
    /// A directory or pin below bpffs.
    #[error("cannot {doing} {path}", path = .path.display())]
    Pin {
        /// What was tried.
        doing: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: LoadError,
    },
}

/// How to load the program.
#[derive(Clone, Debug, Default)]
pub struct Loading {
    /// What loads it.
    pub loader: Loader,
    /// A file with the kernel's types, for kernels without `/sys/kernel/btf/vmlinux`.
    pub btf: Option<PathBuf>,
    /// As if the kernel were older than 5.8 and had no boot clock for programs: for tests.
    #[doc(hidden)]
    pub without_boot_clock: bool,
}

/// The attached program and its maps; it records as long as one of this and the pins exists.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) maps: Maps,
    /// Whether its times are the boot clock's.
    pub(crate) has_boot_clock: bool,
    links: Vec<Link>,
}

impl Program {
    /// Takes over the pinned program, or loads and pins it.
    pub(crate) fn open(pins: &Pins, capacity: u32, how: &Loading) -> Result<Self, OpenError> {
        pins.on_bpffs()
            .map_err(|path| OpenError::NoBpffs { path })?;
        pins.make()
            .map_err(|error| pin_failed("make the pin directory", pins.directory(), error))?;
        if let Some(found) = Self::take_over(pins, capacity)? {
            return Ok(found);
        }
        // Maps that are there are used, with what they hold; what is missing is made and pinned.
        let Self {
            maps,
            has_boot_clock,
            links,
        } = Self::load(Some(pins), capacity, how)?;
        let pin = |(link, path): (Link, PathBuf)| {
            link.pin(path.clone())
                .map_err(|error| pin_failed("pin the link at", &path, error))
        };
        let links = links.into_iter().zip(pins.links()).map(pin);
        let links = links.collect::<Result<_, _>>()?;
        // Until here both were attached and wrote the same: no exit falls between them.
        for old in pins.other_links() {
            info!(link = %old.display(), "replacing another version of the BPF program");
            std::fs::remove_file(&old)
                .map_err(|error| pin_failed("remove the old link", &old, error))?;
        }
        info!(pins = %pins.directory().display(), "the BPF program is attached and pinned");
        Ok(Self {
            maps,
            has_boot_clock,
            links,
        })
    }

    /// Takes over the pinned program; `None` if there is none that could be used as it is.
    pub(crate) fn resume(pins: &Pins, capacity: u32) -> Option<Self> {
        pins.on_bpffs().ok()?;
        Self::take_over(pins, capacity).ok().flatten()
    }

    /// Loads it for this process's lifetime only.
    pub(crate) fn open_unpinned(capacity: u32, how: &Loading) -> Result<Self, OpenError> {
        Self::load(None, capacity, how)
    }

    fn load(pins: Option<&Pins>, capacity: u32, how: &Loading) -> Result<Self, OpenError> {
        let mut plan = Plan {
            loader: how.loader,
            capacity,
            pins,
            btf: how.btf.as_deref(),
            has_boot_clock: !how.without_boot_clock,
        };
        let loaded = loader::load(&plan).or_else(|error| {
            if is_denied(&*error) || !plan.has_boot_clock {
                return Err(error);
            }
            // Before 5.8. If that was not the reason, the first refusal is the one to tell.
            plan.has_boot_clock = false;
            loader::load(&plan).map_err(|_| error)
        });
        let loaded = loaded.map_err(|error| refused(error, how.btf.is_some()))?;
        let maps = Maps::new(loaded.tracked, loaded.exited);
        let mut maps = maps.map_err(|error| refused(error.into(), true))?;
        match proof::records_an_exit(&mut maps) {
            Proof::Recorded => {}
            // A predecessor's maps may be full, which is no reason to record nothing.
            Proof::NotTried(why) if pins.is_some() => warn!("the BPF program is not tried: {why}"),
            Proof::NotRecorded(why) | Proof::NotTried(why) => {
                return Err(OpenError::RecordsNothing(why));
            }
        }
        Ok(Self {
            maps,
            has_boot_clock: plan.has_boot_clock,
            links: loaded.links,
        })
    }

    /// Pins a link, to see whether that works.
    pub(crate) fn try_pinning(mut self, path: &Path) -> Result<(), LoadError> {
        match self.links.pop() {
            Some(link) => link.pin(path.to_owned()).map(drop),
            None => Ok(()),
        }
    }

    /// What a predecessor of the same version has pinned goes on recording: it is used as it is.
    /// `None` if there is nothing, only a part, or another version.
    fn take_over(pins: &Pins, capacity: u32) -> Result<Option<Self>, OpenError> {
        if !pins.links().iter().any(|link| link.exists()) {
            return Ok(None);
        }
        let links = pins.links().into_iter();
        let links = match links.map(PinnedLink::from_pin).collect::<Result<_, _>>() {
            Ok::<Vec<_>, _>(links) => links,
            Err(error) if is_denied(&error) => return Err(OpenError::Denied(error.into())),
            Err(error) => return Ok(unusable(pins, &error)),
        };
        let found = MapData::from_pin(pins.tracked())
            .and_then(|tracked| Maps::new(tracked, MapData::from_pin(pins.exited())?));
        let mut maps = match found {
            Ok(maps) => maps,
            Err(error) => return Ok(unusable(pins, &error)),
        };
        if maps.capacity() != capacity {
            if maps.tracked().is_empty() {
                let (from, to) = (maps.capacity(), capacity);
                info!(from, to, "replacing the BPF maps: no process is watched");
                pins.remove()
                    .map_err(|error| pin_failed("remove the pins in", pins.directory(), error))?;
                return Ok(None);
            }
            warn!(
                capacity = maps.capacity(),
                configured = capacity,
                "the BPF maps keep their capacity as long as processes are watched"
            );
        }
        if let Proof::NotRecorded(why) = proof::records_an_exit(&mut maps) {
            return Ok(unusable(pins, &io::Error::other(why)));
        }
        info!(pins = %pins.directory().display(), "took over the pinned BPF program");
        Ok(Some(Self {
            maps,
            // Its loader found that out.
            has_boot_clock: true,
            links: links.into_iter().map(Link::Pinned).collect(),
        }))
    }
}

fn unusable(pins: &Pins, error: &dyn std::error::Error) -> Option<Program> {
    warn!(%error, pins = %pins.directory().display(), "cannot use the pinned BPF program: attaching another");
    // Or the new links would find their names taken.
    for link in pins.links() {
        let _ = std::fs::remove_file(link);
    }
    None
}

fn pin_failed(doing: &'static str, path: &Path, error: impl Into<LoadError>) -> OpenError {
    OpenError::Pin {
        doing,
        path: path.to_owned(),
        source: error.into(),
    }
}

pub(crate) fn refused(error: LoadError, has_btf: bool) -> OpenError {
    if is_denied(&*error) {
        OpenError::Denied(error)
    } else if !has_btf && !Path::new(OWN_BTF).exists() {
        OpenError::NoBtf
    } else {
        OpenError::Refused(error)
    }
}

/// EPERM or EACCES anywhere in the chain of causes.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
        let link = match error.downcast_ref::<LinkError>() {
            Some(LinkError::SyscallError(error)) => Some(error.io_error.kind()),
            _ => None,
        };
        io.or(link) == Some(io::ErrorKind::PermissionDenied) || is_denied_by_libbpf(error)
    })
}

#[cfg(feature = "libbpf")]
fn is_denied_by_libbpf(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref::<libbpf_rs::Error>()
        .is_some_and(|error| error.kind() == libbpf_rs::ErrorKind::PermissionDenied)
}

#[cfg(not(feature = "libbpf"))]
fn is_denied_by_libbpf(_: &(dyn std::error::Error + 'static)) -> bool {
    false
}
