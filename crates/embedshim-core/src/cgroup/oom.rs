//! [`OomWatcher`]: which containers have lost a process to the OOM killer, while they live. One
//! epoll and one inotify instance for all of them; v1 notifies by eventfd, v2 by a modified file.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Cgroup;
use super::metrics::keyed;
use crate::kernel_file;
use crate::sys;

/// The token of the inotify instance in the epoll set; the others are the callers', which count
/// from 1.
const INOTIFY: u64 = 0;

/// Tells of OOM kills in the cgroups it watches.
pub(crate) struct OomWatcher {
    epoll: AsyncFd<Arc<OwnedFd>>,
    set: Epoll,
    inotify: Inotify,
    watches: Mutex<HashMap<u64, Watch>>,
}

#[derive(Debug)]
enum Watch {
    /// The kernel writes to the eventfd at each OOM, and once more when the cgroup goes.
    V1(EventFd),
    V2(WatchDescriptor),
}

impl Cgroup {
    /// How many of its processes the kernel has killed for want of memory (4.13);
    /// `None` if the kernel does not tell. Blocks.
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        let (directory, file) = self.oom_file()?;
        keyed(&kernel_file::read(directory.join(file)).ok()?, "oom_kill")
    }

    /// The file that counts OOM kills.
    fn oom_file(&self) -> Option<(&Path, &'static str)> {
        match self {
            Self::V1(controllers) => Some((controllers.get("memory")?, "memory.oom_control")),
            Self::V2(path) => Some((path, "memory.events")),
        }
    }
}

impl fmt::Debug for OomWatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OomWatcher")
            .field("watches", &self.watches().len())
            .finish_non_exhaustive()
    }
}

impl OomWatcher {
    /// A watcher of nothing yet. Needs a tokio runtime.
    pub(crate) fn new() -> io::Result<Self> {
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        set.add(&inotify, EpollEvent::new(EpollFlags::EPOLLIN, INOTIFY))?;
        let epoll = sys::register(Arc::new(set.0.try_clone()?), Interest::READABLE)?;
        Ok(Self {
            epoll,
            set,
            inotify,
            watches: Mutex::default(),
        })
    }

    /// Begins to watch. `token`, not 0, is what [`next`](Self::next) will say. Opens a few files of
    /// the cgroup.
    pub(crate) fn watch(&self, token: u64, cgroup: &Cgroup) -> io::Result<()> {
        let Some((directory, file)) = cgroup.oom_file() else {
            return Ok(());
        };
        let watch = if matches!(cgroup, Cgroup::V1(_)) {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            let control = File::open(directory.join(file))?;
            let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
            fs::write(directory.join("cgroup.event_control"), line)?;
            self.set
                .add(&event, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            Watch::V1(event)
        } else {
            Watch::V2(
                self.inotify
                    .add_watch(&directory.join(file), AddWatchFlags::IN_MODIFY)?,
            )
        };
        self.watches().insert(token, watch);
        Ok(())
    }

    /// Ends a watch. Idempotent.
    pub(crate) fn unwatch(&self, token: u64) {
        match self.watches().remove(&token) {
            Some(Watch::V1(event)) => drop(self.set.delete(&event)),
            Some(Watch::V2(descriptor)) => drop(self.inotify.rm_watch(descriptor)),
            None => {}
        }
    }

    /// Waits for the next sign of an OOM kill. Only a sign: the cgroup may just have been removed,
    /// or the file modified for another reason; the count in [`Cgroup::oom_kills`] is the fact.
    /// Cancel-safe.
    pub(crate) async fn next(&self) -> u64 {
        loop {
            let Ok(mut ready) = self.epoll.readable().await else {
                return std::future::pending().await;
            };
            match self.take() {
                Some(token) => return token,
                None => ready.clear_ready(),
            }
        }
    }

    fn take(&self) -> Option<u64> {
        loop {
            let mut events = [EpollEvent::empty()];
            match self.set.wait(&mut events, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => continue,
                Ok(1..) => {}
                _ => return None,
            }
            let token = events[0].data();
            if token == INOTIFY {
                if let Some(token) = self.modified() {
                    return Some(token);
                }
            } else if self.counted(token) {
                return Some(token);
            }
        }
    }

    /// Resets the eventfd. One whose cgroup is gone would stay ready.
    fn counted(&self, token: u64) -> bool {
        match self.watches().get(&token) {
            Some(Watch::V1(event)) => event.read().is_ok(),
            _ => false,
        }
    }

    fn modified(&self) -> Option<u64> {
        // One at a time would need a queue; several at once are rare, and each exit looks at its
        // counter anyway.
        let events = self.inotify.read_events().ok()?;
        let watches = self.watches();
        events.iter().find_map(|event| {
            let of =
                |watch: &Watch| matches!(watch, Watch::V2(descriptor) if *descriptor == event.wd);
            watches
                .iter()
                .find(|(_, watch)| of(watch))
                .map(|(token, _)| *token)
        })
    }

    fn watches(&self) -> MutexGuard<'_, HashMap<u64, Watch>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cgroup::tests::Own;

    #[tokio::test]
    async fn an_oom_kill_is_reported_and_counted() {
        let mut own = Own::new("oom");
        fs::write(own.path("memory").join("memory.limit_in_bytes"), "8M").unwrap();
        let watcher = OomWatcher::new().unwrap();
        watcher.watch(7, &own.cgroup).unwrap();
        assert_eq!(own.cgroup.oom_kills(), Some(0));
        own.run("exec head -c 64m /dev/zero | tail");
        let told = tokio::time::timeout(Duration::from_secs(30), watcher.next()).await;
        assert_eq!(told.expect("no OOM was reported"), 7);
        own.wait();
        assert!(own.cgroup.oom_kills().unwrap() >= 1);
        watcher.unwatch(7);
        watcher.unwatch(7);
    }

    #[tokio::test]
    async fn a_modified_file_is_a_sign_on_v2() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("memory.events");
        fs::write(&events, "oom_kill 0\n").unwrap();
        let cgroup = Cgroup::V2(dir.path().to_owned());
        let watcher = OomWatcher::new().unwrap();
        watcher.watch(3, &cgroup).unwrap();
        fs::write(&events, "oom_kill 2\n").unwrap();
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(10), watcher.next())
                .await
                .unwrap(),
            3
        );
        assert_eq!(cgroup.oom_kills(), Some(2));
    }
}
