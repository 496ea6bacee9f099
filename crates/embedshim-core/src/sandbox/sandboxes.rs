//! [`Sandboxes`]: the pods of one machine and every operation on them. Each mutation runs in a task
//! that outlives its caller, with a deadline for the answer; reads answer from memory.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::error::chain;
use crate::id::SandboxKey;
use crate::sandbox::api::{CreateSandbox, Ended, SandboxConfig, SandboxSnapshot};
use crate::sandbox::builder::Builder;
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::holder;
use crate::sandbox::observer::SandboxChange;
use crate::sandbox::overview::SandboxOverview;
use crate::sandbox::place::{self, Place};
use crate::sandbox::record::Phase;
use crate::sandbox::recovery::{self, KILLED};
use crate::sandbox::sandbox::{Sandbox, State};
use crate::sandbox::spec;
use crate::sandbox::store::Store;
use crate::task::boot_id;

/// How long a mutation may take before its caller is answered: the kernel and a tmpfs do it in
/// milliseconds. It goes on, and its sandbox stays locked as long.
const LIMIT: Duration = Duration::from_secs(10);
/// The time between two attempts at what has to be done in the end.
const AGAIN: Duration = Duration::from_secs(1);
/// A created sandbox that is not started by then never will be: containerd says nothing when it
/// gives one up.
const FORGET: Duration = Duration::from_mins(10);
/// The most sandboxes that are created and not started.
const MAX_CREATED: usize = 4096;

/// The pods of one machine. Needs a tokio runtime.
#[derive(Clone, Debug)]
pub struct Sandboxes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    builder: Builder,
    known: Mutex<HashMap<SandboxKey, Arc<Sandbox>>>,
    mutations: watch::Sender<usize>,
}

/// A mutation in flight, for as long as this lives.
struct Mutation(Arc<Inner>);

impl Mutation {
    fn begin(inner: &Arc<Inner>) -> Self {
        inner.mutations.send_modify(|count| *count += 1);
        Self(Arc::clone(inner))
    }
}

impl Drop for Mutation {
    fn drop(&mut self) {
        self.0.mutations.send_modify(|count| *count -= 1);
    }
}

impl Sandboxes {
    /// Takes over what is in the state directory: what a predecessor has left half done is finished
    /// or undone, before this returns if no process has to end for that.
    pub async fn open(config: SandboxConfig) -> Result<Self, SandboxError> {
        let opening = move || {
            let store = Store::open(&config.state_dir)?;
            let boot_id = boot_id();
            let known = recovery::recover(&config, &store, &boot_id)?;
            let of = |sandbox: Sandbox| (sandbox.key.clone(), Arc::new(sandbox));
            let inner = Inner {
                builder: Builder::new(config, store, boot_id),
                known: Mutex::new(known.into_iter().map(of).collect()),
                mutations: watch::Sender::new(0),
            };
            for sandbox in inner.all() {
                // The end of a process can depend on whatever this process reaps later.
                if sandbox.init.get().is_none()
                    && let Err(error) = inner.finish(&sandbox)
                {
                    not_finished(&sandbox, &error);
                }
            }
            let is_known = |id: &OsStr| inner.all().iter().any(|one| id == one.key.id.as_str());
            place::remove_dangling(inner.builder.config(), is_known);
            Ok(Self(Arc::new(inner)))
        };
        let opened = blocking(opening).await??;
        for sandbox in opened.0.all() {
            opened.watch(&sandbox);
            opened.finish_later(sandbox);
        }
        Ok(opened)
    }

