//! [`Oversight`]: what operators see of this daemon while it runs, and what its successor is told
//! of its end. Owns when each of the two begins; a failure of either is logged, and the daemon
//! serves without.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tracing::warn;

use crate::admin::view::{Serving, View};
use crate::admin::{Admin, scrape, textfile};
use crate::config::Config;
use crate::history::History;
use crate::service_manager::ServiceManager;
use crate::state_dir::lives::Lives;

/// The admin socket and the history of daemons.
#[derive(Debug)]
pub(super) struct Oversight {
    pub(super) lives: Arc<Lives>,
    pub(super) admin: Option<Admin>,
    pub(super) history: Arc<History>,
    view: Arc<View>,
}

/// What the service manager has told of its side.
pub(super) struct Kept {
    pub(super) manager: Option<Arc<ServiceManager>>,
    /// The keeper's pid; `None` under systemd.
    pub(super) keeper: Option<i32>,
    /// How the predecessor ended, as the keeper has seen it.
    pub(super) predecessor: Option<String>,
}

impl Oversight {
    /// Begins, for a process that has the lock of the state directory.
    pub(super) fn begin(state_dir: &Path, config: &Config, kept: Kept, reactor: Handle) -> Self {
        let lives = Arc::new(Lives::begin(state_dir, kept.predecessor.as_deref()));
        let history = History::new();
        let view = Arc::new(View {
            began: Instant::now(),
            state_dir: state_dir.to_owned(),
            lives: Arc::clone(&lives),
            manager: kept.manager,
            keeper: kept.keeper,
            capacity: config.monitor.capacity,
            history: Arc::clone(&history),
            reactor,
            serving: OnceLock::new(),
            is_leaving: AtomicBool::new(false),
        });
        let admin = match Admin::start(Arc::clone(&view)) {
            Ok(admin) => Some(admin),
            Err(error) => {
                warn!(%error, "cannot answer operators: `embedshimd status` will not");
                None
            }
        };
        if let Some(address) = config.metrics.listen
            && let Err(error) = scrape::start(Arc::clone(&view), address)
        {
            warn!(%address, %error, "cannot serve metrics by TCP: `embedshimd metrics` has them");
        }
        if let Some(path) = config.metrics.textfile.clone() {
            let period = Duration::from_secs(config.metrics.textfile_seconds);
            if let Err(error) = textfile::start(Arc::clone(&view), path, period) {
                warn!(%error, "cannot write metrics to a file: `embedshimd metrics` has them");
            }
        }
        Self {
            lives,
            admin,
            history,
            view,
        }
    }

    /// The daemon serves from now on.
    pub(super) fn serves(&self, serving: Serving) {
        // It is set once.
        let _ = self.view.serving.set(serving);
    }

    /// The daemon finishes what is in flight.
    pub(super) fn leaves(&self) {
        self.view.is_leaving.store(true, Ordering::Release);
    }
}
