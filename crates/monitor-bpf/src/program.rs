//! Loading, attaching and pinning the program with aya, and taking over what a predecessor has pinned.
//! Owns every error that the kernel's refusal can become, in words an operator can act on.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use aya::maps::{MapData, MapError};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::{ProgramError, RawTracePoint};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};
use tracing::{info, warn};

use crate::maps::Maps;
use crate::pins::Pins;

/// The CO-RE object of `bpf/exit.bpf.c`, from build.rs.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/exit.bpf.o"));
const PROGRAM: &str = "record_exit";
const TRACEPOINT: &str = "sched_process_exit";
/// `PROC_PID_INIT_INO` of linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

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
    Denied(#[source] Box<EbpfError>),
    /// The kernel does not describe its types.
    #[error("the kernel has no BTF at /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)")]
    NoBtf,
    /// The kernel refused the program or a map; the message has its reason.
    #[error("the kernel does not take the BPF program")]
    Refused(#[source] Box<EbpfError>),
    /// A directory or pin below bpffs.
    #[error("cannot {doing} {path}", path = .path.display())]
    Pin {
        /// What was tried.
        doing: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The attached program and its maps; it records as long as one of this and the pins exists.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) maps: Maps,
    _link: Attached,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held for what holding them does")]
enum Attached {
    Pinned(PinnedLink),
    Ours(FdLink),
}

impl Program {
    /// Takes over the pinned program, or loads and pins it.
    pub(crate) fn open(pins: &Pins, capacity: u32) -> Result<Self, OpenError> {
        pins.on_bpffs()
            .map_err(|path| OpenError::NoBpffs { path })?;
        let path = pins.directory().to_owned();
        pins.make().map_err(|source| OpenError::Pin {
            doing: "make the pin directory",
            path,
            source,
        })?;
        if let Some(found) = Self::take_over(pins, capacity)? {
            return Ok(found);
        }
        // Maps that are there are used, with what they hold; what is missing is made and pinned.
        let mut loaded = load(Some(pins), capacity)?;
        let link = attach(&mut loaded)?;
        let path = pins.link();
        let _ = std::fs::remove_file(&path);
        let link = link.pin(&path).map_err(|error| OpenError::Pin {
            doing: "pin the link at",
            path,
            source: io::Error::other(error),
        })?;
        info!(pins = %pins.directory().display(), "the BPF program is attached and pinned");
        Ok(Self {
            maps: maps(&mut loaded)?,
            _link: Attached::Pinned(link),
        })
    }

    /// Loads it for this process's lifetime only.
    pub(crate) fn open_unpinned(capacity: u32) -> Result<Self, OpenError> {
        let mut loaded = load(None, capacity)?;
        let link = attach(&mut loaded)?;
        Ok(Self {
            maps: maps(&mut loaded)?,
            _link: Attached::Ours(link),
        })
    }

    /// What a predecessor has pinned goes on recording: it is used as it is. `None` if there is nothing, or only a part.
    fn take_over(pins: &Pins, capacity: u32) -> Result<Option<Self>, OpenError> {
        if !pins.link().exists() {
            return Ok(None);
        }
        let link = match PinnedLink::from_pin(pins.link()) {
            Ok(link) => link,
            Err(error) if is_denied(&error) => return Err(denied_link(error)),
            Err(error) => {
                warn!(%error, pins = %pins.directory().display(), "the pinned BPF link cannot be used; attaching anew");
                return Ok(None);
            }
        };
        let found = MapData::from_pin(pins.tracked())
            .and_then(|tracked| Maps::new(tracked, MapData::from_pin(pins.exited())?));
        match found {
            Ok(maps) if maps.capacity() != capacity && maps.tracked().is_empty() => {
                info!(
                    from = maps.capacity(),
                    to = capacity,
                    "no process is watched: the BPF maps are made anew"
                );
                let path = pins.directory().to_owned();
                pins.remove().map_err(|source| OpenError::Pin {
                    doing: "remove the pins in",
                    path,
                    source,
                })?;
                Ok(None)
            }
            Ok(maps) => {
                if maps.capacity() != capacity {
                    warn!(
                        capacity = maps.capacity(),
                        configured = capacity,
                        "the BPF maps keep their capacity as long as processes are watched"
                    );
                }
                info!(pins = %pins.directory().display(), "took over the pinned BPF program");
                Ok(Some(Self {
                    maps,
                    _link: Attached::Pinned(link),
                }))
            }
            Err(error) => {
                warn!(%error, pins = %pins.directory().display(), "the pinned BPF maps cannot be used; attaching anew");
                Ok(None)
            }
        }
    }
}

fn load(pins: Option<&Pins>, capacity: u32) -> Result<Ebpf, OpenError> {
    let namespace = own_pid_namespace();
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries("tracked", capacity)
        .map_max_entries("exited", capacity)
        .override_global("pid_namespace", &namespace, true);
    if let Some(pins) = pins {
        loader
            .map_pin_path("tracked", pins.tracked())
            .map_pin_path("exited", pins.exited());
    }
    loader.load(OBJECT).map_err(refused)
}

fn attach(loaded: &mut Ebpf) -> Result<FdLink, OpenError> {
    let missing = || ProgramError::from(io::Error::other("the object lacks the program"));
    let mut attach = || -> Result<FdLink, ProgramError> {
        let program: &mut RawTracePoint = loaded
            .program_mut(PROGRAM)
            .ok_or_else(missing)?
            .try_into()?;
        program.load()?;
        let link = program.attach(TRACEPOINT)?;
        Ok(program.take_link(link)?.into())
    };
    attach().map_err(|error| refused(error.into()))
}

fn maps(loaded: &mut Ebpf) -> Result<Maps, OpenError> {
    let mut take = |name: &str| match loaded.take_map(name) {
        Some(aya::maps::Map::HashMap(data)) => Ok(data),
        _ => Err(refused(MapError::InvalidName { name: name.into() }.into())),
    };
    let (tracked, exited) = (take("tracked")?, take("exited")?);
    Maps::new(tracked, exited).map_err(|error| refused(error.into()))
}

/// The inode of our pid namespace, or 0 for the initial one, where the kernel's own numbers are ours.
fn own_pid_namespace() -> u32 {
    let inode =
        std::fs::metadata("/proc/self/ns/pid").map_or(INITIAL_PID_NAMESPACE, |found| found.ino());
    if inode == INITIAL_PID_NAMESPACE {
        0
    } else {
        u32::try_from(inode).unwrap_or(0)
    }
}

fn refused(error: EbpfError) -> OpenError {
    if is_denied(&error) {
        return OpenError::Denied(Box::new(error));
    }
    if !std::path::Path::new("/sys/kernel/btf/vmlinux").exists() {
        return OpenError::NoBtf;
    }
    OpenError::Refused(Box::new(error))
}

fn denied_link(error: LinkError) -> OpenError {
    OpenError::Denied(Box::new(EbpfError::ProgramError(ProgramError::IOError(
        io::Error::other(error),
    ))))
}

/// EPERM or EACCES anywhere in the chain of causes.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return true;
        }
        next = error.source();
    }
    false
}
