//! [`Admin`]: the socket and the threads that answer on it. Owns who is answered, how many at once,
//! and that the socket is there again when its file was removed.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use shim_api::bootstrap::location;
use shim_api::socket;
use tracing::{debug, warn};

use super::routes;
use super::view::View;
use super::workers::{STACK, Workers};

/// After a failed accept: descriptors or memory are short.
const PAUSE: Duration = Duration::from_millis(100);

/// The admin socket of a daemon.
#[derive(Debug)]
pub(crate) struct Admin {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    view: Arc<View>,
    /// The listener of the path, which is another one when the file was removed.
    listener: Mutex<UnixListener>,
    workers: Arc<Workers>,
}

impl Admin {
    /// Listens in the state directory, which this process has for itself, and answers from now on.
    pub(crate) fn start(view: Arc<View>) -> io::Result<Self> {
        let path = location::admin_socket(&view.state_dir)?;
        let shared = Arc::new(Shared {
            view,
            listener: Mutex::new(listen(&path)?),
            workers: Arc::default(),
        });
        let answering = Arc::clone(&shared);
        thread::Builder::new()
            .name("admin".into())
            .stack_size(STACK)
            .spawn(move || answer_all(&answering))?;
        Ok(Self { path, shared })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the socket again, after its file was removed.
    pub(crate) fn recreate(&self) -> io::Result<()> {
        let listener = listen(&self.path)?;
        let old = std::mem::replace(&mut *self.shared.listener(), listener);
        // Lets the thread that waits on it look for the new one.
        shutdown(old.as_raw_fd(), Shutdown::Both)?;
        Ok(())
    }
}

impl Shared {
    fn listener(&self) -> MutexGuard<'_, UnixListener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = socket::replace(path)?;
    listener.set_nonblocking(false)?;
    Ok(listener)
}

/// Answers clients, without end.
fn answer_all(shared: &Arc<Shared>) {
    loop {
        // The lock is held for the copy alone.
        let listener = shared.listener().try_clone();
        let accepted = listener.and_then(|listener| accept_all(shared, &listener));
        if let Err(error) = accepted {
            debug!(%error, "admin socket: cannot accept a client: trying again");
            thread::sleep(PAUSE);
        }
    }
}

/// Accepts until the listener is another one.
fn accept_all(shared: &Arc<Shared>, listener: &UnixListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = check_peer(&stream) {
            warn!(%error, "admin socket: refusing a peer");
            continue;
        }
        let view = Arc::clone(&shared.view);
        shared
            .workers
            .answer(stream, move |path| routes::reply(&view, path))?;
    }
}

/// Refuses peers that are neither root nor this daemon's user.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let peer = getsockopt(stream, PeerCredentials)?.uid();
    let own = geteuid().as_raw();
    if peer == 0 || peer == own {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "it is user {peer}, and only root and user {own} are answered"
    )))
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use super::super::client::ask;
    use super::super::documents::{Manager, Phase, Status};
    use super::*;
    use crate::history::History;
    use crate::state_dir::lives::Lives;

    fn view(state_dir: &Path, reactor: tokio::runtime::Handle) -> Arc<View> {
        Arc::new(View {
            began: Instant::now(),
            state_dir: state_dir.to_owned(),
            lives: Arc::new(Lives::begin(state_dir, None)),
            manager: None,
            keeper: None,
            capacity: 1,
            history: History::new(),
            reactor,
            serving: OnceLock::new(),
            is_leaving: AtomicBool::new(false),
        })
    }

    #[test]
    fn a_daemon_whose_reactor_stands_still_answers_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let admin = Admin::start(view(directory.path(), runtime.handle().clone())).unwrap();
        let status: Status = ask(directory.path(), "/v1/status").unwrap();
        assert_eq!(status.daemon.reactor_seconds, None);
        assert_eq!(status.daemon.phase, Phase::Starting);
        assert_eq!(status.manager, Manager::None);
        let named = |words: &str| status.problems.iter().any(|line| line.contains(words));
        assert!(named("the reactor does not answer"), "{status:?}");

        // It goes on, and its socket is removed and made again.
        let running = thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        std::fs::remove_file(admin.path()).unwrap();
        admin.recreate().unwrap();
        let status: Status = ask(directory.path(), "/v1/status").unwrap();
        assert!(status.daemon.reactor_seconds.is_some(), "{status:?}");
        assert!(!running.is_finished());
    }
}
