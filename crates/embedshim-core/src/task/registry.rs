//! [`Registry`]: the tasks of a node by their names, and whose each process is that a monitor
//! watches. Owns who holds an id; never changes a task, writes a record or emits an event.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::id::{ProcessKey, TaskKey};
use crate::process::ProcessIdentity;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// The tasks of a node and their watched processes.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    tasks: Mutex<HashMap<TaskKey, Arc<Task>>>,
    tracked: Mutex<HashMap<i32, Vec<TrackedProcess>>>,
}

/// A watched process and whose it is. A number can have two for a moment: one that ended and one
/// that got its pid.
#[derive(Clone, Debug)]
pub(crate) struct TrackedProcess {
    identity: ProcessIdentity,
    pub(crate) task: Arc<Task>,
    pub(crate) process: Arc<TaskProcess>,
}

impl Registry {
    /// Takes the task's id for it. It cannot be [found](Self::task) before it is complete.
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
        task.mark_released();
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

    /// Notes whose this process is.
    pub(crate) fn track(
        &self,
        identity: ProcessIdentity,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
    ) {
        let tracked = TrackedProcess {
            identity,
            task: Arc::clone(task),
            process: Arc::clone(process),
        };
        self.processes()
            .entry(identity.pid)
            .or_default()
            .push(tracked);
    }

    /// Whose this process is.
    pub(crate) fn tracked(&self, identity: ProcessIdentity) -> Option<TrackedProcess> {
        self.processes()
            .get(&identity.pid)?
            .iter()
            .find(|tracked| tracked.identity == identity)
            .cloned()
    }

    /// Forgets whose it was.
    pub(crate) fn untrack(&self, identity: ProcessIdentity) {
        let mut processes = self.processes();
        if let Entry::Occupied(mut tracked) = processes.entry(identity.pid) {
            tracked.get_mut().retain(|it| it.identity != identity);
            if tracked.get().is_empty() {
                tracked.remove();
            }
        }
    }

    /// Whether a process of that number is watched, and so reaped by its monitor.
    pub(crate) fn is_tracked(&self, pid: i32) -> bool {
        self.processes().contains_key(&pid)
    }

    /// How many tasks there are, those that are being created included.
    pub(crate) fn count(&self) -> usize {
        self.tasks().len()
    }

    /// How many processes are watched.
    pub(crate) fn tracked_count(&self) -> usize {
        self.processes().values().map(Vec::len).sum()
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<TaskKey, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<i32, Vec<TrackedProcess>>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
