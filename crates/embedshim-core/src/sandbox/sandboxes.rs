//! [`Sandboxes`]: the pods of one machine and every operation on them. Each mutation runs in a task
//! that outlives its caller, with a deadline for the answer; reads answer from memory.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::id::SandboxKey;
use crate::sandbox::api::{CreateSandbox, Ended, SandboxConfig, SandboxSnapshot};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::namespaces;
use crate::sandbox::observer::SandboxChange;
use crate::sandbox::overview::SandboxOverview;
use crate::sandbox::place::{self, Place};
use crate::sandbox::record::Phase;
use crate::sandbox::recovery;
use crate::sandbox::sandbox::{Sandbox, State};
use crate::sandbox::spec;
use crate::sandbox::store::Store;
use crate::task::boot_id;

/// How long a mutation may take before its caller is answered: the kernel and a tmpfs do it in
/// milliseconds. It goes on, and its sandbox stays locked as long.
const LIMIT: Duration = Duration::from_secs(10);
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
    config: SandboxConfig,
    store: Store,
    boot_id: String,
    known: Mutex<HashMap<SandboxKey, Arc<Sandbox>>>,
    /// The directory of all places is a private mount. Finding that out takes the longer the more
    /// mounts there are.
    is_private: Mutex<bool>,
    mutations: watch::Sender<usize>,
}

/// A mutation in flight, for as long as this lives.
struct Mutation(Arc<Inner>);

impl Drop for Mutation {
    fn drop(&mut self) {
        self.0.mutations.send_modify(|count| *count -= 1);
    }
}

impl Sandboxes {
    /// Takes over what is in the state directory: what a predecessor has left half done is finished
    /// or undone.
    pub async fn open(config: SandboxConfig) -> Result<Self, SandboxError> {
        let opening = move || {
            let store = Store::open(&config.state_dir)?;
            let boot_id = boot_id();
            let known = recovery::recover(&config, &store, &boot_id)?;
            let of = |sandbox: Sandbox| (sandbox.key.clone(), Arc::new(sandbox));
            Ok(Self(Arc::new(Inner {
                config,
                store,
                boot_id,
                known: Mutex::new(known.into_iter().map(of).collect()),
                is_private: Mutex::default(),
                mutations: watch::Sender::new(0),
            })))
        };
        blocking(opening).await?
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
        let place = Place::new(&self.0.config, &request.key);
        let key = request.key.clone();
        known.insert(key, Arc::new(Sandbox::new(request, place)));
        Ok(())
    }

    /// Makes everything that containers need; of one that is ready nothing. All or nothing: after a
    /// failure the sandbox is forgotten.
    pub async fn start(&self, key: &SandboxKey) -> Result<SandboxSnapshot, SandboxError> {
        let sandbox = self.0.find(key)?;
        let inner = Arc::clone(&self.0);
        let work = async move {
            let _mutation = sandbox.mutation.lock().await;
            match sandbox.state() {
                State::Created(_) => {}
                State::Ready => return Ok(sandbox.snapshot()),
                State::Ended(_) | State::Gone => return Err(wrong(&sandbox, "has ended")),
            }
            let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
            let established = blocking(move || worker.establish(&of)).await?;
            if let Err(error) = established {
                inner.forget(&sandbox);
                return Err(error);
            }
            sandbox.set(State::Ready);
            inner.config.tell(&sandbox.key, SandboxChange::Started);
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
            match sandbox.state() {
                State::Ready => {}
                State::Created(_) => return Err(wrong(&sandbox, "was not started")),
                State::Ended(_) | State::Gone => return Ok(()),
            }
            let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
            let ended = blocking(move || worker.release(&of)).await??;
            sandbox.set(State::Ended(ended));
            inner.config.tell(&sandbox.key, ended.change());
            info!(sandbox = %sandbox.key, "sandbox stopped");
            Ok(())
        };
        self.detached(key, "the stop", work).await
    }

