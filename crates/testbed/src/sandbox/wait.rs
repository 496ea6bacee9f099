//! Waiting for a condition, with a deadline.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::bail;

/// Long enough for a loaded machine of two cores; waiting ends at once when what is waited for is
/// there.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a condition, at most [`PATIENCE`].
pub fn until(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition()? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain: {what}", PATIENCE.as_secs());
        }
        sleep(Duration::from_millis(10));
    }
    Ok(())
}
