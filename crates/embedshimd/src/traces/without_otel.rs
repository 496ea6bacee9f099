//! The traces of a build without OpenTelemetry: none. Owns that a daemon is put together in the
//! same way; costs nothing.

use crate::config::Config;

/// A handler whose requests have no spans is the handler.
pub(crate) type Traced<H> = H;

/// No spans.
#[derive(Debug)]
pub(crate) struct Traces;

impl Traces {
    /// Starts nothing.
    pub(crate) fn start(_config: &Config) -> Self {
        Self
    }

    /// The handler itself.
    #[expect(clippy::unused_self, reason = "with OpenTelemetry it is used")]
    pub(crate) fn of<H>(&self, handler: H) -> Traced<H> {
        handler
    }

    /// Ends nothing.
    #[expect(clippy::unused_self, reason = "with OpenTelemetry it is used")]
    pub(crate) fn end(&self) {}
}
