//! `embedshimd keep`: the manager's side of `sd_notify(3)` where systemd is not pid 1. Starts the
//! daemon, starts it again whenever it ends, and holds its descriptors meanwhile. Knows nothing of
//! containers: one thread, no async runtime, asleep most of the time.

mod backoff;
mod handover;
mod inbox;
mod keeper;
mod program;
mod running;
mod stored_fds;
mod succession;
mod zombies;

use std::os::fd::RawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::cli::Keep;
use crate::outcome::{Code, Failure};
use crate::state_dir::claim::{Claim, Role};
use crate::state_dir::lock;
use crate::{logging, sys};

use handover::Handover;
use inbox::Inbox;
use keeper::{Keeper, Parts};
use program::Program;
use stored_fds::Kept;
use zombies::Zombies;

pub(crate) use stored_fds::MAX_NAMES;
pub(crate) use succession::Succession;

/// Keeps until SIGTERM or SIGINT.
pub(crate) fn run(options: &Keep) -> Result<Code, Failure> {
    if let Some(format) = &options.understands {
        return Ok(match handover::Format::of(format) {
            Some(_) => Code::Ok,
            None => Code::Failed,
        });
    }
    if options.detached && options.resume.is_none() {
        detach()?;
    }
    logging::start_plain(&options.locations.state_dir);
    // Before anything can end: what comes before the descriptor is there waits for it.
    let signals = signals().context("cannot wait for signals")?;
    // The containers of a daemon that has ended become ours, and no status is lost while they are
    // zombies.
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a child subreaper")?;
    let limit = raise_descriptor_limit();
    let program = Program::own(options).context("cannot find our own program")?;
    let state_dir = &options.locations.state_dir;
    let parts = Parts {
        program,
        inbox_path: inbox::path(state_dir),
        watchdog: Some(Duration::from_secs(options.watchdog)).filter(|period| !period.is_zero()),
        signals,
        limit,
    };
    let mut keeper = match options.resume {
        Some(number) => resume(parts, state_dir, number)?,
        None => begin(parts, state_dir)?,
    };
    sys::trim_heap();
    Ok(keeper.run())
}

fn begin(parts: Parts, state_dir: &Path) -> Result<Keeper, Failure> {
    let path = lock::of_keeper(state_dir);
    let taken = || {
        let text = format!("another keeper works on {}", state_dir.display());
        Failure::new(Code::AlreadyRunning, anyhow!(text))
    };
    let lock = lock::take(state_dir, &path)?.ok_or_else(taken)?;
    let claim = Claim::take(state_dir, Role::Keeper).ok_or_else(taken)?;
    let inbox = Inbox::open(&parts.inbox_path)
        .with_context(|| format!("cannot listen on {}", parts.inbox_path.display()))?;
    Ok(Keeper::new(
        parts,
        (lock, claim),
        inbox,
        Kept::default(),
        Zombies::default(),
    ))
}

/// Goes on where the keeper was that this process has been.
fn resume(parts: Parts, state_dir: &Path, number: RawFd) -> Result<Keeper, Failure> {
    let told = Handover::take(number).context("cannot go on with what another keeper kept")?;
    let lock = lock::again(told.lock).context("cannot go on with the lock of another keeper")?;
    // The claim did not come through the execution. The lock did: nothing that has the name now is a
    // reason to let go of what is kept.
    let claim = Claim::take(state_dir, Role::Keeper).unwrap_or_else(Claim::none);
    let mut kept = Kept::default();
    for (name, descriptor) in told.kept {
        // What one keeper could hold another can.
        let _ = kept.insert(&name, descriptor, u64::MAX);
    }
    let inbox = Inbox::resume(told.inbox);
    let zombies = Zombies::with(told.reaped);
    let mut keeper = Keeper::new(parts, (lock, claim), inbox, kept, zombies);
    keeper.replace(told.daemon);
    Ok(keeper)
}

fn signals() -> nix::Result<SignalFd> {
    let mut wanted = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGUSR2,
    ] {
        wanted.add(signal);
    }
    // Others that somebody blocked before he started us would stay so.
    wanted.thread_set_mask()?;
    SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// As many as we may; says how many.
fn raise_descriptor_limit() -> u64 {
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = limits.and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    raised.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot raise the limit of open files");
        limits.map_or(0, |(soft, _)| soft)
    })
}

/// Leaves the launcher's session, and the descriptors that containerd was itself started with.
fn detach() -> anyhow::Result<()> {
    // Fails only for the leader of a process group, which a launcher's child is not.
    nix::unistd::setsid().context("cannot begin a session of its own")?;
    let open = std::fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")?;
    let descriptors: Vec<RawFd> = open
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&descriptor| descriptor > 2)
        .collect();
    for descriptor in descriptors {
        // Nothing of ours is open yet; the one that listed them is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}
