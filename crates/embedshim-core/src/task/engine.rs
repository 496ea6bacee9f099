//! [`Engine`]: what all operations of a node work with, and the only place that writes records and
//! emits events. Never runs an operation itself: those are its methods in [`ops`](super::ops),
//! [`exits`](super::exits) and [`recovery`](super::recovery).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::blocking::quickly;
use crate::cgroup::OomWatcher;
use crate::clock::Numbers;
use crate::error::Error;
use crate::event::{Event, EventKind};
use crate::exit::{ExitMonitor, Survives, Watched};
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::process::{Process, ProcessIdentity};
use crate::reaper::Reaper;
use crate::runtime::Calls;
use crate::stdio::Idle;
use crate::task::config::NodeConfig;
use crate::task::context::RequestId;
use crate::task::process::TaskProcess;
use crate::task::registry::Registry;
use crate::task::standing::Recording;
use crate::task::store::{Saved, Store};
use crate::task::task::Task;

/// A request that has not come again after this never will: its connection is lost.
const ABANDONED: Duration = Duration::from_secs(30);

/// What all operations of a node work with.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) config: NodeConfig,
    pub(crate) boot_id: String,
    pub(crate) store: Store,
    pub(crate) monitor: Arc<dyn ExitMonitor>,
    pub(crate) reaper: Reaper,
    pub(crate) calls: Calls,
    pub(crate) oom: OomWatcher,
    pub(crate) idle: Idle,
    pub(crate) registry: Registry,
    events: mpsc::UnboundedSender<Event>,
    /// Of processes' sets of descriptors.
    numbers: Numbers,
    /// The client's ends of creations that were cut short, for the request when it comes again.
    abandoned: Mutex<HashMap<RequestId, ProcessFds>>,
    mutations: watch::Sender<usize>,
}

/// A mutation in flight, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Mutation(Arc<Engine>);

impl Drop for Mutation {
    fn drop(&mut self) {
        self.0.mutations.send_modify(|count| *count -= 1);
    }
}

impl Engine {
    pub(crate) fn new(
        config: NodeConfig,
        boot_id: String,
        store: Store,
        monitor: Arc<dyn ExitMonitor>,
        oom: OomWatcher,
        idle: Idle,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        Self {
            calls: Calls::new(config.observer.clone()),
            config,
            boot_id,
            store,
            monitor,
            reaper: Reaper::default(),
            oom,
            idle,
            registry: Registry::default(),
            events,
            numbers: Numbers::default(),
            abandoned: Mutex::default(),
            mutations: watch::Sender::new(0),
        }
    }

    /// Writes the task's record.
    pub(crate) async fn save(&self, task: &Task) -> Result<Saved, Error> {
        let recording = task.lock_recording().await;
        if *recording == Recording::Ended {
            return Ok(Saved::without_record());
        }
        let record = task.record(&self.boot_id);
        let is_small = record.is_small();
        self.at_store(is_small, move |store| store.save(&record))
            .await?
    }

    /// Removes the task's record for good: what is saved later is not written.
    pub(crate) async fn remove_record(&self, task: &Task) -> Result<(), Error> {
        let mut recording = task.lock_recording().await;
        if *recording == Recording::Ended {
            return Ok(());
        }
        let key = task.key.clone();
        self.at_store(true, move |store| store.remove(&key))
            .await??;
        *recording = Recording::Ended;
        Ok(())
    }

    /// Works at the store: on the reactor if that takes microseconds whatever happens, since a
    /// thread is not worth the way there and back.
    async fn at_store<T: Send + 'static>(
        &self,
        is_small: bool,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, Error> {
        if is_small && self.store.is_in_memory() {
            return Ok(work(&self.store));
        }
        let store = self.store.clone();
        quickly(move || work(&store)).await
    }

    /// Emits an event of a task, unless the task is given up. Operations call it before they save
    /// the change that the event reports, and an exit is emitted after it was saved (invariant 15).
    pub(crate) fn emit(&self, task: &Task, kind: EventKind) {
        if task.is_given_up() {
            return;
        }
        let event = Event {
            namespace: task.key.namespace.clone(),
            id: task.key.id.clone(),
            owner: task.owner.clone(),
            at: SystemTime::now(),
            kind,
        };
        match &self.config.events {
            Some(sink) => sink.accept(event),
            // Without a listener the node is used as a library that does not want events.
            None => drop(self.events.send(event)),
        }
    }