    /// Finishes what a predecessor has left half done, again and again until it is.
    fn finish_later(&self, sandbox: Arc<Sandbox>) {
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            while sandbox.is_unfinished() {
                {
                    let _counted = Mutation::begin(&inner);
                    let _mutation = sandbox.mutation.lock().await;
                    let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
                    let finished = blocking(move || worker.finish(&of)).await;
                    match finished.and_then(|finished| finished) {
                        Ok(()) => return,
                        Err(error) => not_finished(&sandbox, &error),
                    }
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Ends the sandbox when its init process ends, if it has one.
    fn watch(&self, sandbox: &Arc<Sandbox>) {
        let Some(init) = sandbox.init.get() else {
            return;
        };
        if sandbox.state() != State::Ready {
            return;
        }
        let (identity, inner) = (init.identity, Arc::clone(&self.0));
        let sandbox = Arc::clone(sandbox);
        tokio::spawn(async move {
            while let Err(error) = holder::ended(identity).await {
                warn!(
                    sandbox = %sandbox.key, %error,
                    "cannot wait for the init process of a sandbox: trying again"
                );
                tokio::time::sleep(AGAIN).await;
                if sandbox.state() != State::Ready {
                    return;
                }
            }
            let _counted = Mutation::begin(&inner);
            let _mutation = sandbox.mutation.lock().await;
            if sandbox.state() != State::Ready {
                return;
            }
            warn!(sandbox = %sandbox.key, pid = identity.pid, "the init process of a sandbox was killed");
            let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
            let released = blocking(move || worker.builder.release(&of, KILLED)).await;
            let ended = released
                .and_then(|released| released)
                .unwrap_or_else(|error| {
                    // What is left goes with the removal.
                    warn!(
                        sandbox = %sandbox.key, error = %chain(&error),
                        "cannot release what a sandbox has"
                    );
                    Ended::now(KILLED)
                });
            sandbox.set(State::Ended(ended));
            inner.tell(&sandbox, ended.change());
        });
    }

    /// Takes note of a sandbox. Leaves nothing on disk: containerd does not tell if it gives one up
    /// that it has not started.
    pub fn create(&self, request: CreateSandbox) -> Result<(), SandboxError> {
        if let Some(why) = request.fault() {
            let key = request.key;
            return Err(SandboxError::Invalid { key, why });
        }
        let mut known = self.0.known();
        let is_forgotten = |sandbox: &Sandbox| matches!(sandbox.state(), State::Created(since) if since.elapsed() > FORGET);
        known.retain(|_, sandbox| !is_forgotten(sandbox));
        if known.contains_key(&request.key) {
            return Err(SandboxError::IdTaken(request.key));
        }
        let is_same = |sandbox: &&Arc<Sandbox>| {
            sandbox.name == request.name
                && sandbox.key.namespace == request.key.namespace
                && sandbox.state() == State::Ready
        };
        if let Some(other) = known.values().find(is_same) {
            let (name, other) = (request.name, other.key.clone());
            return Err(SandboxError::NameTaken { name, other });
        }
        let is_created = |sandbox: &&Arc<Sandbox>| matches!(sandbox.state(), State::Created(_));
        let created = known.values().filter(is_created).count();
        if created >= MAX_CREATED {
            return Err(SandboxError::TooMany(created));
        }
        let place = Place::new(self.0.builder.config(), &request.key);
        let key = request.key.clone();
        known.insert(key, Arc::new(Sandbox::new(request, place)));
        Ok(())
    }

    /// Makes everything that containers need; of one that is ready nothing. All or nothing: after a
    /// failure the sandbox is forgotten.
    pub async fn start(&self, key: &SandboxKey) -> Result<SandboxSnapshot, SandboxError> {
        let sandbox = self.0.find(key)?;
        let (inner, this) = (Arc::clone(&self.0), self.clone());
        let work = async move {
            let _mutation = sandbox.mutation.lock().await;
            match sandbox.state() {
                State::Created(_) => {}
                State::Ready => return Ok(sandbox.snapshot()),
                State::Ending(_) | State::Ended(_) => return Err(wrong(&sandbox, "has ended")),
                State::Leaving | State::Gone => {
                    return Err(SandboxError::Unknown(sandbox.key.clone()));
                }
            }
            let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
            let established = blocking(move || worker.builder.establish(&of)).await?;
            if let Err(error) = established {
                inner.forget(&sandbox);
                return Err(error);
            }
            sandbox.set(State::Ready);
            this.watch(&sandbox);
            inner.tell(&sandbox, SandboxChange::Started);
            info!(sandbox = %sandbox.key, "sandbox started");
            Ok(sandbox.snapshot())
        };
        self.detached(key, "the start", work).await
    }

    /// Removes the namespaces and the shared memory. The files stay, as the CRI's own controller
    /// leaves them.
    pub async fn stop(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        let sandbox = self.0.find(key)?;
        let inner = Arc::clone(&self.0);
        let work = async move {
            let _mutation = sandbox.mutation.lock().await;
            let code = match sandbox.state() {
                State::Ready => 0,
                State::Ending(code) => code,
                State::Created(_) => return Err(wrong(&sandbox, "was not started")),
                State::Ended(_) | State::Leaving | State::Gone => return Ok(()),
            };
            let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
            let ended = blocking(move || worker.builder.release(&of, code)).await??;
            sandbox.set(State::Ended(ended));
            inner.tell(&sandbox, ended.change());
            info!(sandbox = %sandbox.key, "sandbox stopped");
            Ok(())
        };
        self.detached(key, "the stop", work).await
    }

    /// Removes everything of a sandbox, also of one that was not stopped. Of one there is not there
    /// is nothing to remove.
    pub async fn remove(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        let known = self.0.known().get(key).cloned();
        let Some(sandbox) = known else {
            return Ok(());
        };
        let inner = Arc::clone(&self.0);
        let work = async move {
            let _mutation = sandbox.mutation.lock().await;
            if !matches!(sandbox.state(), State::Created(_) | State::Gone) {
                let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
                blocking(move || worker.builder.dismantle(&of)).await??;
                inner.tell(&sandbox, SandboxChange::Removed);
                info!(sandbox = %sandbox.key, "sandbox removed");
            }
            inner.forget(&sandbox);
            Ok(())
        };
        self.detached(key, "the removal", work).await
    }

    /// The sandbox at this moment.
    pub fn state(&self, key: &SandboxKey) -> Result<SandboxSnapshot, SandboxError> {
        Ok(self.0.find(key)?.snapshot())
    }

    /// All sandboxes as an operator sees them at this moment, by name.
    pub fn overview(&self) -> Vec<SandboxOverview> {
        let mut all: Vec<_> = self.0.known().values().cloned().collect();
        all.sort_by(|one, other| one.key.cmp(&other.key));
        let seen = all.iter().filter_map(|sandbox| self.0.overview(sandbox));
        seen.collect()
    }

    /// One of them; `None` if it is not there.
    pub fn overview_of(&self, key: &SandboxKey) -> Option<SandboxOverview> {
        let sandbox = self.0.find(key).ok()?;
        self.0.overview(&sandbox)
    }

    /// What containers of a sandbox share, as an OCI specification (JSON) with nothing else: the
    /// namespaces with their paths, of which a missing one is the node's, and one for processes
    /// without a path if each container has its own; the files and the shared memory as mounts.
    /// containerd 2.2 and later give it to NRI plugins, and pull request 14135 makes containers by
    /// it.
    pub fn spec(&self, key: &SandboxKey) -> Result<String, SandboxError> {
        let sandbox = self.0.find(key)?;
        let mounts = sandbox.place.mounts(sandbox.isolation.ipc);
        Ok(spec::of_sandbox(&sandbox.shared(), &mounts).to_string())
    }

    /// The sandboxes that were started and whose end no client waits for: perhaps none knows them.
    pub fn unattended(&self) -> Vec<SandboxKey> {
        let known = self.0.known();
        let is_unattended = |sandbox: &&Arc<Sandbox>| {
            let is_started = matches!(sandbox.state(), State::Ready | State::Ended(_));
            is_started && !sandbox.is_awaited()
        };
        let unattended = known.values().filter(is_unattended);
        unattended.map(|sandbox| sandbox.key.clone()).collect()
    }

    /// Waits for the end.
    pub async fn wait(&self, key: &SandboxKey) -> Result<Ended, SandboxError> {
        let sandbox = self.0.find(key)?;
        Ok(sandbox.ended().await)
    }

    /// Lets a container that is to be created in this sandbox join its namespaces: rewrites the
    /// spec in its bundle. Repeatable.
    pub async fn admit(&self, key: &SandboxKey, bundle: &Path) -> Result<(), SandboxError> {
        let sandbox = self.0.find(key)?;
        if sandbox.state() != State::Ready {
            return Err(wrong(&sandbox, "is not ready: no container can join it"));
        }
        let (shared, bundle) = (sandbox.shared(), bundle.to_owned());
        let key = key.clone();
        let rewriting = move || {
            let doing = "cannot let a container join, whose bundle is";
            spec::rewrite_bundle(&bundle, &shared).map_err(failed(&key, doing, &bundle))
        };
        blocking(rewriting).await?
    }

    /// Writes all records again, after their directory was removed.
    pub async fn recreate_records(&self) -> Result<(), SandboxError> {
        let inner = Arc::clone(&self.0);
        let all = self.0.all();
        let recreate = move || {
            inner.builder.begin_again()?;
            all.iter().try_for_each(|sandbox| {
                // A mutation in flight writes its own record, and one that was removed meanwhile
                // must not come back.
                let Ok(_mutation) = sandbox.mutation.try_lock() else {
                    return Ok(());
                };
                let phase = match sandbox.state() {
                    State::Ready => Phase::Ready,
                    State::Ended(_) => Phase::Stopped,
                    State::Ending(_) => Phase::Stopping,
                    State::Leaving => Phase::Removing,
                    State::Created(_) | State::Gone => return Ok(()),
                };
                inner.builder.record(sandbox, phase)
            })
        };
        blocking(recreate).await?
    }

    /// Waits until no sandbox is being changed.
    pub async fn quiet(&self) {
        let mut mutations = self.0.mutations.subscribe();
        // The sender is a field of what this holds: it cannot be gone.
        let _ = mutations.wait_for(|count| *count == 0).await;
    }

    /// Runs `work` as a task of its own and waits for it, for a bounded time.
    async fn detached<T: Send + 'static>(
        &self,
        key: &SandboxKey,
        what: &'static str,
        work: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
    ) -> Result<T, SandboxError> {
        let mutation = Mutation::begin(&self.0);
        let task = tokio::spawn(async move {
            let result = work.await;
            drop(mutation);
            result
        });
        match tokio::time::timeout(LIMIT, task).await {
            Ok(done) => done.map_err(|panic| SandboxError::Internal(panic.to_string()))?,
            Err(_) => Err(SandboxError::Deadline {
                key: key.clone(),
                what,
                seconds: LIMIT.as_secs(),
            }),
        }
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, HashMap<SandboxKey, Arc<Sandbox>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, sandbox: &Sandbox, change: SandboxChange) {
        self.builder.config().tell(&sandbox.key, change);
    }

    fn all(&self) -> Vec<Arc<Sandbox>> {
        self.known().values().cloned().collect()
    }

    /// The sandbox, unless what there is of it is being removed.
    fn find(&self, key: &SandboxKey) -> Result<Arc<Sandbox>, SandboxError> {
        let found = self.known().get(key).cloned();
        let found = found.filter(|sandbox| sandbox.state() != State::Leaving);
        found.ok_or_else(|| SandboxError::Unknown(key.clone()))
    }

    fn overview(&self, sandbox: &Sandbox) -> Option<SandboxOverview> {
        SandboxOverview::of(sandbox, self.builder.record_of(&sandbox.key))
    }

    fn forget(&self, sandbox: &Sandbox) {
        self.known().remove(&sandbox.key);
        sandbox.set(State::Gone);
    }

    /// Finishes what a predecessor has begun, if it has. Blocks.
    fn finish(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        match sandbox.state() {
            State::Ending(code) => {
                let ended = self.builder.release(sandbox, code)?;
                sandbox.set(State::Ended(ended));
                self.tell(sandbox, ended.change());
            }
            State::Leaving => {
                self.builder.dismantle(sandbox)?;
                self.forget(sandbox);
            }
            State::Created(_) | State::Ready | State::Ended(_) | State::Gone => {}
        }
        Ok(())
    }
}

fn not_finished(sandbox: &Sandbox, error: &SandboxError) {
    warn!(
        sandbox = %sandbox.key, error = %chain(error),
        "cannot finish what a predecessor has begun with a sandbox: trying again"
    );
}

fn wrong(sandbox: &Sandbox, state: &'static str) -> SandboxError {
    SandboxError::WrongState {
        key: sandbox.key.clone(),
        state,
    }
}

/// Runs file-system work, which may block, away from the runtime's thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SandboxError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| SandboxError::Internal(panic.to_string()))
}
