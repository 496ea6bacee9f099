//! [`Follower`]: one client that is told each event when it happens, a JSON object a line, until it
//! closes its connection. Owns that a client that does not read waits alone: it misses events, and
//! is told how many.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::documents::EventLine;
use super::http::{self, Stream};
use crate::history::{Batch, History};

/// Lines of JSON.
const CONTENT_TYPE: &str = "application/x-ndjson";
/// How long the head of the answer may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether the client is still there while nothing happens.
const PERIOD: Duration = Duration::from_secs(1);

/// Where a client is in the history.
#[derive(Debug)]
pub(super) struct Follower {
    history: Arc<History>,
    cursor: u64,
}

impl Follower {
    /// From the event of this number on; without one, from the next on.
    pub(super) fn new(history: &Arc<History>, from: Option<u64>) -> Self {
        Self {
            history: Arc::clone(history),
            cursor: from.unwrap_or_else(|| history.recent().next),
        }
    }

    /// Tells events until the client is gone. A client that does not read stops this thread, and
    /// nothing else.
    pub(super) fn run(mut self, stream: &mut impl Stream) -> io::Result<()> {
        http::write_open_head(stream, CONTENT_TYPE, Instant::now() + LIMIT)?;
        stream.set_limits(None)?;
        while !has_hung_up(stream)? {
            let batch = self.history.next(&mut self.cursor, PERIOD);
            stream.write_all(&lines(&batch)?)?;
        }
        Ok(())
    }
}

fn lines(batch: &Batch) -> io::Result<Vec<u8>> {
    let lost = (batch.lost > 0).then_some(EventLine::Lost { lost: batch.lost });
    let events = batch.events.iter().cloned().map(EventLine::Event);
    let mut text = Vec::new();
    for line in lost.into_iter().chain(events) {
        serde_json::to_writer(&mut text, &line)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Whether the client has closed its end.
fn has_hung_up(stream: &impl AsFd) -> io::Result<bool> {
    // The kernel tells of it without being asked to.
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    let found = polled.iter().filter_map(PollFd::revents);
    Ok(found.fold(PollFlags::empty(), |all, one| all | one) != PollFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::history::CAPACITY;
    use crate::history::tests::event;

    /// A thread that tells this client, and says when it has ended.
    fn follow(history: &Arc<History>, mut stream: UnixStream) -> mpsc::Receiver<io::Result<()>> {
        let follower = Follower::new(history, Some(0));
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(follower.run(&mut stream)));
        ended
    }

    #[test]
    fn a_client_that_does_not_read_holds_up_no_event_and_is_told_how_many_it_missed() {
        let history = History::new();
        let (client, ours) = UnixStream::pair().unwrap();
        let ended = follow(&history, ours);
        // More than the kernel's buffer and the history have room for.
        let all = u64::try_from(CAPACITY).unwrap() * 20;
        for number in 0..all {
            history.add(event(&format!("c{number}"), "create"));
        }
        client
            .set_read_timeout(Some(Duration::from_mins(1)))
            .unwrap();
        let mut lines = BufReader::new(client).lines().map(Result::unwrap);
        let head: Vec<_> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
        assert_eq!(head.first().map(String::as_str), Some("HTTP/1.1 200 OK"));
        let (mut due, mut missed) = (0, 0);
        while due < all {
            match serde_json::from_str(&lines.next().unwrap()).unwrap() {
                EventLine::Event(event) => {
                    assert_eq!(event.number, due);
                    due += 1;
                }
                EventLine::Lost { lost } => {
                    due += lost;
                    missed += lost;
                }
                EventLine::Replaced { .. } => panic!("a daemon does not say this"),
            }
        }
        assert!(
            missed > 0,
            "nothing was missed: the kernel's buffer is larger"
        );
        drop(lines);
        let limit = Duration::from_mins(1);
        // It is gone before anything happens again.
        let _ = ended.recv_timeout(limit).unwrap();
    }

    #[test]
    fn a_client_that_goes_while_nothing_happens_is_noticed() {
        let history = History::new();
        let (client, ours) = UnixStream::pair().unwrap();
        let ended = follow(&history, ours);
        drop(client);
        let _ = ended.recv_timeout(Duration::from_mins(1)).unwrap();
    }
}
