//! Waiting for a condition, with a deadline.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::bail;

/// Long enough for a loaded machine of two cores; waiting ends at once when what is waited for is
/// there.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How many seconds [`until`] waits instead, where a machine is emulated by a busy one.
const OF_GUESTS: &str = "EMBEDSHIM_TEST_PATIENCE";

/// Waits for a condition, at most [`PATIENCE`], or as long as a guest says.
pub fn until(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let said = std::env::var(OF_GUESTS).ok();
    let patience = patience(said.as_deref());
    let deadline = Instant::now() + patience;
    while !condition()? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain: {what}", patience.as_secs());
        }
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn patience(said: Option<&str>) -> Duration {
    let seconds = said.and_then(|said| said.parse().ok());
    seconds.map_or(PATIENCE, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_waited_for_longer() {
        assert_eq!(patience(Some("180")), Duration::from_mins(3));
        for said in [None, Some(""), Some("long")] {
            assert_eq!(patience(said), PATIENCE);
        }
    }
}
