//! [`ResendSchedule`]: when the exits of tasks that are not deleted are sent again. Never sends.
//!
//! containerd acknowledges an event when it has it, whether or not its clients listen again after
//! its restart: dockerd does some moments later, and would believe that a container runs whose exit
//! it has missed. A task that is stopped and not deleted is the sign of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use embedshim_core::id::TaskKey;

use super::queue::Outbox;

/// How long after a connection was made exits are sent again. The first time these are the exits
/// from before the connection, the other times those from before the last time, for clients that
/// listened later than the connection was made.
const AFTER: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
];

/// When which exits are sent again on one connection.
#[derive(Debug, Default)]
pub(super) struct ResendSchedule {
    connected: Option<Instant>,
    /// How many of [`AFTER`] have begun.
    begun: usize,
    /// The tasks whose exits are still to be sent this time.
    left: VecDeque<TaskKey>,
}

impl ResendSchedule {
    /// Begins: a connection was made, to a containerd that may have been restarted.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self {
            connected: Some(now),
            ..Self::default()
        };
    }

    /// Whether the connection has lasted until the last time.
    pub(super) fn is_over(&self) -> bool {
        self.begun == AFTER.len()
    }

    /// When exits are to be sent again next.
    pub(super) fn due(&self) -> Option<Instant> {
        let after = AFTER.get(self.begun)?;
        self.connected?.checked_add(*after)
    }

    /// The next exit that is to be sent again now.
    pub(super) fn next(&mut self, outbox: &Outbox, now: Instant) -> Option<Arc<[u8]>> {
        if self.due().is_some_and(|due| due <= now) {
            let last = self.begun.checked_sub(1).and_then(|last| AFTER.get(last));
            let connected = self.connected?;
            let from_before = connected.checked_add(last.copied().unwrap_or_default())?;
            self.left = outbox.undeleted_until(from_before);
            self.begun += 1;
        }
        // Tasks can have been deleted since this time began.
        while let Some(task) = self.left.pop_front() {
            if let Some(exit) = outbox.undeleted(&task) {
                return Some(exit);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use embedshim_core::event::{Event, EventKind};

    use super::*;

    #[test]
    fn an_exit_soon_after_the_connection_is_sent_again_until_its_task_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let outbox = Outbox::new(directory.path(), "/a");
        let emit = |kind| {
            let event = Event {
                namespace: "n".parse().unwrap(),
                id: "c".parse().unwrap(),
                owner: "/a".into(),
                at: SystemTime::now(),
                kind,
            };
            outbox.push(&event, b"exit".to_vec());
        };
        let (pid, exit_code, exited_at) = (1, 0, SystemTime::now());
        let mut schedule = ResendSchedule::default();
        let begun = Instant::now();
        schedule.begin(begun);
        emit(EventKind::Exited {
            exec: None,
            pid,
            exit_code,
            exited_at,
        });
        let mut sent = |after| {
            let mut count = 0;
            while schedule.next(&outbox, begun + after).is_some() {
                count += 1;
            }
            count
        };
        assert_eq!(AFTER.map(&mut sent), [0, 1, 1]);
        schedule.begin(Instant::now());
        emit(EventKind::Deleted {
            pid,
            exit_code,
            exited_at,
        });
        let long_after = Instant::now() + Duration::from_mins(1);
        assert!(schedule.next(&outbox, long_after).is_none());
    }
}
