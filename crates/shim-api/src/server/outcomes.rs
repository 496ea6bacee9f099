//! [`Outcomes`]: the way of an answer into its connection's journal, before it is given. Owns what
//! waits to be noted; notes nothing itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

/// Notes an answer in the connection's journal before it is given: that of a deletion, which
/// removes what the answer is made from.
#[derive(Clone, Debug)]
pub struct Outcomes {
    stream: u32,
    queue: Arc<Queue>,
}

/// An answer that is to be noted.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) stream: u32,
    pub(super) answer: Vec<u8>,
    /// Completed when it is noted.
    pub(super) noted: oneshot::Sender<()>,
}

/// What waits. Every connection has one, and nearly all are empty: a channel of tokio's takes
/// 1.8 kB.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    came: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    outcomes: Vec<Outcome>,
    /// The connection has ended.
    is_closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outcomes {
    /// Returns when the answer is noted, or when its connection has ended.
    pub async fn note(&self, answer: Vec<u8>) {
        let (noted, is_noted) = oneshot::channel();
        let outcome = Outcome {
            stream: self.stream,
            answer,
            noted,
        };
        if self.queue.put(outcome) {
            let _ = is_noted.await;
        }
    }
}

impl Queue {
    /// Whether it will be noted.
    fn put(&self, outcome: Outcome) -> bool {
        let mut waiting = self.lock();
        if waiting.is_closed {
            return false;
        }
        waiting.outcomes.push(outcome);
        drop(waiting);
        self.came.notify_one();
        true
    }
}

/// The connection's end of the way. Dropping it ends the waiting for all that is not noted.
#[derive(Debug, Default)]
pub(super) struct ToNote(Arc<Queue>);

impl ToNote {
    /// The other end, for the call of this stream.
    pub(super) fn from(&self, stream: u32) -> Outcomes {
        Outcomes {
            stream,
            queue: Arc::clone(&self.0),
        }
    }

    /// The next ones, in the order in which they came. Cancelling it loses nothing.
    pub(super) async fn next(&self) -> Vec<Outcome> {
        loop {
            let outcomes = std::mem::take(&mut self.0.lock().outcomes);
            if !outcomes.is_empty() {
                return outcomes;
            }
            self.0.came.notified().await;
        }
    }
}

impl Drop for ToNote {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.is_closed = true;
        waiting.outcomes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_waited_for_until_it_is_noted_or_its_connection_ends() {
        let connection = ToNote::default();
        let [first, second] = [connection.from(1), connection.from(3)];
        let first = tokio::spawn(async move { first.note(vec![1]).await });
        let [outcome] = connection.next().await.try_into().unwrap();
        assert_eq!((outcome.stream, &outcome.answer[..]), (1, &[1][..]));
        assert!(!first.is_finished());
        outcome.noted.send(()).unwrap();
        first.await.unwrap();

        let late = second.clone();
        let waiting = tokio::spawn(async move { second.note(vec![2]).await });
        while connection.0.lock().outcomes.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(connection);
        waiting.await.unwrap();
        late.note(vec![3]).await;
    }
}
