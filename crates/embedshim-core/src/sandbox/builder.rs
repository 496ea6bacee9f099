//! [`Builder`]: what is done to a sandbox on disk and in the kernel: everything is made or nothing,
//! it is released, it is removed. Owns the order of the steps, and the record before each of them,
//! by which a successor goes on. Everything here blocks; it never decides in which state a sandbox
//! is.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::error::chain;
use crate::id::SandboxKey;
use crate::sandbox::api::{CreateSandbox, Ended, Processes, SandboxConfig};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::holder::{self, Base};
use crate::sandbox::namespaces::{self, Making};
use crate::sandbox::place;
use crate::sandbox::record::{Init, Phase};
use crate::sandbox::sandbox::{Sandbox, State};
use crate::sandbox::store::Store;
use crate::sandbox::sysctls;

/// The means by which sandboxes are made.
#[derive(Debug)]
pub(super) struct Builder {
    config: SandboxConfig,
    store: Store,
    boot_id: String,
    /// The directory of all places is a private mount. Finding that out takes the longer the more
    /// mounts there are.
    is_private: Mutex<bool>,
    /// What the init processes of pods are made of, from the first of them on.
    base: Mutex<Option<Arc<Base>>>,
}

impl Builder {
    pub(super) fn new(config: SandboxConfig, store: Store, boot_id: String) -> Self {
        Self {
            config,
            store,
            boot_id,
            is_private: Mutex::default(),
            base: Mutex::default(),
        }
    }

    pub(super) fn config(&self) -> &SandboxConfig {
        &self.config
    }

    /// Where the record of this sandbox is, or would be.
    pub(super) fn record_of(&self, key: &SandboxKey) -> PathBuf {
        self.store.path(key)
    }

    /// Makes the directory of records again. That of the places is perhaps gone, too.
    pub(super) fn begin_again(&self) -> Result<(), SandboxError> {
        *self.is_private() = false;
        self.store.make()
    }

    /// Writes that the sandbox is so far.
    pub(super) fn record(&self, sandbox: &Sandbox, phase: Phase) -> Result<(), SandboxError> {
        self.store.save(&sandbox.record(&self.boot_id, phase))
    }

    /// Makes everything, or nothing.
    pub(super) fn establish(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        let place = &sandbox.place;
        let Some(request) = &sandbox.request else {
            return Err(SandboxError::WrongState {
                key: sandbox.key.clone(),
                state: "was not created by this daemon",
            });
        };
        place.check_cri()?;
        // Before anything is made, so that a successor undoes it.
        self.record(sandbox, Phase::Starting)?;
        let make = || {
            self.make_private(&sandbox.key)?;
            place.make_files(request)?;
            self.make_namespaces(sandbox, request)?;
            place.link()?;
            self.record(sandbox, Phase::Ready)
        };
        make().inspect_err(|_| {
            let undone = holder::end(&sandbox.key, sandbox.init.get())
                .and_then(|()| place.remove())
                .and_then(|()| self.store.remove(&sandbox.key));
            if let Err(error) = undone {
                warn!(sandbox = %sandbox.key, error = %chain(&error), "cannot undo the start of a sandbox: the next daemon tries again");
            }
        })
    }

    /// The namespaces, with an init process if that is asked for.
    fn make_namespaces(
        &self,
        sandbox: &Sandbox,
        request: &CreateSandbox,
    ) -> Result<(), SandboxError> {
        let shares_processes = request.processes == Processes::Pod;
        let base = shares_processes
            .then(|| self.base(&sandbox.key))
            .transpose()?;
        // A successor ends it then.
        let note = |identity| {
            let cgroup = request.cgroup();
            let _ = sandbox.init.set(Init { identity, cgroup });
            self.record(sandbox, Phase::Starting)
        };
        namespaces::make(&Making {
            request,
            isolation: &sandbox.isolation,
            place: &sandbox.place,
            sysctls: &sysctls::of(&self.config, request)?,
            base: base.as_deref(),
            note: &note,
        })
    }

    /// Blocks for the first.
    fn base(&self, key: &SandboxKey) -> Result<Arc<Base>, SandboxError> {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = &*base {
            return Ok(Arc::clone(base));
        }
        let stage = place::places(&self.config.state_dir);
        let doing = "cannot make what init processes are made of with";
        let made = Base::make(&stage).map_err(failed::<std::io::Error>(key, doing, &stage))?;
        Ok(Arc::clone(base.insert(Arc::new(made))))
    }

    /// Once for all sandboxes.
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

    /// Releases what keeps the kernel's resources.
    pub(super) fn release(&self, sandbox: &Sandbox, code: u32) -> Result<Ended, SandboxError> {
        let mut record = sandbox.record(&self.boot_id, Phase::Stopping);
        record.ended = Some(Ended::now(code));
        self.store.save(&record)?;
        // If the rest fails, the end of the init is no kill from outside.
        sandbox.set(State::Ending(code));
        holder::end(&sandbox.key, sandbox.init.get())?;
        sandbox.place.release()?;
        let ended = Ended::now(code);
        let mut record = sandbox.record(&self.boot_id, Phase::Stopped);
        record.ended = Some(ended);
        self.store.save(&record)?;
        Ok(ended)
    }

    /// Removes everything.
    pub(super) fn dismantle(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        self.record(sandbox, Phase::Removing)?;
        holder::end(&sandbox.key, sandbox.init.get())?;
        sandbox.place.remove()?;
        self.store.remove(&sandbox.key)
    }
}
