//! [`Rounds`]: when exits that nobody has acted on are told again. Never sends.
//!
//! containerd acknowledges an event when it has it, whether or not its clients listen again after its restart: docker does some
//! moments later, and would believe for ever that such a container runs (containerd.md 5). A task that is stopped and not
//! deleted is the sign of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use embedshim_core::id::TaskKey;

use super::queue::Outbox;

/// How long after a connection was made exits are told again: in the first round those from before the connection, in the others
/// those from before the last round, for who listened later than the connection was made.
const AFTER: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
];
/// When which exits are told again.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    connected: Option<Instant>,
    /// How many of [`AFTER`] have begun.
    begun: usize,
    /// Of whom this round has still to tell.
    left: VecDeque<TaskKey>,
}

impl Rounds {
    /// A connection was made, to a containerd that may have been restarted.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self {
            connected: Some(now),
            ..Self::default()
        };
    }

    /// The connection has lasted for longer than all rounds.
    pub(super) fn are_over(&self) -> bool {
        self.begun == AFTER.len()
    }

    /// When there is something to do next.
    pub(super) fn due(&self) -> Option<Instant> {
        let after = AFTER.get(self.begun)?;
        self.connected?.checked_add(*after)
    }

    /// The next exit to tell again, now.
    pub(super) fn next(&mut self, outbox: &Outbox, now: Instant) -> Option<Arc<[u8]>> {
        if self.due().is_some_and(|due| due <= now) {
            let last = self.begun.checked_sub(1).and_then(|last| AFTER.get(last));
            let connected = self.connected?;
            let from_before = connected.checked_add(last.copied().unwrap_or_default())?;
            self.left = outbox.unheeded_at(from_before);
            self.begun += 1;
        }
        // Who was deleted since the round began is not told of.
        while let Some(task) = self.left.pop_front() {
            if let Some(exit) = outbox.unheeded(&task) {
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
    fn an_exit_soon_after_the_connection_is_told_again_until_its_task_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let outbox = Outbox::new(directory.path(), "/a");
        let tell = |kind| {
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
        let mut rounds = Rounds::default();
        let begun = Instant::now();
        rounds.begin(begun);
        tell(EventKind::Exited {
            exec: None,
            pid,
            exit_code,
            exited_at,
        });
        let mut told = |after| {
            let mut count = 0;
            while rounds.next(&outbox, begun + after).is_some() {
                count += 1;
            }
            count
        };
        assert_eq!(AFTER.map(&mut told), [0, 1, 1]);
        rounds.begin(Instant::now());
        tell(EventKind::Deleted {
            pid,
            exit_code,
            exited_at,
        });
        let long_after = Instant::now() + Duration::from_mins(1);
        assert!(rounds.next(&outbox, long_after).is_none());
    }
}
