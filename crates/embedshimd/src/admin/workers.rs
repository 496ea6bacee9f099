//! [`Workers`]: a thread for each client that is being answered. Owns how many there are at once;
//! knows neither sockets nor documents.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::debug;

use super::follow::Follower;
use super::http::{self, Answer, Stream};

/// How long a client may take to send its request, and how long to read the answer.
const LIMIT: Duration = Duration::from_secs(5);
/// So many clients are answered at once; more are refused.
const MAX_CLIENTS: usize = 8;
/// So many beside them are told events.
const MAX_FOLLOWERS: usize = 8;
/// How long a client that is refused may take to hear so.
const REFUSAL_LIMIT: Duration = Duration::from_millis(10);
/// The stack of each thread, which writes documents into the heap.
pub(super) const STACK: usize = 256 * 1024;

/// The threads of one socket.
#[derive(Debug, Default)]
pub(super) struct Workers {
    clients: AtomicUsize,
    followers: AtomicUsize,
}

/// What a client gets for its request.
pub(super) enum Reply {
    Answer(Answer),
    /// Each event, for as long as it stays.
    Events(Follower),
}

impl Workers {
    /// Answers a client by `route`, in a thread of its own.
    pub(super) fn answer(
        self: &Arc<Self>,
        mut stream: impl Stream + Send + 'static,
        route: impl FnOnce(&str) -> Reply + Send + 'static,
    ) -> io::Result<()> {
        let Some(client) = Place::take(self, |workers| &workers.clients, MAX_CLIENTS) else {
            let answer = Answer::text(503, "too many clients are being answered");
            // A client that does not read it finds its connection closed.
            let _ = http::write(&mut stream, &answer, Instant::now() + REFUSAL_LIMIT);
            return Ok(());
        };
        let work = move || {
            if let Err(error) = serve(&mut stream, client, route) {
                debug!(%error, "a client of the admin socket or of the metrics was not answered");
            }
        };
        let thread = thread::Builder::new()
            .name("admin-client".into())
            .stack_size(STACK);
        thread.spawn(work).map(drop)
    }
}

/// Reads a request, gives its path to `route`, and writes what the client gets.
fn serve(
    stream: &mut impl Stream,
    client: Place,
    route: impl FnOnce(&str) -> Reply,
) -> io::Result<()> {
    let reply = match http::read_path(stream, Instant::now() + LIMIT)? {
        Ok(path) => route(&path),
        Err(refused) => Reply::Answer(refused),
    };
    let answer = match reply {
        Reply::Answer(answer) => answer,
        Reply::Events(follower) => {
            let workers = Arc::clone(&client.workers);
            match Place::take(&workers, |workers| &workers.followers, MAX_FOLLOWERS) {
                Some(_follower) => {
                    // One that stays keeps no other from being answered.
                    drop(client);
                    return follower.run(stream);
                }
                None => Answer::text(503, "too many clients are being told events"),
            }
        }
    };
    http::write(stream, &answer, Instant::now() + LIMIT)
}

/// A client that is being answered, or told events, for as long as this lives.
struct Place {
    workers: Arc<Workers>,
    counter: fn(&Workers) -> &AtomicUsize,
}

impl Place {
    fn take(
        workers: &Arc<Workers>,
        counter: fn(&Workers) -> &AtomicUsize,
        limit: usize,
    ) -> Option<Self> {
        let workers = Arc::clone(workers);
        let place = Self { workers, counter };
        let before = counter(&place.workers).fetch_add(1, Ordering::AcqRel);
        (before < limit).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        (self.counter)(&self.workers).fetch_sub(1, Ordering::AcqRel);
    }
}