    /// Removes everything of a sandbox, also of one that was not stopped. Of one there is not there
    /// is nothing to remove.
    pub async fn remove(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        let Ok(sandbox) = self.0.find(key) else {
            return Ok(());
        };
        let inner = Arc::clone(&self.0);
        let work = async move {
            let _mutation = sandbox.mutation.lock().await;
            if !matches!(sandbox.state(), State::Created(_) | State::Gone) {
                let (worker, of) = (Arc::clone(&inner), Arc::clone(&sandbox));
                blocking(move || worker.dismantle(&of)).await??;
                inner.config.tell(&sandbox.key, SandboxChange::Removed);
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
        let mounts = sandbox.place.mounts(sandbox.ipc);
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
        let all: Vec<_> = self.0.known().values().cloned().collect();
        let recreate = move || {
            // The other directory is perhaps gone, too.
            *inner.is_private() = false;
            inner.store.make()?;
            all.iter().try_for_each(|sandbox| {
                // A mutation in flight writes its own record, and one that was removed meanwhile
                // must not come back.
                let Ok(_mutation) = sandbox.mutation.try_lock() else {
                    return Ok(());
                };
                let phase = match sandbox.state() {
                    State::Ready => Phase::Ready,
                    State::Ended(_) => Phase::Stopped,
                    State::Created(_) | State::Gone => return Ok(()),
                };
                inner.store.save(&sandbox.record(&inner.boot_id, phase))
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
        self.0.mutations.send_modify(|count| *count += 1);
        let mutation = Mutation(Arc::clone(&self.0));
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

    fn find(&self, key: &SandboxKey) -> Result<Arc<Sandbox>, SandboxError> {
        let found = self.known().get(key).cloned();
        found.ok_or_else(|| SandboxError::Unknown(key.clone()))
    }

    fn overview(&self, sandbox: &Sandbox) -> Option<SandboxOverview> {
        SandboxOverview::of(sandbox, self.store.path(&sandbox.key))
    }

    fn forget(&self, sandbox: &Sandbox) {
        self.known().remove(&sandbox.key);
        sandbox.set(State::Gone);
    }

    /// Makes everything, or nothing. Blocks.
    fn establish(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        let place = &sandbox.place;
        let Some(request) = &sandbox.request else {
            return Err(wrong(sandbox, "was not created by this daemon"));
        };
        place.check_cri()?;
        // Before anything is made, so that a successor undoes it.
        self.store
            .save(&sandbox.record(&self.boot_id, Phase::Starting))?;
        let make = || {
            self.make_private(&sandbox.key)?;
            place.make_files(request)?;
            namespaces::make(&self.config, request, place)?;
            place.link()?;
            self.store
                .save(&sandbox.record(&self.boot_id, Phase::Ready))
        };
        make().inspect_err(|_| {
            let undone = place.remove().and_then(|()| self.store.remove(&sandbox.key));
            if let Err(error) = undone {
                warn!(sandbox = %sandbox.key, %error, "cannot undo the start of a sandbox: the next daemon tries again");
            }
        })
    }

    /// Once for all sandboxes. Blocks.
    fn make_private(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        let mut is_private = self.is_private();
        if !*is_private {
            let state_dir = &self.config.state_dir;
            let doing = "cannot make a private mount of";
            place::make_private(state_dir).map_err(failed(
                key,
                doing,
                &place::places(state_dir),
            ))?;
            *is_private = true;
        }
        Ok(())
    }

    fn is_private(&self) -> MutexGuard<'_, bool> {
        self.is_private
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases what keeps the kernel's resources. Blocks.
    fn release(&self, sandbox: &Sandbox) -> Result<Ended, SandboxError> {
        self.store
            .save(&sandbox.record(&self.boot_id, Phase::Stopping))?;
        sandbox.place.release()?;
        let ended = Ended {
            code: 0,
            at: SystemTime::now(),
        };
        let mut record = sandbox.record(&self.boot_id, Phase::Stopped);
        record.ended = Some(ended);
        self.store.save(&record)?;
        Ok(ended)
    }

    /// Removes everything. Blocks.
    fn dismantle(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        self.store
            .save(&sandbox.record(&self.boot_id, Phase::Removing))?;
        sandbox.place.remove()?;
        self.store.remove(&sandbox.key)
    }
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
