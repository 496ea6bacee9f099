//! `embedshimd serve`: the phases of the daemon, in order, each with the failure it can have.

mod base;
mod durables;
mod guardian;
mod heir;
mod listener;
mod oversight;
mod pods;
mod threads;
mod upkeep;
mod urgency;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use embedshim_core::exit::{Backend, Guarantees};
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds, Intake, Listener, NoFdStore};
use embedshim_core::task::{Node, NodeConfig};
use shim_api::bootstrap::location;
use shim_api::events::Outboxes;
use shim_api::server::{ConnectionStorage, Server};
use shim_api::services::Services;
use tracing::{info, warn};

use crate::admin::view::Serving;
use crate::cli::Serve;
use crate::config::Config;
use crate::history::{History, Remembered};
use crate::keep::Succession;
use crate::metrics::{Metrics, Observed};
use crate::outcome::{Code, Failure};
use crate::service_manager::ServiceManager;
use crate::service_manager::activation::Activation;
use crate::signals::{Ending, Request, Requests};
use crate::state_dir::lock;
use crate::traces::{Traced, Traces};
use crate::{backend, sys};
use base::Base;
use durables::Parts;
use guardian::{Guardian, Keeper};
use oversight::{Kept, Oversight};
use pods::PodService;
use urgency::Urgency;

/// How long a daemon that is asked to leave continues what is in flight.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// Serves until SIGTERM, SIGINT or SIGHUP. If the keeper ends, before this process serves or
/// afterwards, it takes the keeper's place and does not return.
pub(crate) fn run(options: &Serve, activation: Activation) -> Result<Code, Failure> {
    let keeper = activation.keeper.and_then(Keeper::watch);
    let keeper = keeper.as_ref();
    let Base {
        config,
        runtime,
        _guards,
    } = match Base::prepare(options) {
        Ok(base) => base,
        Err(failure) => {
            let descriptors = activation.inherited.into_all();
            let named = descriptors.map(|(name, descriptor)| (name.to_string(), descriptor));
            return Err(heir::succeed_instead(
                failure,
                keeper,
                options,
                named.collect(),
            ));
        }
    };
    let manager = connect_manager(&activation);
    let kept = Kept {
        manager: manager.clone(),
        keeper: activation.keeper,
        predecessor: activation.predecessor.clone(),
    };
    let state_dir = &options.locations.state_dir;
    let oversight = Oversight::begin(state_dir, &config, kept, runtime.handle().clone());
    let ending = Ending::watch().context("cannot listen for signals")?;
    let traces = Traces::start(&config);
    let urgency = Urgency::begin();
    let served = runtime.block_on(serve(
        &config,
        options,
        activation,
        keeper,
        manager.as_ref(),
        &oversight,
        &traces,
    ));
    drop(urgency);
    let (reason, was_asked) = last_words(&served);
    oversight.lives.end(&reason, was_asked);
    // Does not wait for threads that a file system holds up.
    runtime.shutdown_background();
    // After it: what was in flight has its spans, too.
    traces.end();
    let has_keeper_ended = keeper.is_some_and(Keeper::has_ended);
    if has_keeper_ended && ending.is_due() {
        return served.map(|_| Code::Ok);
    }
    let descriptors = || manager.map_or_else(Vec::new, |manager| manager.take_duplicates());
    match served {
        Ok(End::Succession(succession)) => match succession.become_keeper(descriptors())? {},
        Ok(End::EarlySuccession) => Err(heir::become_keeper(options, descriptors())),
        // Nothing would come for which it makes way.
        Ok(End::Requested(Request::MakeWay)) if has_keeper_ended => {
            Err(heir::become_keeper(options, descriptors()))
        }
        Ok(End::Requested(_)) => Ok(Code::Ok),
        Err(failure) => {
            let descriptors = descriptors();
            Err(heir::succeed_instead(failure, keeper, options, descriptors))
        }
    }
}

/// Why the daemon stops to serve.
enum End {
    /// A signal has asked for it.
    Requested(Request),
    /// The keeper has ended, and this process is ready to take its place.
    Succession(Succession),
    /// The keeper has ended before this process served.
    EarlySuccession,
}