    /// Emits the init's exit event, the last of its container, if it is due now.
    pub(crate) fn emit_init_exit(&self, task: &Task, due: Option<EventKind>) {
        if let Some(exit) = due {
            self.emit(task, exit);
            task.mark_exit_emitted();
        }
    }

    /// The descriptors of a new process: none yet.
    pub(crate) fn new_fds(&self) -> ProcessFds {
        self.fds_of(self.numbers.draw())
    }

    /// The descriptors that are kept under the number that a record names.
    pub(crate) fn fds_of(&self, number: u64) -> ProcessFds {
        if number == 0 {
            return self.new_fds();
        }
        ProcessFds::new(Arc::clone(&self.config.descriptors), number)
    }

    /// Keeps what the client of a creation that was cut short has given, until its request comes
    /// again or for [`ABANDONED`].
    pub(crate) fn leave_client_ends(self: &Arc<Self>, request: Option<RequestId>, fds: ProcessFds) {
        let Some(request) = request else {
            return fds.remove_all();
        };
        if let Some(older) = self.abandoned().insert(request, fds) {
            // Of a daemon that died while it handed them over: they are the same.
            older.remove_all();
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(ABANDONED).await;
            if let Some(fds) = engine.take_client_ends(Some(request)) {
                fds.remove_all();
            }
        });
    }

    /// What was left for this request.
    pub(crate) fn take_client_ends(&self, request: Option<RequestId>) -> Option<ProcessFds> {
        self.abandoned().remove(&request?)
    }

    fn abandoned(&self) -> MutexGuard<'_, HashMap<RequestId, ProcessFds>> {
        self.abandoned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A mutation is in flight for as long as the answer lives.
    pub(crate) fn mutation(self: &Arc<Self>) -> Mutation {
        self.mutations.send_modify(|count| *count += 1);
        Mutation(Arc::clone(self))
    }

    /// Waits until no mutation is in flight.
    pub(crate) async fn quiet(&self) {
        // The sender is a field of this struct: it cannot be gone.
        let _ = self
            .mutations
            .subscribe()
            .wait_for(|count| *count == 0)
            .await;
    }

    /// Runs `work` as a task of its own and waits for it: a mutation must not end half-way because
    /// its client hung up. Dropping this future abandons the answer only.
    pub(crate) async fn detached<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let mutation = self.mutation();
        let work = async move {
            let result = work.await;
            drop(mutation);
            result
        };
        #[cfg(feature = "spans")]
        let work = crate::runtime::caller::inherit(work);
        match tokio::spawn(work).await {
            Ok(result) => result,
            Err(panic) => Err(Error::Internal(panic.to_string())),
        }
    }

    /// Watches a process that was just started. From here on its exit finds its task; if it is over
    /// already, the exit waits in the process as one that came early.
    pub(crate) async fn watch(
        &self,
        task: &Arc<Task>,
        owner: &Arc<TaskProcess>,
        process: Arc<Process>,
    ) -> Result<(), Error> {
        self.registry.track(process.identity(), task, owner);
        owner.set_process(Arc::clone(&process));
        if owner.exec.is_some() {
            // Known before it is watched: a successor finds the kernel's record of its end by this
            // alone. (An init cannot end before it is durable: it waits to be started, and a
            // creation that is cut short is undone.)
            self.save(task).await?;
        }
        if self.monitor.guarantees().survives == Survives::WithDescriptors
            && let Some(pidfd) = process.pidfd()
        {
            let kept = pidfd
                .try_clone_to_owned()
                .and_then(|pidfd| owner.fds.insert([(FdRole::Pidfd, StreamFd::new(pidfd))]));
            if let Err(error) = kept {
                warn!(
                    id = %task.id(), %error,
                    "cannot store a pidfd: an exit while no daemon runs will be unknown"
                );
            }
        }
        match self.monitor.watch(process).await? {
            Watched::Armed => {}
            Watched::Ended(record) => drop(owner.report(record)),
        }
        Ok(())
    }

    /// Ends the watch of a process whose exit is of no interest.
    pub(crate) async fn unwatch(&self, task: &Task, identity: ProcessIdentity) {
        self.registry.untrack(identity);
        if let Err(error) = self.monitor.unwatch(identity).await {
            warn!(id = %task.id(), pid = identity.pid, %error, "cannot end the watch of a process");
        }
    }
}
