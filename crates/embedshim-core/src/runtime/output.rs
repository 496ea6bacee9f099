//! What a runtime writes to its standard streams. Owns how much of it is kept: the end.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::task::JoinHandle;

/// Enough for any message, little enough for a runtime gone mad.
const MAX_OUTPUT: usize = 1024 * 1024;
/// How long to wait for the end of the output of a runtime that has ended.
const LEFT_OPEN: Duration = Duration::from_secs(1);

/// What a runtime writes, read while it runs.
pub(super) struct Collected(Option<JoinHandle<Vec<u8>>>);

impl Collected {
    /// Reads to the end, or the runtime would be killed by SIGPIPE, and keeps the end of it.
    pub(super) fn begin(pipe: Option<impl AsyncRead + Send + Unpin + 'static>) -> Self {
        Self(pipe.map(|mut pipe| {
            tokio::spawn(async move {
                let mut output = Vec::new();
                // What was read before an error is all there is.
                while matches!(pipe.read_buf(&mut output).await, Ok(count) if count > 0) {
                    keep_end(&mut output, 2 * MAX_OUTPUT);
                }
                keep_end(&mut output, MAX_OUTPUT);
                output
            })
        }))
    }

    /// The runtime has ended, but a hook that went to the background may keep its pipe open.
    pub(super) async fn take(self) -> Vec<u8> {
        let Some(reader) = self.0 else {
            return Vec::new();
        };
        tokio::time::timeout(LEFT_OPEN, reader)
            .await
            .ok()
            .and_then(Result::ok)
            .unwrap_or_default()
    }
}

/// Of more than `limit` bytes the last [`MAX_OUTPUT`] stay.
fn keep_end(output: &mut Vec<u8>, limit: usize) {
    if output.len() > limit {
        output.drain(..output.len() - MAX_OUTPUT);
    }
}
