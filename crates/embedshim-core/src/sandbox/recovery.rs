//! A new daemon takes over the sandboxes of its predecessor. Owns the comparison of the records
//! with what is there: of an earlier boot, half made, half removed. Blocks on the file system.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use tracing::{info, warn};

use crate::sandbox::api::{Ended, SandboxConfig};
use crate::sandbox::error::SandboxError;
use crate::sandbox::namespaces::{is_pinned, pins};
use crate::sandbox::place::{self, Place};
use crate::sandbox::record::{Phase, SandboxRecord};
use crate::sandbox::sandbox::{Sandbox, State};
use crate::sandbox::store::Store;

/// A sandbox whose namespaces are lost, as after a reboot.
const LOST: u32 = 255;

/// All sandboxes that there are, in their states. What cannot be finished or undone is logged and
/// tried again by the next daemon: it keeps none from the others.
pub(super) fn recover(
    config: &SandboxConfig,
    store: &Store,
    boot_id: &str,
) -> Result<Vec<Sandbox>, SandboxError> {
    let mut found = Vec::new();
    for record in store.load()? {
        let (key, phase) = (record.key.clone(), record.phase);
        match recover_one(config, store, boot_id, record) {
            Ok(sandbox) => found.extend(sandbox),
            Err(error) => warn!(
                sandbox = %key, ?phase, %error,
                "cannot take over a sandbox: the next daemon tries again"
            ),
        }
    }
    let known: HashSet<OsString> = found
        .iter()
        .map(|sandbox| OsStr::new(sandbox.key.id.as_str()).to_owned())
        .collect();
    place::remove_dangling(config, |id| known.contains(id));
    info!(sandboxes = found.len(), "sandboxes taken over");
    Ok(found)
}

fn recover_one(
    config: &SandboxConfig,
    store: &Store,
    boot_id: &str,
    mut record: SandboxRecord,
) -> Result<Option<Sandbox>, SandboxError> {
    let place = Place::new(config, &record.key);
    let lost = |why: &str| {
        warn!(sandbox = %record.key, why, "a sandbox has lost its namespaces: it has ended");
        LOST
    };
    let code = match record.phase {
        Phase::Starting | Phase::Removing => {
            place.remove()?;
            store.remove(&record.key)?;
            return Ok(None);
        }
        Phase::Stopped => {
            let ended = record.ended.unwrap_or(Ended {
                code: 0,
                at: SystemTime::now(),
            });
            return Ok(Some(Sandbox::restored(record, place, State::Ended(ended))));
        }
        Phase::Stopping => 0,
        Phase::Ready if record.boot_id != boot_id => lost("it is of an earlier boot"),
        Phase::Ready => {
            let pins = pins(&record.network, record.ipc, &place);
            if pins.iter().all(|pin| is_pinned(pin)) {
                return Ok(Some(Sandbox::restored(record, place, State::Ready)));
            }
            lost("a pin is gone")
        }
    };
    place.release()?;
    let ended = Ended {
        code,
        at: SystemTime::now(),
    };
    record.phase = Phase::Stopped;
    record.ended = Some(ended);
    store.save(&record)?;
    config.tell(&record.key, ended.change());
    Ok(Some(Sandbox::restored(record, place, State::Ended(ended))))
}
