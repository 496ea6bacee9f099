//! [`Base`]: what a daemon needs before it takes over anything: configuration, log, the state
//! directory for itself alone, limits, the async runtime. Owns the order of these.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nix::fcntl::Flock;
use tokio::runtime::Runtime;
use tracing::warn;

use super::threads;
use crate::cli::Serve;
use crate::config::Config;
use crate::outcome::{Code, Failure};
use crate::state_dir::claim::{Claim, Role};
use crate::state_dir::lock;
use crate::{limits, logging, signals, sys};

/// The most threads for what blocks. Each stream, and each operation that waits for the kernel, has
/// a thread to itself while it does, so that a file system, a logger or a mount that does not
/// answer holds up nothing else. A container has at most three streams and one operation for each
/// process, and the monitor's capacity bounds the processes: this is never reached.
const BLOCKING_THREADS: usize = 65_536;
/// How long a blocking thread waits for work: an idle daemon has no thread but its own.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long a child of a daemon that was killed may have the lock as well, and the time between two
/// looks: without a keeper, which may be killed in the same moment, no other start would come.
const OF_CHILDREN: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(5);
/// Below this hard limit of open files not even a node of the usual size can be full.
const FEW_DESCRIPTORS: u64 = 4096;

/// What a daemon needs before it does anything.
pub(super) struct Base {
    pub(super) config: Config,
    pub(super) runtime: Runtime,
    pub(super) _guards: (Flock<File>, Claim),
}

impl Base {
    pub(super) fn prepare(options: &Serve) -> Result<Self, Failure> {
        signals::hold_back_requests()
            .context("cannot block signals")
            .map_err(Failure::from)?;
        let config = Config::load(options.locations.config.as_deref())?;
        let state_dir = &options.locations.state_dir;
        logging::start(&config.log, options.log_level.as_deref(), state_dir)?;
        let guards = lock_state_dir(state_dir)?;
        #[cfg(feature = "failpoints")]
        embedshim_core::failpoint::arm(state_dir);
        raise_descriptor_limit();
        // `runc create` leaves containers behind: a subreaper becomes their parent, and learns
        // their status by waitid.
        nix::sys::prctl::set_child_subreaper(true)
            .context("cannot become a child subreaper")
            .map_err(Failure::from)?;
        sys::use_one_heap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_start(threads::begin)
            .on_thread_stop(threads::end)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_keep_alive(BLOCKING_KEEP_ALIVE)
            .build()
            .context("cannot start the async runtime")?;
        Ok(Self {
            config,
            runtime,
            _guards: guards,
        })
    }
}

/// Makes the state directory and takes it for this process alone (invariant 18).
fn lock_state_dir(state_dir: &Path) -> Result<(Flock<File>, Claim), Failure> {
    let taken = || {
        let text = format!(
            "another embedshimd works on {}; stop it first, or use another --state-dir",
            state_dir.display()
        );
        Failure::new(Code::AlreadyRunning, anyhow!(text))
    };
    let path = lock::daemon_path(state_dir);
    let give_up = Instant::now() + OF_CHILDREN;
    let lock = loop {
        if let Some(lock) = lock::take(state_dir, &path)? {
            break lock;
        }
        if lock::is_owner_gone(&path)? && Instant::now() < give_up {
            std::thread::sleep(PAUSE);
            continue;
        }
        break lock::take_from_killed(state_dir, &path)?.ok_or_else(taken)?;
    };
    let claim = Claim::take(state_dir, Role::Daemon).ok_or_else(taken)?;
    Ok((lock, claim))
}

/// Raises the limit of open files: a container needs a handful of descriptors, and the usual soft
/// limit of 1,024 is for programs that use select(2).
fn raise_descriptor_limit() {
    match limits::raise_open_files() {
        Ok(hard) if hard < FEW_DESCRIPTORS => warn!(
            hard,
            "few files may be open at once (RLIMIT_NOFILE): each container needs up to ten here \
             and thirty with the keeper; raise the hard limit of containerd or of the unit \
             (LimitNOFILE=)"
        ),
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot raise the limit of open files"),
    }
}
