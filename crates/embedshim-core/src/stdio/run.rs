//! [`Run`]: a flow at work, a task that becomes an entry of [`Idle`] when nothing flows, and the
//! other way round. Owns when bytes are moved and what is waited for in between.

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::PollFlags;
use tokio::io::Interest;
use tracing::{debug, warn};

use super::append::Dropped;
use super::flow_state::{AtEnd, FlowPath, FlowState, TERMINAL, remove_unread};
use super::idle::{Idle, Resume};
use super::open;
use super::pump::{Stopped, Way, pump};
use super::ready::is_ready;
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::sys;

/// A terminal that no process has open is looked at again after this.
const HUNG_UP: Duration = Duration::from_millis(100);
/// The same for a stream that cannot be moved for a lack of descriptors, memory or threads.
const TROUBLE: Duration = Duration::from_millis(500);
/// The output of an exec that has ended, of which nothing is taken for this long, is given up if it
/// has no reader: nothing may ever delete the exec.
const UNREAD: Duration = Duration::from_mins(1);

/// What to do after a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Pump,
    /// Once more, and if nothing has come it is over.
    PumpLast,
    End,
}

/// What a flow is while it moves bytes, as a task, and while it rests.
pub(super) struct Run {
    path: FlowPath,
    fds: ProcessFds,
    shared: Arc<FlowState>,
    peer: Option<OwnedFd>,
    dropped: Dropped,
    idle: Idle,
    number: u64,
}

