//! Metrics by TCP, for a scraper that cannot connect to a unix socket. Only if the configuration
//! names an address; answers `/metrics` and `/healthz`, and nothing that names a container.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::{debug, info};

use super::routes;
use super::view::View;
use super::workers::{STACK, Workers};

/// After a failed accept: descriptors or memory are short.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens on this address, and answers from now on.
pub(crate) fn start(view: Arc<View>, address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    info!(address = %listener.local_addr()?, "metrics are served");
    let work = move || {
        let workers = Arc::<Workers>::default();
        loop {
            let accepted = listener.accept().and_then(|(stream, _)| {
                let view = Arc::clone(&view);
                workers.answer(stream, move |path| routes::reply_to_stranger(&view, path))
            });
            if let Err(error) = accepted {
                debug!(%error, "metrics: cannot accept a client: trying again");
                thread::sleep(PAUSE);
            }
        }
    };
    let thread = thread::Builder::new()
        .name("metrics".into())
        .stack_size(STACK);
    thread.spawn(work).map(drop)
}