async fn serve(
    config: &Config,
    options: &Serve,
    activation: Activation,
    keeper: Option<&Keeper>,
    manager: Option<&Arc<ServiceManager>>,
    oversight: &Oversight,
    traces: &Traces,
) -> Result<End, Failure> {
    let mut requests = Requests::listen().context("cannot listen for signals")?;
    let watchdog = activation.watchdog;
    let guardian = keeper
        .zip(manager)
        .map(|(keeper, manager)| Guardian::new(keeper, manager, watchdog));
    let mut unknown_names = Vec::new();
    // A start can be given up at any point, as a killed daemon gives it up.
    let started = tokio::select! {
        biased;
        end = early_end(guardian.as_ref(), &mut requests) => return Ok(end),
        started = start(
            config,
            options,
            activation,
            manager,
            (&oversight.history, traces),
            &mut unknown_names,
        ) => started?,
    };
    if let Some((manager, period)) = manager.cloned().zip(watchdog) {
        let (node, backend) = (started.node.clone(), started.backend);
        let does = move || {
            let (tasks, watched) = (node.task_count(), node.watched());
            format!("serving; tasks: {tasks}, processes watched by {backend}: {watched}")
        };
        tokio::spawn(guardian::notify_alive(manager, period, does));
    }
    if let Some(manager) = manager {
        report_ready(manager, unknown_names);
    }

    let Started {
        socket,
        listener,
        node,
        outboxes,
        server,
        store,
        guarantees,
        backend,
        metrics,
        pods,
    } = started;
    oversight.serves(Serving {
        node: node.clone(),
        outboxes: Arc::clone(&outboxes),
        connections: server.connections(),
        backend,
        guarantees,
        metrics,
        sandboxes: pods.as_ref().map(|pods| pods.sandboxes().clone()),
    });
    let parts = Parts {
        state_dir: &options.locations.state_dir,
        socket: &socket,
        server: &server,
        node: &node,
        outboxes: &outboxes,
        store: store.as_ref(),
        manager: manager.map(Arc::as_ref),
        oversight,
        pods: pods.as_ref(),
    };
    let end = end(guardian.as_ref(), &mut requests, options, &node);
    let end = upkeep::serve(&parts, listener, end).await;
    oversight.leaves();
    if let Some(pods) = &pods {
        pods.leave().await;
    }
    Ok(leave(end, &node, parts.manager).await)
}

/// A daemon that can serve.
struct Started {
    socket: PathBuf,
    listener: Listener,
    node: Node,
    outboxes: Arc<Outboxes>,
    server: Server<Traced<Observed<Services>>>,
    store: Arc<dyn FdStore>,
    backend: Backend,
    guarantees: Guarantees,
    metrics: Arc<Metrics>,
    pods: Option<PodService>,
}

/// Takes over what a predecessor has left.
async fn start(
    config: &Config,
    options: &Serve,
    activation: Activation,
    manager: Option<&Arc<ServiceManager>>,
    (history, traces): (&Arc<History>, &Traces),
    unknown_names: &mut Vec<String>,
) -> Result<Started, Failure> {
    let state_dir = &options.locations.state_dir;
    // Checked before anything is attached to the kernel, which outlives this process.
    let socket = location::socket(state_dir).context("cannot listen")?;
    let monitor = backend::open(config, state_dir)?;
    let (backend, guarantees) = (monitor.backend(), monitor.guarantees());
    let metrics = Metrics::new(backend);

    // The listener, events, tasks with their streams.
    let store: Arc<dyn FdStore> = match manager {
        Some(manager) => Arc::clone(manager) as Arc<dyn FdStore>,
        None => Arc::new(NoFdStore),
    };
    let mut inherited = activation.inherited;
    *unknown_names = activation.unknown_names;
    let listener = listener::open(&FdName::Listener, &socket, &mut inherited, store.as_ref())?;
    let outboxes = Outboxes::open(state_dir.join("events"))
        .context("cannot take over the events of this node")?;
    let node_config = NodeConfig {
        runtime_deadline: config.runtime_deadline(),
        reap_orphans: true,
        descriptors: Arc::clone(&store),
        events: Some(Arc::new(Remembered {
            sink: outboxes.clone(),
            history: Arc::clone(history),
        })),
        observer: Some(metrics.clone()),
        ..NodeConfig::new(state_dir)
    };
    let node = Node::take_over(node_config, monitor, &mut inherited)
        .await
        .context("cannot take over the tasks of this node")?;
    outboxes.start();
    // Before the first request of a task: it may be in one.
    let pods = if config.sandbox.enabled {
        let places = (state_dir.as_path(), socket.as_path());
        let observer = Arc::clone(history);
        let opened = PodService::open(
            &config.sandbox,
            places,
            observer,
            &mut inherited,
            store.as_ref(),
        );
        Some(opened.await?)
    } else {
        pods::warn_of_left(state_dir);
        None
    };
    sys::trim_heap();
    info!(version = lock::VERSION, socket = %socket.display(), %backend, "serving");

    // Its connections, with the requests that it has not answered.
    let storage = ConnectionStorage {
        store: Arc::clone(&store),
        intake: Intake::open(&mut inherited, store.as_ref())
            .context("cannot make the queue of accepted connections")?,
        journals: state_dir.join("connections"),
    };
    let mut services = Services::new(node.clone());
    if let Some(pods) = &pods {
        services = services.with_pods(pods.of_tasks());
    }
    let services = traces.of(Observed::new(services, Arc::clone(&metrics)));
    let server =
        Server::durable(services, storage).context("cannot open the journals of connections")?;
    server.resume(inherited.take_connections()).await;
    if let Some(pods) = &pods {
        pods.clean_up(&node);
    }
    close_unused(inherited, store.as_ref());
    Ok(Started {
        socket,
        listener,
        node,
        outboxes,
        server,
        store,
        backend,
        guarantees,
        metrics,
        pods,
    })
}

