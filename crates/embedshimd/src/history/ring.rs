//! [`History`]: the last events of a daemon, in order, for any number of readers. Owns the bound,
//! and what a reader misses that is too slow; knows no word for an event but the first of a task.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::lines::Lines;
use crate::admin::documents::{Event, History as Document, Recent, VERSION, seconds};

/// How the words for events of sandboxes begin.
pub(super) const SANDBOX: &str = "sandbox-";
/// So many events are remembered.
pub(crate) const CAPACITY: usize = 1_000;
/// A reader is given so many at once.
const BATCH: usize = 64;
/// The first event of a task.
const CREATE: &str = "create";

/// The last events, for any number of readers. None of them keeps an event from being added.
#[derive(Debug)]
pub(crate) struct History {
    began: SystemTime,
    last: Mutex<Last>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Last {
    events: Lines,
    /// The number of the next event.
    next: u64,
    /// Readers that wait for it.
    waiting: usize,
}

/// What a reader is given.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// So many before these are forgotten.
    pub(crate) lost: u64,
    pub(crate) events: Vec<Event>,
}

impl Last {
    /// The number of the oldest event that is remembered.
    fn oldest(&self) -> u64 {
        let remembered = u64::try_from(self.events.len()).unwrap_or(u64::MAX);
        self.next.saturating_sub(remembered)
    }

    /// When the oldest was, if any was forgotten before it.
    fn forgotten_before(&self) -> Option<f64> {
        let oldest = (self.oldest() > 0).then(|| self.events.copy(0, 1))?;
        oldest.events().first().map(|event| event.at)
    }
}

impl History {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            began: SystemTime::now(),
            last: Mutex::default(),
            news: Condvar::new(),
        })
    }

    /// Remembers an event, whose number this gives. Waits for no reader but for a copy.
    pub(crate) fn add(&self, mut event: Event) {
        let mut last = self.last();
        event.number = last.next;
        last.next += 1;
        if last.events.len() >= CAPACITY {
            last.events.pop();
        }
        last.events.push(&event);
        // Each notification would be a system call.
        if last.waiting > 0 {
            self.news.notify_all();
        }
    }

    /// All that is remembered.
    pub(crate) fn recent(&self) -> Recent {
        let last = self.last();
        let (since, next) = (self.since(&last), last.next);
        let events = last.events.copy(0, CAPACITY);
        drop(last);
        Recent {
            version: VERSION,
            since,
            next,
            events: events.events(),
        }
    }

    /// What is remembered of the task of this name, and of none that had its name before.
    pub(crate) fn of_task(&self, namespace: &str, id: &str) -> Document {
        let Recent {
            since, mut events, ..
        } = self.recent();
        events.retain(|event| event.is_of_task(namespace, id));
        let first = events.iter().rposition(|event| event.kind == CREATE);
        Document {
            since,
            events: events.split_off(first.unwrap_or(0)),
        }
    }

    /// The events from `cursor` on, which is moved behind them; waits for one, at most for `limit`.
    pub(crate) fn next(&self, cursor: &mut u64, limit: Duration) -> Batch {
        let mut guard = self.last();
        if *cursor >= guard.next {
            // A number of a former daemon, perhaps.
            *cursor = guard.next;
            guard.waiting += 1;
            let waited = self
                .news
                .wait_timeout_while(guard, limit, |last| last.next <= *cursor);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
            guard.waiting -= 1;
        }
        let oldest = guard.oldest();
        let lost = oldest.saturating_sub(*cursor);
        *cursor = (*cursor).max(oldest);
        let skipped = usize::try_from(*cursor - oldest).unwrap_or(usize::MAX);
        let events = guard.events.copy(skipped, BATCH);
        drop(guard);
        *cursor += u64::try_from(events.count).unwrap_or(0);
        Batch {
            lost,
            events: events.events(),
        }
    }

    /// Since when all is remembered, in seconds since the epoch.
    fn since(&self, last: &Last) -> f64 {
        last.forgotten_before()
            .unwrap_or_else(|| since_epoch(self.began))
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Event {
    fn is_of_task(&self, namespace: &str, id: &str) -> bool {
        self.namespace == namespace && self.id == id && !self.kind.starts_with(SANDBOX)
    }
}

pub(super) fn since_epoch(time: SystemTime) -> f64 {
    seconds(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn event(id: &str, kind: &str) -> Event {
        Event {
            number: 0,
            at: 1.0,
            kind: kind.into(),
            namespace: "default".into(),
            id: id.into(),
            exec: None,
            pid: Some(1),
            exit_code: None,
        }
    }

    fn numbers(batch: &Batch) -> Vec<u64> {
        batch.events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn a_reader_has_each_event_once_and_is_told_how_many_it_has_missed() {
        let history = History::new();
        let now = Duration::ZERO;
        let mut cursor = 0;
        assert!(history.next(&mut cursor, now).events.is_empty());
        history.add(event("a", "create"));
        history.add(event("a", "start"));
        assert_eq!(numbers(&history.next(&mut cursor, now)), [0, 1]);
        let more = u64::try_from(CAPACITY).unwrap() + 7;
        for _ in 0..more {
            history.add(event("a", "oom"));
        }
        let (mut lost, mut seen) = (0, Vec::new());
        loop {
            let batch = history.next(&mut cursor, now);
            lost += batch.lost;
            seen.extend(numbers(&batch));
            if batch.events.is_empty() {
                break;
            }
        }
        assert_eq!(lost, 7);
        assert_eq!(seen, (9..more + 2).collect::<Vec<_>>());
        // A number that no event of this daemon has yet.
        let mut cursor = u64::MAX;
        assert!(history.next(&mut cursor, now).events.is_empty());
        history.add(event("a", "delete"));
        assert_eq!(numbers(&history.next(&mut cursor, now)), [more + 2]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_says_since_when() {
        let history = History::new();
        let began = since_epoch(history.began);
        for number in 0..=CAPACITY {
            assert!((history.recent().since - began).abs() < 0.001, "{number}");
            history.add(event("a", "oom"));
        }
        let recent = history.recent();
        assert_eq!(recent.events.len(), CAPACITY);
        assert!((recent.since - 1.0).abs() < 0.001, "{}", recent.since);
    }

    #[test]
    fn a_task_has_the_events_since_its_creation_and_none_of_others() {
        let history = History::new();
        for (id, what) in [
            ("a", "create"),
            ("a", "delete"),
            ("a", "sandbox-started"),
            ("b", "create"),
            ("a", "create"),
            ("a", "start"),
            ("a", "sandbox-stopped"),
        ] {
            history.add(event(id, what));
        }
        let of = |id| {
            let events = history.of_task("default", id).events;
            let words: Vec<String> = events.into_iter().map(|event| event.kind).collect();
            words
        };
        assert_eq!(of("a"), ["create", "start"]);
        assert_eq!(of("b"), ["create"]);
        assert!(history.of_task("other", "a").events.is_empty());
    }

    #[test]
    fn a_reader_that_waits_is_woken_by_an_event() {
        let history = History::new();
        let reading = Arc::clone(&history);
        let reader = std::thread::spawn(move || {
            let mut cursor = 0;
            numbers(&reading.next(&mut cursor, Duration::from_mins(5)))
        });
        history.add(event("a", "create"));
        assert_eq!(reader.join().unwrap(), [0]);
    }
}
