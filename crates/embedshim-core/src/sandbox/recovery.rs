//! A new daemon takes over the sandboxes of its predecessor. Owns the comparison of the records
//! with what is there: of an earlier boot, half made, half removed. Changes nothing. Blocks on the
//! file system.

use exit_monitor::process::{OpenError, Process};
use tracing::{info, warn};

use crate::sandbox::api::{Ended, SandboxConfig};
use crate::sandbox::error::SandboxError;
use crate::sandbox::namespaces::is_pinned;
use crate::sandbox::place::Place;
use crate::sandbox::record::{Phase, SandboxRecord};
use crate::sandbox::sandbox::{Sandbox, State};
use crate::sandbox::store::Store;

/// A sandbox whose namespaces are lost, as after a reboot.
const LOST: u32 = 255;
/// A sandbox whose init process was killed.
pub(super) const KILLED: u32 = 137;

/// All sandboxes that there are, in their states. What a predecessor has left half done is still to
/// be finished.
pub(super) fn recover(
    config: &SandboxConfig,
    store: &Store,
    boot_id: &str,
) -> Result<Vec<Sandbox>, SandboxError> {
    let restored = store.load()?.into_iter().map(|mut record| {
        if record.boot_id != boot_id {
            // Another process can have its number and its start time now.
            record.init = None;
        }
        let place = Place::new(config, &record.key);
        let state = state_of(&record, &place, boot_id);
        Sandbox::restored(record, place, state)
    });
    let found: Vec<Sandbox> = restored.collect();
    info!(sandboxes = found.len(), "sandboxes taken over");
    Ok(found)
}

fn state_of(record: &SandboxRecord, place: &Place, boot_id: &str) -> State {
    let key = &record.key;
    let lost = |why: &str| {
        warn!(sandbox = %key, why, "a sandbox has lost its namespaces: it has ended");
        State::Ending(LOST)
    };
    match record.phase {
        Phase::Starting | Phase::Removing => State::Leaving,
        Phase::Stopped => State::Ended(record.ended.unwrap_or(Ended::now(0))),
        Phase::Stopping => State::Ending(record.ended.map_or(0, |ended| ended.code)),
        Phase::Ready if record.boot_id != boot_id => lost("it is of an earlier boot"),
        Phase::Ready if !is_running(record) => {
            warn!(sandbox = %key, "the init process of a sandbox has ended, and so has the sandbox");
            State::Ending(KILLED)
        }
        Phase::Ready => {
            let mut pinned = record.isolation.pinned();
            if pinned.all(|name| is_pinned(&place.pin(name))) {
                State::Ready
            } else {
                lost("a pin is gone")
            }
        }
    }
}

/// Whether the init process runs, of a sandbox that has one. One that cannot be looked at is not
/// taken for dead.
fn is_running(record: &SandboxRecord) -> bool {
    record.init.as_ref().is_none_or(|init| {
        let process = Process::reopen(init.identity);
        let is_gone = matches!(process, Err(OpenError::Gone { .. }));
        !is_gone && !process.is_ok_and(|process| process.has_ended().unwrap_or(false))
    })
}
