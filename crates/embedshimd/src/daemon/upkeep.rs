//! Serving while the state directory may be removed, emptied or mounted over, by a clean-up of
//! `/run` for example. Owns that everything in it is recreated, and that the server continues with
//! the new listener.

use std::cell::RefCell;
use std::future::Future;
use std::ops::ControlFlow;
use std::path::Path;

use embedshim_core::chain;
use embedshim_core::fdstore::Listener;
use tracing::{error, info, warn};

use super::durables::{self, Parts};
use crate::state_dir::durable::DurableSet;

/// Serves until `end` completes.
pub(super) async fn serve<T>(
    parts: &Parts<'_>,
    mut listener: Listener,
    end: impl Future<Output = T>,
) -> T {
    tokio::pin!(end);
    let new_listener = RefCell::new(None);
    let mut upkeep = Upkeep {
        state_dir: parts.state_dir,
        durables: DurableSet::new(durables::all(parts, &new_listener)),
        last_failure: None,
    };
    loop {
        let interruption = async {
            tokio::select! {
                biased;
                end = &mut end => ControlFlow::Break(end),
                removed = upkeep.durables.removed() => ControlFlow::Continue(removed),
            }
        };
        match parts.server.serve(&listener, interruption).await {
            ControlFlow::Break(end) => {
                parts.server.stop();
                return end;
            }
            ControlFlow::Continue(removed) => upkeep.recreate(&removed).await,
        }
        if let Some(new) = new_listener.take() {
            listener = new;
        }
    }
}

struct Upkeep<'a> {
    state_dir: &'a Path,
    durables: DurableSet<'a>,
    /// Why the last attempt to recreate the files failed; `None` if it succeeded.
    last_failure: Option<String>,
}

impl Upkeep<'_> {
    /// Recreates the `removed` files. After a failure it is called again; each different failure is
    /// logged once.
    async fn recreate(&mut self, removed: &[&str]) {
        let state_dir = self.state_dir.display();
        if self.last_failure.is_none() {
            let missing = removed.join(", ");
            warn!(%state_dir, missing, "state directory: files were removed or replaced");
        }
        match self.durables.recreate(removed).await {
            Ok(()) => {
                self.last_failure = None;
                info!(
                    %state_dir,
                    "state directory: all files recreated, but for those of containers that ended"
                );
            }
            Err(failure) => {
                let failure = chain(failure.as_ref());
                if self.last_failure.as_ref() != Some(&failure) {
                    error!(
                        %state_dir,
                        error = failure,
                        "state directory: cannot recreate files: trying again"
                    );
                }
                self.last_failure = Some(failure);
            }
        }
    }
}
