//! `embedshimd serve`: the phases of the daemon, in order, each with the failure it can have.

mod guardian;
mod upkeep;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds, NoFdStore};
use embedshim_core::task::{Node, NodeConfig};
use nix::fcntl::Flock;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use shim_api::bootstrap::location;
use shim_api::events::Outboxes;
use shim_api::server::{Keeping, Server};
use shim_api::services::Services;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::cli::Serve;
use crate::config::Config;
use crate::keep::Succession;
use crate::outcome::{Code, Failure};
use crate::service_manager::Manager;
use crate::service_manager::activation::Start;
use crate::state_dir::claim::{Claim, Role};
use crate::state_dir::lock;
use crate::{backend, logging, sys};
use guardian::Guardian;
use upkeep::StateDir;

/// Each stream and each operation that waits for the kernel has a thread to itself while it does, so that a file system, a logger or a
/// mount that does not answer holds up nothing else. Of a container there are at most three streams and one operation for each process,
/// and the monitor's capacity bounds the processes: this is never reached.
const BLOCKING_THREADS: usize = 65_536;
/// How long a daemon that is asked to leave finishes what it has begun.
const LEAVE: Duration = Duration::from_secs(10);
/// With fewer descriptors not even a node of the usual size can be full.
const FEW_DESCRIPTORS: u64 = 4096;
/// An idle daemon keeps no thread but its own.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Serves until SIGTERM, SIGINT or SIGHUP.
pub(crate) fn run(options: &Serve, start: Start) -> Result<Code, Failure> {
    // Signals that somebody blocked before he started us would stay blocked in every container.
    SigSet::empty()
        .thread_set_mask()
        .context("cannot unblock signals")
        .map_err(Failure::from)?;
    let config = Config::load(options.locations.config.as_deref())?;
    let state_dir = &options.locations.state_dir;
    logging::start(&config.log, options.log_level.as_deref(), state_dir)?;
    let _guards = lock(state_dir)?;
    #[cfg(feature = "failpoints")]
    embedshim_core::failpoint::arm(state_dir);
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
    let served = runtime.block_on(serve(&config, options, start));
    // Threads that a file system holds up are not waited for.
    runtime.shutdown_background();
    match served? {
        End::Asked => Ok(Code::Ok),
        End::KeeperLost((succession, kept)) => match succession.become_keeper(kept)? {},
    }
}

/// Why the daemon does not serve any more.
enum End<T = (Succession, Vec<(String, OwnedFd)>)> {
    Asked,
    KeeperLost(T),
}

async fn serve(config: &Config, options: &Serve, start: Start) -> Result<End, Failure> {
    let state_dir = &options.locations.state_dir;
    // Before anything is attached to the kernel, which outlives this process.
    let socket = location::socket(state_dir).context("cannot listen")?;
    let monitor = backend::open(config, state_dir)?;
    let backend = monitor.backend();
    let manager = manager(&start);
    let store: Arc<dyn FdStore> = match &manager {
        Some(manager) => Arc::clone(manager) as Arc<dyn FdStore>,
        None => Arc::new(NoFdStore),
    };
    let mut inherited = start.inherited;
    let listener = listen(&socket, &mut inherited, store.as_ref())?;
    let outboxes = Outboxes::open(state_dir.join("events"))
        .context("cannot take over the events of this node")?;
    let node_config = NodeConfig {
        runtime_deadline: config.runtime_deadline(),
        reap_orphans: true,
        descriptors: Arc::clone(&store),
        events: Some(outboxes.clone()),
        ..NodeConfig::new(state_dir)
    };
    let node = Node::take_over(node_config, monitor, &mut inherited)
        .await
        .context("cannot take over the tasks of this node")?;
    outboxes.start();
    sys::trim_heap();
    info!(version = env!("CARGO_PKG_VERSION"), socket = %socket.display(), %backend, "serving");
    let keeping = Keeping {
        store: Arc::clone(&store),
        directory: state_dir.join("connections"),
    };
    let server = Server::keeping(Services::new(node.clone()), keeping)
        .context("cannot note what is read from connections")?;
    server.resume(inherited.take_connections());
    // Before it is told that we serve: the keeper may end at once.
    let guardian = manager.clone().zip(start.keeper);
    let guardian =
        guardian.and_then(|(manager, keeper)| Guardian::of(keeper, manager, start.watchdog));
    if let Some((manager, period)) = manager.clone().zip(start.watchdog) {
        tokio::spawn(guardian::keep_saying(manager, period));
    }
    settle(inherited, start.unknown, store.as_ref(), manager.as_deref());
    let directory = StateDir {
        path: state_dir,
        socket: &socket,
        server: &server,
        node: &node,
        outboxes: &outboxes,
        store: store.as_ref(),
        manager: manager.as_deref(),
    };
    let end = directory
        .serve(listener, end(guardian.as_ref(), options, &node))
        .await;
    if tokio::time::timeout(LEAVE, node.quiet()).await.is_err() {
        info!("what is still under way is left to the next daemon");
    }
    if let (End::KeeperLost(succession), Some(manager)) = (end, &manager) {
        return Ok(End::KeeperLost((succession, manager.take_held())));
    }
    if let Some(Err(error)) = manager.map(|manager| manager.stopping()) {
        warn!(%error, "whoever keeps us has not heard that we leave");
    }
    info!("stopped; containers run on");
    Ok(End::Asked)
}

