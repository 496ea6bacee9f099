//! One short command of the OCI runtime, for what the launcher does without a daemon. Owns that the
//! command ends.

use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::failure::Failure;

/// Runs a short command of the OCI runtime and kills it at the limit.
pub(super) fn output(
    mut command: Command,
    binary: &str,
    limit: Duration,
) -> Result<Output, Failure> {
    let failed = |why: String| Failure::Runtime {
        binary: binary.into(),
        why,
    };
    let spawned = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| failed(error.to_string()))?;
    let deadline = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(failed(format!("no answer within {} s", limit.as_secs())));
        }
        sleep(Duration::from_millis(2));
    }
    Ok(child.wait_with_output()?)
}
