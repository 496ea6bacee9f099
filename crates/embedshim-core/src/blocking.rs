//! File-system work away from the reactor. Owns no pool of its own: what may hang for long gets a
//! thread of its own where it is done.

use crate::error::Error;

/// Runs file-system work, which may block, away from the runtime's thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| Error::Internal(panic.to_string()))
}
