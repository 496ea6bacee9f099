//! `embedshimd serve`: the phases of the daemon, in order, each with the failure it can have.

mod durables;
mod guardian;
mod listener;
mod upkeep;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use embedshim_core::fdstore::{FdStore, InheritedFds, NoFdStore};
use embedshim_core::task::{Node, NodeConfig};
use nix::fcntl::Flock;
use shim_api::bootstrap::location;
use shim_api::events::Outboxes;
use shim_api::server::{Keeping, Server};
use shim_api::services::Services;
use tracing::{info, warn};

use crate::cli::Serve;
use crate::config::Config;
use crate::keep::Succession;
use crate::outcome::{Code, Failure};
use crate::service_manager::ServiceManager;
use crate::service_manager::activation::Activation;
use crate::state_dir::claim::{Claim, Role};
use crate::state_dir::lock;
use crate::{backend, limits, logging, signals, sys};
use durables::Parts;
use guardian::Guardian;

/// The most threads for what blocks. Each stream, and each operation that waits for the kernel, has
/// a thread to itself while it does, so that a file system, a logger or a mount that does not
/// answer holds up nothing else. A container has at most three streams and one operation for each
/// process, and the monitor's capacity bounds the processes: this is never reached.
const BLOCKING_THREADS: usize = 65_536;
/// How long a blocking thread waits for work: an idle daemon has no thread but its own.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long a daemon that is asked to leave continues what is in flight.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// Below this hard limit of open files not even a node of the usual size can be full.
const FEW_DESCRIPTORS: u64 = 4096;

/// Serves until SIGTERM, SIGINT or SIGHUP.
pub(crate) fn run(options: &Serve, activation: Activation) -> Result<Code, Failure> {
    signals::unblock_all()
        .context("cannot unblock signals")
        .map_err(Failure::from)?;
    let config = Config::load(options.locations.config.as_deref())?;
    let state_dir = &options.locations.state_dir;
    logging::start(&config.log, options.log_level.as_deref(), state_dir)?;
    let _guards = lock_state_dir(state_dir)?;
    #[cfg(feature = "failpoints")]
    embedshim_core::failpoint::arm(state_dir);
    raise_descriptor_limit();
    // `runc create` leaves containers behind: a subreaper becomes their parent, and learns their
    // status by waitid.
    nix::sys::prctl::set_child_subreaper(true)
        .context("cannot become a child subreaper")
        .map_err(Failure::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .build()
        .context("cannot start the async runtime")?;
    let served = runtime.block_on(serve(&config, options, activation));
    // Does not wait for threads that a file system holds up.
    runtime.shutdown_background();
    match served? {
        End::Requested => Ok(Code::Ok),
        End::KeeperEnded((succession, descriptors)) => {
            match succession.become_keeper(descriptors)? {}
        }
    }
}

/// Why the daemon stops to serve. `T`: what it needs to become the keeper.
enum End<T = (Succession, Vec<(String, OwnedFd)>)> {
    Requested,
    KeeperEnded(T),
}

async fn serve(config: &Config, options: &Serve, activation: Activation) -> Result<End, Failure> {
    let state_dir = &options.locations.state_dir;
    // Checked before anything is attached to the kernel, which outlives this process.
    let socket = location::socket(state_dir).context("cannot listen")?;
    let monitor = backend::open(config, state_dir)?;
    let backend = monitor.backend();

    // What a predecessor has left: the listener, events, tasks with their streams.
    let manager = connect_manager(&activation);
    let store: Arc<dyn FdStore> = match &manager {
        Some(manager) => Arc::clone(manager) as Arc<dyn FdStore>,
        None => Arc::new(NoFdStore),
    };
    let mut inherited = activation.inherited;
    let listener = listener::open(&socket, &mut inherited, store.as_ref())?;
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
    info!(version = lock::VERSION, socket = %socket.display(), %backend, "serving");

    // Its connections, with the requests that it has not answered.
    let keeping = Keeping {
        store: Arc::clone(&store),
        directory: state_dir.join("connections"),
    };
    let server = Server::keeping(Services::new(node.clone()), keeping)
        .context("cannot open the journals of connections")?;
    server.resume(inherited.take_connections());

    // The keeper is watched before it learns that this daemon serves: it may end right then.
    let guardian = manager.clone().zip(activation.keeper);
    let guardian =
        guardian.and_then(|(manager, keeper)| Guardian::new(keeper, manager, activation.watchdog));
    if let Some((manager, period)) = manager.clone().zip(activation.watchdog) {
        tokio::spawn(guardian::notify_alive(manager, period));
    }
    close_unused(inherited, store.as_ref());
    if let Some(manager) = &manager {
        report_ready(manager, activation.unknown_names);
    }

    let parts = Parts {
        state_dir,
        socket: &socket,
        server: &server,
        node: &node,
        outboxes: &outboxes,
        store: store.as_ref(),
        manager: manager.as_deref(),
    };
    let end = upkeep::serve(&parts, listener, end(guardian.as_ref(), options, &node)).await;
    leave(end, &node, manager.as_deref()).await
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
        () = signals::leave_requested() => End::Requested,
        succession = succession => End::KeeperEnded(succession),
    }
}

