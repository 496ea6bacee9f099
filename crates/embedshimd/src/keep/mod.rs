//! `embedshimd keep`: the service manager where systemd is not pid 1. Starts the daemon, starts it
//! again whenever it ends, and stores its descriptors in the meantime. Knows nothing of containers:
//! one thread, no async runtime, asleep most of the time.

mod backoff;
mod daemon;
mod fd_table;
mod files;
mod handover;
mod inbox;
mod keeper;
mod program;
mod succession;
mod zombies;

use std::os::fd::RawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tracing::warn;

use crate::cli::Keep;
use crate::outcome::{Code, Failure};
use crate::state_dir::claim::{Claim, Role};
use crate::state_dir::lock;
use crate::{limits, logging, signals, sys};

use fd_table::FdTable;
use files::Files;
use handover::{Format, Handover};
use inbox::Inbox;
use keeper::{Keeper, Parts};
use program::Program;
use zombies::Zombies;

pub(crate) use succession::Succession;

/// Keeps the daemon running until SIGTERM or SIGINT.
pub(crate) fn run(options: &Keep) -> Result<Code, Failure> {
    if let Some(format) = &options.understands {
        return Ok(match Format::from_name(format) {
            Some(_) => Code::Ok,
            None => Code::Failed,
        });
    }
    if options.detached && options.resume.is_none() {
        detach()?;
    }
    logging::start_plain(&options.locations.state_dir);
    // Before a child can end: a signal that comes before the descriptor is read stays pending.
    let signals = signals::open_for_keeper().context("cannot wait for signals")?;
    // The containers of a daemon that has ended become children of the keeper. No status is lost
    // while they are zombies.
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a child subreaper")?;
    let parts = Parts {
        program: Program::of_keeper(options).context("cannot find our own program")?,
        watchdog: Some(Duration::from_secs(options.watchdog)).filter(|period| !period.is_zero()),
        signals,
        limit: raise_descriptor_limit(),
    };
    let state_dir = &options.locations.state_dir;
    let mut keeper = match options.resume {
        Some(number) => resume(parts, state_dir, number)?,
        None => begin(parts, state_dir)?,
    };
    sys::trim_heap();
    Ok(keeper.run())
}

/// The first keeper of a state directory, which takes that for itself (invariant 18).
fn begin(parts: Parts, state_dir: &Path) -> Result<Keeper, Failure> {
    let taken = || {
        let text = format!("another keeper works on {}", state_dir.display());
        Failure::new(Code::AlreadyRunning, anyhow!(text))
    };
    let lock = lock::take(state_dir, &lock::keeper_path(state_dir))?.ok_or_else(taken)?;
    let claim = Claim::take(state_dir, Role::Keeper).ok_or_else(taken)?;
    let path = inbox::path(state_dir);
    let inbox =
        Inbox::open(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    Ok(Keeper::new(
        parts,
        Files::new(state_dir, lock, claim, inbox),
        FdTable::default(),
        Zombies::default(),
    ))
}

/// Continues as the keeper that this process was before `execve`; `number` is the descriptor of
/// what that has written down.
fn resume(parts: Parts, state_dir: &Path, number: RawFd) -> Result<Keeper, Failure> {
    let handover = Handover::take(number).context("cannot take over from the former keeper")?;
    let lock = lock::from_inherited(handover.lock)
        .context("cannot take over the lock of the former keeper")?;
    // The claim ends with `execve`, the lock does not. So a process that has the name now is no
    // reason to give up the descriptors.
    let claim = Claim::take(state_dir, Role::Keeper).unwrap_or_else(Claim::none);
    let mut fds = FdTable::default();
    for (name, descriptor) in handover.stored {
        // Without a limit: what one keeper could store another can.
        let _ = fds.insert(&name, descriptor, u64::MAX);
    }
    let inbox = Inbox::from_inherited(handover.inbox);
    let files = Files::new(state_dir, lock, claim, inbox);
    let mut keeper = Keeper::new(parts, files, fds, Zombies::with(handover.reaped));
    keeper.replace_daemon(handover.daemon);
    Ok(keeper)
}

/// Raises the limit of open files, and returns what it is then.
fn raise_descriptor_limit() -> u64 {
    limits::raise_open_files().unwrap_or_else(|error| {
        warn!(%error, "cannot raise the limit of open files");
        limits::max_open_files()
    })
}

/// Leaves the launcher's session, and closes the descriptors that containerd was started with.
fn detach() -> anyhow::Result<()> {
    // Fails only for the leader of a process group, which a launcher's child is not.
    nix::unistd::setsid().context("cannot begin a session of its own")?;
    let open = std::fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")?;
    let descriptors: Vec<RawFd> = open
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&descriptor| descriptor > 2)
        .collect();
    for descriptor in descriptors {
        // This process has opened nothing yet but the directory, which is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}
