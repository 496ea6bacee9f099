//! [`Backlog`]: what waits for one containerd at one moment, for people and for metrics.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::shim::event::Envelope;
use protobuf::Message;

/// The events for one containerd at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// The path of the socket on which it listens.
    pub address: String,
    /// How many events wait.
    pub events: usize,
    /// How many bytes they have together.
    pub bytes: usize,
    /// When the oldest of them became true.
    pub oldest: Option<SystemTime>,
    /// How many events it has acknowledged since this process began.
    pub acknowledged: u64,
    /// How many were given up since then, because too many waited.
    pub lost: u64,
}

/// When an encoded event became true, if that is after the epoch.
pub(super) fn time_of(envelope: &[u8]) -> Option<SystemTime> {
    let time = Envelope::parse_from_bytes(envelope).ok()?.timestamp;
    let (seconds, nanos) = (u64::try_from(time.seconds), u32::try_from(time.nanos));
    let since =
        Duration::from_secs(seconds.ok()?).checked_add(Duration::from_nanos(nanos.ok()?.into()))?;
    UNIX_EPOCH.checked_add(since)
}