/// Completes when a daemon that does not serve yet has to stop.
async fn early_end(guardian: Option<&Guardian<'_>>, requests: &mut Requests) -> End {
    let succession = async {
        match guardian {
            Some(guardian) => guardian.early_succession().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        request = asked_to_leave(guardian, requests) => End::Requested(request),
        () = succession => End::EarlySuccession,
    }
}

/// Completes when the daemon has to stop.
async fn end(
    guardian: Option<&Guardian<'_>>,
    requests: &mut Requests,
    options: &Serve,
    node: &Node,
) -> End {
    let succession = async {
        match guardian {
            Some(guardian) => guardian.succession(options, node).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        request = asked_to_leave(guardian, requests) => End::Requested(request),
        succession = succession => End::Succession(succession),
    }
}

/// Completes when a signal asks this process to leave.
async fn asked_to_leave(guardian: Option<&Guardian<'_>>, requests: &mut Requests) -> Request {
    loop {
        let request = requests.next().await;
        // Without a keeper no other daemon would come. The kernel itself sends SIGHUP then, to a
        // stopped daemon, which it lets go on.
        if request == Request::Leave || !guardian.is_some_and(Guardian::has_keeper_ended) {
            return request;
        }
    }
}

/// Why the daemon ends, for its successor, and whether it was asked to.
fn last_words(served: &Result<End, Failure>) -> (String, bool) {
    let (words, was_asked) = match served {
        Ok(End::Requested(Request::Leave)) => ("it was asked to leave (SIGTERM, SIGINT)", true),
        Ok(End::Requested(Request::MakeWay)) => ("it was asked to make way (SIGHUP)", true),
        Ok(End::Succession(_) | End::EarlySuccession) => {
            ("it took the place of the keeper, which had ended", false)
        }
        Err(failure) => {
            let words = format!(
                "it failed: {}",
                embedshim_core::chain(failure.error.as_ref())
            );
            return (words, false);
        }
    };
    (words.to_owned(), was_asked)
}

/// Waits for what is in flight, and says goodbye to the service manager.
async fn leave(end: End, node: &Node, manager: Option<&ServiceManager>) -> End {
    if tokio::time::timeout(LEAVE_LIMIT, node.quiet())
        .await
        .is_err()
    {
        info!(
            limit = ?LEAVE_LIMIT,
            "operations are still in flight: the next daemon continues them"
        );
    }
    if !matches!(end, End::Requested(_)) {
        return end;
    }
    if let Some(Err(error)) = manager.map(ServiceManager::notify_stopping) {
        warn!(%error, "cannot notify the service manager: STOPPING=1 was not handled");
    }
    info!("stopped; containers run on");
    end
}

/// Closes inherited descriptors that no task and no connection has taken, and removes them from the
/// store.
fn close_unused(inherited: InheritedFds, store: &dyn FdStore) {
    for name in inherited.close_rest() {
        info!(%name, "closing a stored descriptor: no task or connection needs it");
        if let Err(error) = store.remove(&name) {
            warn!(%name, %error, "cannot remove a descriptor from the store");
        }
    }
}

/// Removes what is stored under names of another version, and says that this daemon serves.
fn report_ready(manager: &ServiceManager, unknown_names: Vec<String>) {
    for name in unknown_names {
        warn!(
            name,
            "closing a stored descriptor: this version does not know its name"
        );
        if let Err(error) = manager.remove_unknown(&name) {
            warn!(name, %error, "cannot remove a descriptor from the store");
        }
    }
    if let Err(error) = manager.notify_ready() {
        warn!(%error, "cannot notify the service manager: READY=1 was not delivered");
    }
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
