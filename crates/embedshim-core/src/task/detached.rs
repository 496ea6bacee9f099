//! Work that outlives its caller: a mutation must not end half-way because a client hung up.

use std::future::Future;
use std::sync::Arc;

use crate::error::Error;
use crate::task::engine::Shared;

/// Runs `work` as a task of its own and waits for it; dropping this future abandons the answer only. `shared` knows that it is under
/// way.
pub(super) async fn detached<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let under_way = shared.work();
    let work = async move {
        let result = work.await;
        drop(under_way);
        result
    };
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(panic) => Err(Error::Internal(panic.to_string())),
    }
}

/// Runs file-system work, which may block, away from the runtime's thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| Error::Internal(panic.to_string()))
}
