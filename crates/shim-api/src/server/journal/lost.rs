//! [`UnknownRequests`]: requests of which a damaged journal tells no more than how many they are at
//! most. Owns which streams they can have had. Pure.

/// The most requests that are taken for lost in a gap: as many as a connection has under way.
pub(super) const MOST_LOST: u32 = 1024;

/// Requests of which not even the stream is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct UnknownRequests {
    /// The stream of the last request that is known to come before them.
    after: Option<u32>,
    at_most: u32,
}

impl UnknownRequests {
    /// The requests of a journal that is gone as a whole.
    pub(super) const ALL: Self = Self {
        after: None,
        at_most: MOST_LOST,
    };

    /// No requests yet. Those that are added come after the request of this stream.
    pub(super) fn after(stream: Option<u32>) -> Self {
        Self {
            after: stream,
            at_most: 0,
        }
    }

    /// Adds so many requests.
    pub(super) fn add(&mut self, count: u32) {
        self.at_most = self.at_most.saturating_add(count).min(MOST_LOST);
    }

    /// Their streams, if this is the first request that came after them: those of Go's client
    /// follow each other.
    pub(in crate::server) fn before(self, next: u32) -> impl Iterator<Item = u32> {
        let after = self.after.unwrap_or(0);
        let span = self.at_most.saturating_mul(2);
        let first = next.saturating_sub(span).max(after.saturating_add(1));
        (first..next).filter(|stream| stream % 2 == 1)
    }

    /// Their streams, if nothing is known of what came after them, but of what came before.
    pub(in crate::server) fn after_last(self) -> Option<impl Iterator<Item = u32>> {
        let after = self.after?;
        let span = self.at_most.saturating_mul(2);
        Some(self.before(after.saturating_add(span).saturating_add(1)))
    }
}
