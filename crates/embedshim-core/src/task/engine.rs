//! [`Shared`]: what all operations of a node need: the registry of tasks, who is watched, and the way out for events.
//! Never runs an operation itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::cgroup::OomWatcher;
use crate::clock::Numbers;
use crate::error::Error;
use crate::event::{Event, EventKind};
use crate::exit::{ExitMonitor, Survives, Watched};
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::id::{ProcessKey, TaskKey};
use crate::process::{Process, ProcessIdentity};
use crate::reaper::Orphans;
use crate::task::context::RequestId;
use crate::task::node::NodeConfig;
use crate::task::process::TaskProcess;
use crate::task::store::Store;
use crate::task::task::Task;

/// A request that has not come again after this never will: its connection is lost.
const ABANDONED: Duration = Duration::from_secs(30);

/// What all operations of a node need.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: NodeConfig,
    pub(crate) boot_id: String,
    pub(crate) store: Store,
    pub(crate) monitor: Arc<dyn ExitMonitor>,
    pub(crate) orphans: Orphans,
    pub(crate) oom: OomWatcher,
    pub(crate) events: mpsc::UnboundedSender<Event>,
    /// Of processes' sets of descriptors.
    numbers: Numbers,
    /// The client's ends of creations that were cut short, for the request when it comes again.
    abandoned: Mutex<HashMap<RequestId, ProcessFds>>,
    /// Mutations under way.
    at_work: watch::Sender<usize>,
    tasks: Mutex<HashMap<TaskKey, Arc<Task>>>,
    watched: Mutex<HashMap<i32, Vec<Owner>>>,
}

/// Whose a watched process is. A number can have two for a moment: one that ended and one that got its pid.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    identity: ProcessIdentity,
    pub(crate) task: Arc<Task>,
    pub(crate) process: Arc<TaskProcess>,
}

/// A mutation under way.
#[derive(Debug)]
pub(crate) struct Work(Arc<Shared>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.at_work.send_modify(|count| *count -= 1);
    }
}

impl Shared {
    pub(crate) fn new(
        config: NodeConfig,
        boot_id: String,
        store: Store,
        monitor: Arc<dyn ExitMonitor>,
        oom: OomWatcher,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        Self {
            config,
            boot_id,
            store,
            monitor,
            orphans: Orphans::default(),
            oom,
            events,
            numbers: Numbers::default(),
            abandoned: Mutex::default(),
            at_work: watch::Sender::new(0),
            tasks: Mutex::default(),
            watched: Mutex::default(),
        }
    }

    /// Takes the task's id for it. It can't be [found](Self::task) before it is complete.
    pub(crate) fn reserve(&self, task: &Arc<Task>) -> Result<(), Error> {
        match self.tasks().entry(task.key.clone()) {
            Entry::Occupied(taken) => Err(Error::IdTaken {
                id: taken.key().id.to_string(),
            }),
            Entry::Vacant(free) => {
                free.insert(Arc::clone(task));
                Ok(())
            }
        }
    }

    /// Gives the task's id back.
    pub(crate) fn release(&self, task: &Arc<Task>) {
        let mut tasks = self.tasks();
        if tasks
            .get(&task.key)
            .is_some_and(|holder| Arc::ptr_eq(holder, task))
        {
            tasks.remove(&task.key);
        }
        drop(tasks);
        task.was_settled();
    }

    /// The task of that name, if its creation is over.
    pub(crate) fn task(&self, key: &TaskKey) -> Result<Arc<Task>, Error> {
        self.task_even_unfinished(key)
            .filter(|task| task.is_complete())
            .ok_or(Error::NoSuchTask)
    }

    /// The task of that name, also while it is being created.
    pub(crate) fn task_even_unfinished(&self, key: &TaskKey) -> Option<Arc<Task>> {
        self.tasks().get(key).cloned()
    }

    /// The process of that name, with its task.
    pub(crate) fn process(&self, key: &ProcessKey) -> Result<(Arc<Task>, Arc<TaskProcess>), Error> {
        let task = self.task(&key.task)?;
        let process = task.find(key.exec.as_ref())?;
        Ok((task, process))
    }

    /// All tasks whose creation is over.
    pub(crate) fn all(&self) -> Vec<Arc<Task>> {
        let mut all = self.all_even_unfinished();
        all.retain(|task| task.is_complete());
        all
    }

