//! `embedshimd serve`: the phases of the daemon, in order, each with the failure it can have.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use embedshim_core::exit::Promise;
use embedshim_core::task::{Node, NodeConfig};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use shim_api::bootstrap::location;
use shim_api::events::EventForwarder;
use shim_api::server::Server;
use shim_api::services::Services;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::cli::Serve;
use crate::config::Config;
use crate::outcome::{Code, Failure};
use crate::{backend, logging, sys};

/// Blocking file-system work of that many containers goes on at once; more wait.
const BLOCKING_THREADS: usize = 32;
/// How long a daemon that is asked to leave finishes what it has begun.
const LEAVE: Duration = Duration::from_secs(10);
/// An idle daemon keeps no thread but its own.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(options: &Serve) -> Result<Code, Failure> {
    if options.detached {
        detach()?;
    }
    // Signals that somebody blocked before he started us would stay blocked in every container.
    SigSet::empty()
        .thread_set_mask()
        .context("cannot unblock signals")
        .map_err(Failure::from)?;
    let config = Config::load(options.locations.config.as_deref())?;
    logging::start(&config.log, options.log_level.as_deref())?;
    let state_dir = &options.locations.state_dir;
    let _lock = lock(state_dir)?;
    raise_descriptor_limit();
    // Containers are left behind by `runc create`: as a subreaper we inherit them and learn their status by waitid.
    nix::sys::prctl::set_child_subreaper(true)
        .context("cannot become a child subreaper")
        .map_err(Failure::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(serve(&config, state_dir))
}

async fn serve(config: &Config, state_dir: &Path) -> Result<Code, Failure> {
    let report = backend::probe(state_dir, config);
    let choice = report
        .choice()
        .map_err(|none| Failure::new(Code::Unsupported, none))?;
    if report.promise != Promise::Kept {
        warn!(backend = %choice.backend, "exits can be lost while the daemon is down");
        for remedy in &report.remedies {
            warn!("to improve: {remedy}");
        }
    }
    let monitor = backend::open(choice, config, state_dir)
        .with_context(|| format!("cannot start the {} exit monitor", choice.backend))?;
    let socket = location::socket(state_dir).context("cannot listen")?;
    let listener = shim_api::socket::listen(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    let node_config = NodeConfig {
        runtime_deadline: config.runtime_deadline(),
        reap_orphans: true,
        ..NodeConfig::new(state_dir)
    };
    let node = Node::open(node_config, monitor)
        .await
        .context("cannot take over the tasks of this node")?;
    let forwarder = tokio::spawn(EventForwarder::new(node.clone()).run());
    sys::trim_heap();
    info!(version = env!("CARGO_PKG_VERSION"), socket = %socket.display(), backend = %choice.backend, "serving");
    Server::new(Services::new(node.clone()))
        .serve(&listener, stop())
        .await;
    if tokio::time::timeout(LEAVE, node.quiet()).await.is_err() {
        info!("what is still under way is left to the next daemon");
    }
    forwarder.abort();
    info!("stopped; containers run on");
    Ok(Code::Ok)
}

/// Leaves the launcher's session, and the descriptors that containerd was itself started with.
fn detach() -> anyhow::Result<()> {
    // Fails only for the leader of a process group, which a launcher's child is not.
    nix::unistd::setsid().context("cannot begin a session of its own")?;
    let open = std::fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")?;
    let descriptors: Vec<i32> = open
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&descriptor| descriptor > 2)
        .collect();
    for descriptor in descriptors {
        // Nothing of ours is open yet; the one that listed them is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

/// Completes at SIGTERM or SIGINT.
async fn stop() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        warn!("cannot listen for SIGTERM");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Makes the state directory and takes it for this process alone.
fn lock(state_dir: &Path) -> Result<Flock<File>, Failure> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .with_context(|| format!("cannot create the state directory {}", state_dir.display()))?;
    let path = state_dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write to the state directory: {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => Failure::new(
            Code::AlreadyRunning,
            anyhow!(
                "another embedshimd works on {}; stop it first, or use another --state-dir",
                state_dir.display()
            ),
        ),
        other => Failure::from(
            anyhow::Error::from(other).context(format!("cannot lock {}", path.display())),
        ),
    })
}

/// A container costs a handful of descriptors; the usual soft limit of 1,024 is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
}
