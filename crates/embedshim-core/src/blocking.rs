//! File-system work away from the reactor. Owns no pool of its own: what may hang for long gets a
//! thread of its own where it is done.

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::Error;

/// So many threads do what takes microseconds, as long as each of them does.
const QUICK: usize = 4;
/// Work waits no longer for one of them. If they are held up, as by a cgroup that does not answer,
/// it gets another.
const PATIENCE: Duration = Duration::from_millis(50);

/// Runs file-system work, which may block, away from the runtime's thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| Error::Internal(panic.to_string()))
}

/// The same for work that takes microseconds, such as a record or a file of a cgroup: hundreds at
/// once, as when a node's containers end together, do not take a thread each.
pub(crate) async fn quickly<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    static SLOTS: Semaphore = Semaphore::const_new(QUICK);
    with_slot(&SLOTS, work).await
}

async fn with_slot<T: Send + 'static>(
    slots: &Semaphore,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let slot = timeout(PATIENCE, slots.acquire()).await;
    let _slot = slot.ok().and_then(Result::ok);
    blocking(work).await
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn quick_work_waits_for_a_thread_and_not_for_one_that_is_held_up() {
        let slots = Semaphore::new(QUICK);
        let freed = slots.acquire_many(4).await.unwrap();
        let began = Instant::now();
        let both = async { tokio::join!(with_slot(&slots, || ()), async { drop(freed) }) };
        both.await.0.unwrap();
        // Held up, and nothing frees them.
        let _held = slots.acquire_many(4).await.unwrap();
        with_slot(&slots, || ()).await.unwrap();
        assert!(began.elapsed() >= PATIENCE);
        assert_eq!(slots.available_permits(), 0);
    }
}