impl Resume for Run {
    fn resume(self: Box<Self>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.flow())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Run {
    /// Lets it rest, or makes it a task if there is something to be moved already.
    pub(super) fn start(
        path: FlowPath,
        fds: ProcessFds,
        shared: Arc<FlowState>,
        idle: &Idle,
        number: u64,
    ) {
        let run = Box::new(Self {
            peer: peer(path.way, &fds),
            path,
            fds,
            shared,
            dropped: Dropped::default(),
            idle: idle.clone(),
            number,
        });
        if let Err(run) = run.rest() {
            idle.wake(run);
        }
    }

    /// Moves what there is, until the flow rests or is over.
    pub(super) async fn flow(mut self: Box<Self>) {
        let mut next = Next::Pump;
        let mut is_in_trouble = false;
        while next != Next::End {
            if self.shared.is_last() {
                self.peer = None;
            }
            self.shared.pump_begins();
            let pumped = self.pump().await;
            if !matches!(pumped, Ok((Stopped::SinkFull, _))) {
                self.shared.nothing_waits();
            }
            match pumped {
                // Its owner has dropped it, and keeps the ends.
                _ if self.shared.progress.is_stopped() => return,
                Ok((Stopped::End | Stopped::Asked, _)) => break,
                Ok((Stopped::SourceEmpty, false)) if next == Next::PumpLast => break,
                Ok((stopped, _)) => {
                    is_in_trouble = false;
                    if stopped == Stopped::SourceEmpty && self.patience().is_none() {
                        match self.rest() {
                            Ok(()) => return,
                            Err(run) => self = run,
                        }
                    }
                    next = self.next(stopped).await;
                }
                // The stream has not ended: its ends stay, and it goes on when that is over.
                Err(error) => {
                    let (id, stream) = (&self.path.label.id, self.path.label.stream);
                    if !is_in_trouble {
                        warn!(%id, stream, %error, "cannot move a stream's bytes: trying again");
                    }
                    is_in_trouble = true;
                    tokio::time::sleep(TROUBLE).await;
                }
            }
            if self.shared.progress.is_stopped() {
                return;
            }
        }
        self.peer = None;
        let finish = move || self.finish();
        if let Err(error) = tokio::task::spawn_blocking(finish).await {
            debug!(%error, "cannot close the ends of a stream");
        }
    }

    /// How long what comes is waited for.
    fn patience(&self) -> Option<Duration> {
        self.path.patience.filter(|_| self.shared.is_last())
    }

    /// Lets it rest where that costs least. It comes back if there is something to be moved
    /// already, or if the kernel has no room for it.
    fn rest(self: Box<Self>) -> Result<(), Box<Self>> {
        let source = self.fds.first(self.path.way.source);
        let Some((_, source)) = source.filter(|_| !self.has_more_on_its_way()) else {
            return Err(self);
        };
        let (idle, number, shared) = (self.idle.clone(), self.number, Arc::clone(&self.shared));
        if let Err((error, run)) = idle.rest(number, source, self) {
            let id = &run.path.label.id;
            warn!(%id, %error, "cannot shrink the buffers of an idle stream");
            return Err(run);
        }
        // Something may have changed before it was there to be woken.
        let mut changed = pin!(shared.changed.notified());
        if changed.as_mut().enable()
            && let Some(run) = idle.take(number)
        {
            idle.wake(run);
        }
        Ok(())
    }

    /// Waits until there is something to do.
    async fn next(&self, stopped: Stopped) -> Next {
        let is_last = self.shared.is_last();
        match stopped {
            Stopped::SourceEmpty => {
                if self.has_more_on_its_way() {
                    return Next::Pump;
                }
                let Some((_, source)) = self.fds.first(self.path.way.source) else {
                    return Next::End;
                };
                let patience = self.patience();
                self.wait(Ok(source), Interest::READABLE, patience).await
            }
            Stopped::SinkFull => {
                let Some(sink) = self.path.way.sink.and_then(|sink| self.fds.get(sink)) else {
                    return Next::End;
                };
                // An init's client may be a containerd that is down.
                let limit =
                    (is_last && self.path.at_end == AtEnd::KeepUntilPublished).then_some(UNREAD);
                // A duplicate: of a terminal both flows may wait, and a descriptor can be waited
                // for once.
                match self.wait(sink.duplicate(), Interest::WRITABLE, limit).await {
                    Next::PumpLast => self.give_up_unless_read(&sink).await,
                    next => next,
                }
            }
            Stopped::HungUp if is_last => Next::End,
            Stopped::HungUp => {
                let _ = tokio::time::timeout(HUNG_UP, self.shared.changed.notified()).await;
                Next::Pump
            }
            Stopped::End | Stopped::Asked => Next::End,
        }
    }

    fn has_more_on_its_way(&self) -> bool {
        let stage = self.path.way.stage.and_then(|stage| self.fds.get(stage));
        stage.is_some_and(|stage| is_ready(&stage, PollFlags::POLLIN, 0))
    }

    async fn wait(
        &self,
        fd: io::Result<StreamFd>,
        interest: Interest,
        limit: Option<Duration>,
    ) -> Next {
        let expired = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => pending().await,
            }
        };
        let ready = async {
            let fd = sys::register_stream(fd?, interest)?;
            fd.ready(interest).await.map(drop)
        };
        tokio::select! {
            ready = ready => {
                if let Err(error) = ready {
                    warn!(id = %self.path.label.id, %error, "cannot wait for a stream: trying again");
                    tokio::time::sleep(TROUBLE).await;
                }
                Next::Pump
            }
            () = self.shared.changed.notified() => Next::Pump,
            () = expired => Next::PumpLast,
        }
    }

    /// A client that is slow is waited for. One that has gone leaves a fifo without a reader, once
    /// the daemon's own descriptor does not count as one any more.
    async fn give_up_unless_read(&self, sink: &StreamFd) -> Next {
        let (held, role) = (sink.clone(), self.path.way.sink);
        let fds = self.fds.clone();
        let look = move || -> io::Result<bool> {
            let Some(role) = role.filter(|_| open::is_held(&held)) else {
                return Ok(is_ready(&held, PollFlags::empty(), 0));
            };
            let writer = StreamFd::new(open::reopen(&held, libc::O_WRONLY | libc::O_NONBLOCK)?);
            drop(held);
            fds.exchange(Some((role, writer.clone())), &[role]);
            Ok(is_ready(&writer, PollFlags::empty(), 0))
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok(true)) => {
                let (id, stream) = (&self.path.label.id, self.path.label.stream);
                warn!(%id, stream, "the output of an ended exec has no reader: its rest is dropped");
                Next::End
            }
            _ => Next::Pump,
        }
    }

    async fn pump(&mut self) -> io::Result<(Stopped, bool)> {
        let (way, fds) = (self.path.way, self.fds.clone());
        let (shared, label) = (Arc::clone(&self.shared), self.path.label.clone());
        let mut own = std::mem::take(&mut self.dropped);
        let work = move || {
            let pumped = pump(way, &fds, &mut own, &shared.progress, &label);
            (pumped, own)
        };
        // Its owner may drop it while a container holds the thread up.
        let mut done = pin!(self.shared.done.notified());
        done.as_mut().enable();
        if self.shared.progress.is_stopped() {
            return Ok((Stopped::Asked, false));
        }
        tokio::select! {
            worked = tokio::task::spawn_blocking(work) => {
                let (pumped, own) = worked.map_err(io::Error::other)?;
                self.dropped = own;
                pumped
            }
            () = done => Ok((Stopped::Asked, false)),
        }
    }

    /// Closes both ends. What a client has not read is kept by a reader, which is no writer that
    /// would hide the end from it. Blocks.
    fn finish(&self) {
        let FlowPath { way, at_end, .. } = self.path;
        let is_last = self.shared.is_last();
        let is_published = || self.shared.is_published();
        let keeps_unread = match at_end {
            AtEnd::KeepUnread => true,
            AtEnd::KeepUntilPublished => !is_published(),
            AtEnd::Close | AtEnd::Leave => false,
        };
        let mut removed: Vec<FdRole> = way.stage.into_iter().collect();
        // While its process lives, the input of a terminal may still flow, and closing the master
        // would be a hang-up.
        if way.source != TERMINAL || is_last {
            removed.extend(way.source);
        }
        let mut reader = None;
        if let Some(role) = way.sink.filter(|_| at_end != AtEnd::Leave) {
            reader = self
                .fds
                .get(role)
                .filter(|fd| keeps_unread && open::is_held(fd))
                .and_then(|fd| open::reopen(&fd, libc::O_RDONLY | libc::O_NONBLOCK).ok())
                .map(|reader| (role, StreamFd::new(reader)));
            removed.push(role);
        }
        self.fds.exchange(reader, &removed);
        if at_end == AtEnd::KeepUntilPublished && is_published() {
            remove_unread(&self.fds, way);
        }
    }
}

/// The other side of a terminal, if its output is what flows. A terminal that we have open
/// ourselves never hangs up: its program may close it and open it again.
fn peer(way: Way, fds: &ProcessFds) -> Option<OwnedFd> {
    let master = fds.get(FdRole::Terminal)?;
    let flags = rustix::pty::OpenptFlags::RDWR
        | rustix::pty::OpenptFlags::NOCTTY
        | rustix::pty::OpenptFlags::CLOEXEC;
    let wanted = way.source == TERMINAL;
    wanted.then(|| rustix::pty::ioctl_tiocgptpeer(&master, flags).ok())?
}
