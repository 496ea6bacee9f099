//! [`Ground`]: what all parts of a run share: the sandbox, the ledger, the bundles, and whether it
//! is over.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anyhow::{Context, ensure};
use embedshim_tests::Listener;
use testbed::machine::find_on_path;
use testbed::releases;
use testbed::sandbox::{EMBEDSHIM, Sandbox};

use crate::bundle::Bundles;
use crate::daemon::Daemons;
use crate::ledger::Ledger;
use crate::sandboxes;

/// The common ground.
#[derive(Debug)]
pub(crate) struct Ground {
    sandbox: RwLock<Sandbox>,
    /// Odd while containerd is away.
    epoch: AtomicU64,
    is_over: AtomicBool,
    pub(crate) daemons: Daemons,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) bundles: Bundles,
    pub(crate) listener: Listener,
    pub(crate) state_dir: PathBuf,
    pub(crate) namespace: String,
    /// Where everything of this run is.
    pub(crate) directory: PathBuf,
    /// runc finds a CRIU that knows this kernel.
    pub(crate) has_criu: bool,
}

impl Ground {
    /// A sandbox with the daemon, and with containerd and the image of `archive` if it is asked
    /// for.
    pub(crate) fn set(
        binaries: &Path,
        image: &Path,
        archive: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let mut sandbox = Sandbox::new(binaries, EMBEDSHIM)?;
        sandbox.keep_in_memory("es")?;
        // What fails in a run is in the log, once for each request and step.
        sandbox.set_environment("EMBEDSHIM_LOG", "debug");
        let criu = criu();
        if let Some(directory) = &criu {
            let usual = std::env::var("PATH")?;
            sandbox.set_environment("PATH", &format!("{}:{usual}", directory.display()));
        }
        let config = sandboxes::configure(sandbox.directory())?;
        sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
        sandbox.start_daemon()?;
        if let Some(archive) = archive {
            sandbox.start_containerd()?;
            sandbox.import(archive)?;
        }
        let listener = Listener::listen(sandbox.directory())?;
        let bundles = Bundles::new(
            &sandbox.directory().join("bundles"),
            &image.join("rootfs"),
            sandbox.namespace(),
            listener.path(),
        )?;
        let ledger = Ledger::open(&sandbox.directory().join("ledger"))?;
        Ok(Self {
            epoch: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            daemons: Daemons::of(&sandbox.state_dir()),
            ledger: Arc::new(ledger),
            bundles,
            listener,
            state_dir: sandbox.state_dir(),
            namespace: sandbox.namespace().into(),
            directory: sandbox.directory().into(),
            has_criu: criu.is_some() || find_on_path("criu").is_some(),
            sandbox: RwLock::new(sandbox),
        })
    }

    /// The sandbox, as soon as no worker starts or stops its containerd.
    pub(crate) fn sandbox(&self) -> RwLockReadGuard<'_, Sandbox> {
        self.sandbox.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sandbox_mut(&self) -> RwLockWriteGuard<'_, Sandbox> {
        self.sandbox.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which of the containerds there is now; odd if none.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Ends containerd, politely or not, does something, and starts it again.
    pub(crate) fn without_containerd(
        &self,
        is_polite: bool,
        then: impl FnOnce(&mut Sandbox) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut sandbox = self.sandbox_mut();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if is_polite {
            sandbox.stop_containerd()?;
        } else {
            sandbox.kill_containerd()?;
        }
        then(&mut sandbox)?;
        sandbox.start_containerd()?;
        self.epoch.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Does something with the sandbox that no other worker may see half done.
    pub(crate) fn with_sandbox(
        &self,
        then: impl FnOnce(&mut Sandbox) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        then(&mut self.sandbox_mut())
    }

    /// No new life begins any more.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// After the answer to a container's `Delete` nothing of it may be left that could stop the
    /// next of its name.
    pub(crate) fn check_gone(&self, id: &str) -> anyhow::Result<()> {
        let bundle = self.bundles.path(id).display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("mountinfo")?;
        let is_mounted = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .any(|target| target.starts_with(&format!("{bundle}/")));
        ensure!(!is_mounted, "{id} is deleted and its root is mounted");
        let state = Path::new("/run/containerd/runc")
            .join(&self.namespace)
            .join(id);
        ensure!(!state.exists(), "{id} is deleted and runc knows it");
        Ok(())
    }

    /// Keeps what a stream brought that is not what was due.
    pub(crate) fn keep_evidence(&self, name: &str, bytes: &[u8]) {
        let directory = self.sandbox().directory().join("streams");
        let file = directory.join(name.replace(' ', "-"));
        let kept = fs::create_dir_all(directory).and_then(|()| fs::write(&file, bytes));
        if let Err(error) = kept {
            self.ledger.note(&format!("{}: {error}", file.display()));
        }
    }

    /// Keeps what tells of a failed run: logs, the ledger, what the daemon has written.
    pub(crate) fn save(&self, to: &Path) -> anyhow::Result<()> {
        let sandbox = self.sandbox();
        let _ = fs::remove_dir_all(to);
        fs::create_dir_all(to)?;
        for file in ["ledger", "containerd.log"] {
            let _ = fs::copy(sandbox.directory().join(file), to.join(file));
        }
        let streams = sandbox.directory().join("streams");
        if streams.exists() {
            copy_files(&streams, &to.join("streams"))?;
        }
        copy_files(&sandbox.state_dir(), &to.join("state"))
    }

    /// Leaves the sandbox as it is, to be looked at.
    pub(crate) fn keep(self) -> PathBuf {
        self.sandbox
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .keep()
    }
}

/// A CRIU of a later release, or none where that cannot be fetched.
fn criu() -> Option<PathBuf> {
    releases::criu()
        .inspect_err(|error| eprintln!("no checkpoints: {error:#}"))
        .ok()
}

/// Regular files only: sockets and fifos tell nothing.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy_files(&entry.path(), &target)?;
        } else if kind.is_file() {
            // It may be gone by now.
            let _ = fs::copy(entry.path(), target);
        }
    }
    Ok(())
}