/// Waits for what is in flight, and says goodbye to the service manager.
async fn leave(
    end: End<Succession>,
    node: &Node,
    manager: Option<&ServiceManager>,
) -> Result<End, Failure> {
    if tokio::time::timeout(LEAVE_LIMIT, node.quiet())
        .await
        .is_err()
    {
        info!(
            limit = ?LEAVE_LIMIT,
            "operations are still in flight: the next daemon continues them"
        );
    }
    if let (End::KeeperEnded(succession), Some(manager)) = (end, manager) {
        return Ok(End::KeeperEnded((succession, manager.take_duplicates())));
    }
    if let Some(Err(error)) = manager.map(ServiceManager::notify_stopping) {
        warn!(%error, "cannot notify the service manager: STOPPING=1 was not handled");
    }
    info!("stopped; containers run on");
    Ok(End::Requested)
}

/// Closes inherited descriptors that no task and no connection has taken, and removes them from the
/// store.
fn close_unused(inherited: InheritedFds, store: &dyn FdStore) {
    for name in inherited.close_rest() {
        info!(%name, "closing a stored descriptor that no task or connection needs");
        if let Err(error) = store.forget(&name) {
            warn!(%name, %error, "cannot remove a descriptor from the store");
        }
    }
}

/// Removes what is stored under names of another version, and says that this daemon serves.
fn report_ready(manager: &ServiceManager, unknown_names: Vec<String>) {
    for name in unknown_names {
        warn!(
            name,
            "closing a stored descriptor whose name this version does not know"
        );
        if let Err(error) = manager.remove_unknown(&name) {
            warn!(name, %error, "cannot remove a descriptor from the store");
        }
    }
    if let Err(error) = manager.notify_ready() {
        warn!(%error, "cannot notify the service manager: READY=1 was not delivered");
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
    let lock = lock::take(state_dir, &lock::daemon_path(state_dir))?.ok_or_else(taken)?;
    let claim = Claim::take(state_dir, Role::Daemon).ok_or_else(taken)?;
    Ok((lock, claim))
}

/// The service manager that stores this daemon's descriptors, if there is one.
fn connect_manager(activation: &Activation) -> Option<Arc<ServiceManager>> {
    let Some(address) = &activation.notify_socket else {
        warn!(
            "no service manager stores connections: started by neither systemd nor `embedshimd \
             keep`, they end with this daemon"
        );
        return None;
    };
    let is_keeper = activation.keeper.is_some();
    let connected = ServiceManager::connect(
        address,
        activation.store_limit,
        &activation.inherited,
        is_keeper,
    );
    match connected {
        Ok(manager) => Some(Arc::new(manager)),
        Err(error) => {
            warn!(
                %error,
                address = %address.display(),
                "cannot connect to NOTIFY_SOCKET: connections end with this daemon"
            );
            None
        }
    }
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
