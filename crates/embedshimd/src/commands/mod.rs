//! What an operator asks: a file for each command, most of which ask a running daemon for a
//! document and show it. Owns the tables and sentences; every fact in them is the daemon's or the
//! exit monitor's.

pub(crate) mod config;
pub(crate) mod events;
pub(crate) mod inspect;
pub(crate) mod metrics;
pub(crate) mod pins;
pub(crate) mod ps;
pub(crate) mod report;
mod sandboxes;
pub(crate) mod status;
mod table;
pub(crate) mod watch;
mod words;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::admin::client::{AskError, ask, fetch};
use crate::outcome::{Code, Failure};

/// Asks the daemon of the state directory for a document.
fn document<T: DeserializeOwned>(state_dir: &Path, path: &str) -> Result<T, Failure> {
    ask(state_dir, path).map_err(failure)
}

/// Asks for a text.
fn text(state_dir: &Path, path: &str) -> Result<String, Failure> {
    let bytes = fetch(state_dir, path).map_err(failure)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn failure(error: AskError) -> Failure {
    let code = match error {
        AskError::NotRunning { .. } | AskError::NoAnswer { .. } | AskError::Ended { .. } => {
            Code::NoDaemon
        }
        _ => Code::Failed,
    };
    Failure::new(code, error)
}

fn json(document: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(document)?)
}