    /// All tasks, and those that are being created.
    pub(crate) fn all_even_unfinished(&self) -> Vec<Arc<Task>> {
        self.tasks().values().cloned().collect()
    }

    /// The descriptors of a new process: none yet.
    pub(crate) fn new_fds(&self) -> ProcessFds {
        self.fds_of(self.numbers.draw())
    }

    /// Those of the number that a record names.
    pub(crate) fn fds_of(&self, number: u64) -> ProcessFds {
        if number == 0 {
            return self.new_fds();
        }
        ProcessFds::new(Arc::clone(&self.config.descriptors), number)
    }

    /// Keeps what the client of a creation that was cut short has given, until its request comes again or for [`ABANDONED`].
    pub(crate) fn leave_client_ends(self: &Arc<Self>, request: Option<RequestId>, fds: ProcessFds) {
        let Some(request) = request else {
            return fds.forget_all();
        };
        if let Some(older) = self.abandoned().insert(request, fds) {
            // Of a daemon that died while it handed them over: they are the same.
            older.forget_all();
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(ABANDONED).await;
            if let Some(fds) = shared.take_client_ends(Some(request)) {
                fds.forget_all();
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

    /// A mutation is under way for as long as this lives.
    pub(crate) fn work(self: &Arc<Self>) -> Work {
        self.at_work.send_modify(|count| *count += 1);
        Work(Arc::clone(self))
    }

    /// Waits until no mutation is under way.
    pub(crate) async fn quiet(&self) {
        // The sender is a field of ours: it cannot be gone.
        let _ = self.at_work.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Watches a process that was just started. From here on its exit finds its owner; if it is over already, the
    /// exit is kept back in the process as one that came early.
    pub(crate) async fn watch(
        &self,
        task: &Arc<Task>,
        owner: &Arc<TaskProcess>,
        process: Arc<Process>,
    ) -> Result<(), Error> {
        self.own(process.identity(), task, owner);
        owner.runs_as(Arc::clone(&process));
        if owner.exec.is_some() {
            // Known before it is watched: a successor finds the kernel's record of its end by this alone. (An init cannot end before
            // it is durable: it waits to be started, and a creation that is cut short is undone.)
            task.save(self).await?;
        }
        if self.monitor.guarantees().survives == Survives::WithDescriptors
            && let Some(pidfd) = process.pidfd()
        {
            let kept = pidfd
                .try_clone_to_owned()
                .and_then(|pidfd| owner.fds.keep([(FdRole::Pidfd, StreamFd::new(pidfd))]));
            if let Err(error) = kept {
                warn!(id = %task.id(), %error, "a pidfd is not stored: an exit while no daemon runs will be unknown");
            }
        }
        match self.monitor.watch(process).await? {
            Watched::Armed => {}
            Watched::Ended(record) => drop(owner.hold(record)),
        }
        Ok(())
    }

    /// Notes whose this process is.
    pub(crate) fn own(
        &self,
        identity: ProcessIdentity,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
    ) {
        let owner = Owner {
            identity,
            task: Arc::clone(task),
            process: Arc::clone(process),
        };
        self.watched().entry(identity.pid).or_default().push(owner);
    }

    /// Whose this process is.
    pub(crate) fn owner(&self, identity: ProcessIdentity) -> Option<Owner> {
        self.watched()
            .get(&identity.pid)?
            .iter()
            .find(|owner| owner.identity == identity)
            .cloned()
    }

    /// Forgets whose it was.
    pub(crate) fn disown(&self, identity: ProcessIdentity) {
        let mut watched = self.watched();
        if let Entry::Occupied(mut owners) = watched.entry(identity.pid) {
            owners.get_mut().retain(|owner| owner.identity != identity);
            if owners.get().is_empty() {
                owners.remove();
            }
        }
    }

    /// Whether somebody will reap the process of that number.
    pub(crate) fn is_watched(&self, pid: i32) -> bool {
        self.watched().contains_key(&pid)
    }

    /// Tells a fact about a task to whoever listens.
    pub(crate) fn emit(&self, task: &Task, kind: EventKind) {
        if task.is_silent() {
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

    fn tasks(&self) -> MutexGuard<'_, HashMap<TaskKey, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<i32, Vec<Owner>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
