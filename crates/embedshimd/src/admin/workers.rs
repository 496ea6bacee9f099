//! [`Workers`]: a thread for each client that is being answered. Owns how many there are at once;
//! knows neither sockets nor documents.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::debug;

use super::http::{self, Answer, Stream};

/// How long a client may take to send its request, and how long to read the answer.
const LIMIT: Duration = Duration::from_secs(5);
/// So many clients are answered at once; more are refused.
const MAX_CLIENTS: usize = 8;
/// How long a client that is refused may take to hear so.
const REFUSAL_LIMIT: Duration = Duration::from_millis(10);
/// The stack of each thread, which writes documents into the heap.
pub(super) const STACK: usize = 256 * 1024;

/// The threads of one socket.
#[derive(Debug, Default)]
pub(super) struct Workers {
    clients: AtomicUsize,
}

impl Workers {
    /// Answers a client by `route`, in a thread of its own.
    pub(super) fn answer(
        self: &Arc<Self>,
        mut stream: impl Stream + Send + 'static,
        route: impl FnOnce(&str) -> Answer + Send + 'static,
    ) -> io::Result<()> {
        let Some(client) = Client::admit(self) else {
            let answer = Answer::text(503, "too many clients are being answered");
            // A client that does not read it finds its connection closed.
            let _ = http::write(&mut stream, &answer, Instant::now() + REFUSAL_LIMIT);
            return Ok(());
        };
        let work = move || {
            let _client = client;
            if let Err(error) = http::serve(&mut stream, LIMIT, route) {
                debug!(%error, "a client of the admin socket or of the metrics was not answered");
            }
        };
        let thread = thread::Builder::new()
            .name("admin-client".into())
            .stack_size(STACK);
        thread.spawn(work).map(drop)
    }
}

/// A client that is being answered, for as long as this lives.
struct Client(Arc<Workers>);

impl Client {
    fn admit(workers: &Arc<Workers>) -> Option<Self> {
        let client = Self(Arc::clone(workers));
        let before = workers.clients.fetch_add(1, Ordering::AcqRel);
        (before < MAX_CLIENTS).then_some(client)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::AcqRel);
    }
}