/// Completes when the daemon has to stop.
async fn end(guardian: Option<&Guardian>, options: &Serve, node: &Node) -> End<Succession> {
    let succession = async {
        match guardian {
            Some(guardian) => guardian.succession(options, node).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = stop() => End::Asked,
        succession = succession => End::KeeperLost(succession),
    }
}

/// Closes and forgets what nobody took, and tells that we serve.
fn settle(
    inherited: InheritedFds,
    unknown: Vec<String>,
    store: &dyn FdStore,
    manager: Option<&Manager>,
) {
    for name in inherited.close_rest() {
        info!(%name, "nobody needs a descriptor that was kept");
        if let Err(error) = store.forget(&name) {
            warn!(%name, %error, "it is still kept");
        }
    }
    let Some(manager) = manager else { return };
    for name in unknown {
        warn!(
            name,
            "a descriptor was kept whose name says nothing to this version; closed"
        );
        if let Err(error) = manager.forget_text(&name) {
            warn!(name, %error, "it is still kept");
        }
    }
    if let Err(error) = manager.ready() {
        warn!(%error, "whoever keeps us has not heard that we serve");
    }
}

/// Completes at SIGTERM, SIGINT, or SIGHUP: whoever keeps us starts the next one.
async fn stop() {
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::hangup()),
    ) else {
        warn!("cannot listen for SIGTERM");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// Makes the state directory and takes it for this process alone.
fn lock(state_dir: &Path) -> Result<(Flock<File>, Claim), Failure> {
    let taken = || {
        let text = format!(
            "another embedshimd works on {}; stop it first, or use another --state-dir",
            state_dir.display()
        );
        Failure::new(Code::AlreadyRunning, anyhow!(text))
    };
    let lock = lock::take(state_dir, &lock::of_daemon(state_dir))?.ok_or_else(taken)?;
    let claim = Claim::take(state_dir, Role::Daemon).ok_or_else(taken)?;
    Ok((lock, claim))
}

/// A predecessor's listener if we can use it, or a new one; kept for our successors either way.
fn listen(
    path: &Path,
    inherited: &mut InheritedFds,
    store: &dyn FdStore,
) -> anyhow::Result<UnixListener> {
    if let Some(descriptor) = inherited.take(&FdName::Listener) {
        match shim_api::socket::resume(descriptor, path) {
            Ok(listener) => return Ok(listener),
            Err(error) => {
                warn!(%error, "the listener that was kept is of no use; listening anew");
                let _ = store.forget(&FdName::Listener);
            }
        }
    }
    let listener = shim_api::socket::listen(path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    if let Err(error) = store.keep(&FdName::Listener, &[listener.as_fd()]) {
        warn!(%error, "the listener is not kept: nobody can connect while the daemon is replaced");
    }
    Ok(listener)
}

/// Who keeps our descriptors, if anybody does.
fn manager(start: &Start) -> Option<Arc<Manager>> {
    let Some(address) = &start.notify_socket else {
        warn!(
            "nobody keeps our connections: started by neither systemd nor `embedshimd keep`, they end with this daemon"
        );
        return None;
    };
    let is_keeper = start.keeper.is_some();
    match Manager::new(address, start.store_limit, &start.inherited, is_keeper) {
        Ok(manager) => Some(Arc::new(manager)),
        Err(error) => {
            warn!(%error, address = %address.display(), "NOTIFY_SOCKET is of no use: our connections end with this daemon");
            None
        }
    }
}

/// A container costs a handful of descriptors; the usual soft limit of 1,024 is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    match raised {
        Ok(hard) if hard < FEW_DESCRIPTORS => warn!(
            hard,
            "few files may be open at once (RLIMIT_NOFILE): each container needs up to ten here and thirty with the keeper; raise the \
             hard limit of containerd or of the unit (LimitNOFILE=)"
        ),
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot raise the limit of open files"),
    }
}
