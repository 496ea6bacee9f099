//! `Create`: from a bundle to a container whose init waits to be started, or to nothing at all.
//! Owns the order of the steps and their undoing; each step leaves a trace that
//! [`Engine::abandon`] finds.

use std::sync::Arc;

use tracing::info;

use crate::blocking::blocking;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::event::EventKind;
use crate::failpoint;
use crate::fdstore::ProcessFds;
use crate::rootfs;
use crate::runtime::Runtime;
use crate::spec::Spec;
use crate::stdio::{self, Plan, StdioError};
use crate::task::api::CreateTask;
use crate::task::context::RequestContext;
use crate::task::engine::Engine;
use crate::task::task::Task;
use crate::task::teardown::end_logger;

impl Engine {
    /// Creates the task. On failure nothing of it is left. What a predecessor has begun of the same
    /// is gone by then, or was finished.
    pub(in crate::task) async fn create(
        self: Arc<Self>,
        request: CreateTask,
        context: RequestContext,
    ) -> Result<u32, Error> {
        if let Ok(task) = self.registry.task(&request.key)
            && context.is_retry_of(task.init.made_by)
        {
            return Ok(task.init.now().pid);
        }
        let plan = Plan::parse(&request.stdio)?;
        let (bundle, spec) = read_bundle(&request).await?;
        let traits = spec.traits();
        let runtime = Runtime::new(
            &request.runtime,
            &request.key,
            traits,
            self.config.runtime_deadline,
            self.reaper.clone(),
            self.calls.clone(),
        );
        let task = Arc::new(Task::new(
            request,
            bundle,
            runtime,
            traits,
            context.request,
            self.new_fds(),
        ));
        if let Err(taken) = self.reserve(&task).await {
            return match self.registry.task(&task.key) {
                Ok(adopted) if context.is_retry_of(adopted.init.made_by) => {
                    Ok(adopted.init.now().pid)
                }
                _ => Err(taken),
            };
        }
        let _mutation = task.init.lock_mutations().await?;
        task.init.begin()?;
        let mut runtime_was_called = false;
        let left = self.take_client_ends(context.request);
        match self
            .establish(&task, &plan, left, &mut runtime_was_called)
            .await
        {
            Ok(pid) => {
                info!(namespace = %task.key.namespace, id = %task.key.id, pid, "created");
                self.release_exit(&task, &task.init);
                Ok(pid)
            }
            Err(error) => {
                self.abandon(&task, runtime_was_called).await;
                Err(error)
            }
        }
    }

    /// Takes the id. What becomes of a creation that was cut short is waited for.
    async fn reserve(&self, task: &Arc<Task>) -> Result<(), Error> {
        let deadline = self.config.runtime_deadline;
        loop {
            let taken = self.registry.reserve(task);
            match self.registry.task_even_unfinished(&task.key) {
                Some(earlier) if taken.is_err() && earlier.is_half_created() => {
                    let decided = tokio::time::timeout(deadline, earlier.decided()).await;
                    decided.map_err(|_| Error::Deadline {
                        what: "the end of a creation that was cut short",
                        seconds: deadline.as_secs(),
                    })?;
                }
                _ => return taken,
            }
        }
    }

    async fn establish(
        self: &Arc<Self>,
        task: &Arc<Task>,
        plan: &Plan,
        left: Option<ProcessFds>,
        runtime_was_called: &mut bool,
    ) -> Result<u32, Error> {
        if let Some(left) = left {
            stdio::adopt_client_ends(&task.init.fds, &left)
                .map_err(|source| StdioError::NotStored { source })?;
        }
        // On disk before anything is made, so that a successor removes it.
        self.save(task).await?;
        self.mount_rootfs(task).await?;
        if task.checkpoint.is_none() {
            *runtime_was_called = true;
            self.launch(task, plan).await?;
        }
        self.complete_creation(task).await
    }

    /// The container is made: everything that follows from that.
    pub(in crate::task) async fn complete_creation(&self, task: &Arc<Task>) -> Result<u32, Error> {
        task.mark_complete();
        let pid = task.init.now().pid;
        self.emit(
            task,
            EventKind::Created {
                bundle: task.bundle.path.clone(),
                rootfs: task.rootfs.clone(),
                stdio: task.init.stdio.clone(),
                checkpoint: task.checkpoint.clone(),
                pid,
            },
        );
        if let Err(error) = self.save(task).await {
            task.mark_incomplete();
            return Err(error);
        }
        Ok(pid)
    }

    async fn mount_rootfs(&self, task: &Task) -> Result<(), Error> {
        if task.rootfs.is_empty() {
            return Ok(());
        }
        let (mounts, target) = (task.rootfs.clone(), task.rootfs_path());
        let context = rootfs::HelperContext {
            reaper: self.reaper.clone(),
            context: task.runtime.context().clone(),
            directory: task.bundle.path.clone(),
        };
        failpoint::step("before the root is mounted");
        let mounted = blocking(move || rootfs::mount_all(&mounts, &target, &context)).await?;
        failpoint::step("after the root was mounted");
        mounted.map_err(Error::Rootfs)
    }

    /// Undoes whatever a failed [`establish`](Self::establish) did.
    async fn abandon(&self, task: &Arc<Task>, runtime_was_called: bool) {
        if let Some(identity) = task.init.identity() {
            self.unwatch(task, identity).await;
        }
        task.init.unmake();
        // If this daemon dies before it has answered, the request is carried out again, and its
        // client must not have read the end: its ends are closed last.
        let request = task.init.made_by;
        let fds = &task.init.fds;
        fds.leave_to(request.map(|request| (request.connection, request.stream)));
        end_logger(&task.init).await;
        self.oom.unwatch(task.serial);
        self.remove_traces(task, runtime_was_called).await;
        self.registry.release(task);
        task.init.fail_start();
    }
}

/// Looks at what the request names, before anything is made.
async fn read_bundle(request: &CreateTask) -> Result<(Bundle, Spec), Error> {
    let path = request.bundle.clone();
    if !path.is_absolute() {
        return Err(Error::Invalid(format!(
            "bundle {} is not an absolute path",
            path.display()
        )));
    }
    let checkpoint = request.checkpoint.clone();
    blocking(move || {
        // runc would make an empty one and say that CRIU failed.
        if let Some(image) = checkpoint.filter(|image| !image.is_absolute() || !image.is_dir()) {
            let image = image.display();
            return Err(Error::Invalid(format!(
                "checkpoint {image} is not a directory"
            )));
        }
        let bundle = Bundle::open(&path).map_err(|source| Error::Path {
            doing: "cannot open the bundle",
            path,
            source,
        })?;
        let spec = Spec::read(&bundle.path)?;
        Ok((bundle, spec))
    })
    .await?
}
