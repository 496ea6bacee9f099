//! [`ProcessFds`]: the descriptors of one process of a container that outlive this daemon, as one
//! set that changes at once. Owns how a set is held by the kernel and found again; what a
//! descriptor is for is [`FdRole`]'s.
//!
//! The set is one message with all descriptors (`SCM_RIGHTS`) in the queue of a socket pair, and
//! the store holds the pair. A change sends the new set and then drops the old one, so that at any
//! instant the last message in the queue is a whole set: a daemon that is killed between the two
//! leaves both, and the older is dropped by its successor. A change needs nothing of the store's
//! process, which may be stopped. What leaves the set is closed right afterwards, in a thread of
//! its own, since that may wait.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::queue::{Emptied, Outdated, Queue, Request, Set};
use super::role::FdRole;
use super::stream_fd::{StreamFd, off_the_reactor};
use super::sys::Source;
use super::{FdName, FdStore, InheritedFds};
use crate::failpoint;

/// The descriptors of one process. Clones are of the same set. Dropping it removes nothing, since
/// that is also what the end of a daemon looks like.
#[derive(Clone, Debug)]
pub(crate) struct ProcessFds {
    store: Arc<dyn FdStore>,
    number: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    set: Set,
    left_to: Option<Request>,
    queue: Option<Arc<Queue>>,
}

impl ProcessFds {
    /// An empty set under this number, which no other process has.
    pub(crate) fn new(store: Arc<dyn FdStore>, number: u64) -> Self {
        Self {
            store,
            number,
            state: Arc::default(),
        }
    }

    /// What the process's record has to hold.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Takes over what a predecessor has left under this number.
    pub(crate) fn inherit(&self, inherited: &mut InheritedFds) {
        let sockets = inherited.take_all(&self.name());
        if sockets.is_empty() {
            return;
        }
        let mut state = self.state();
        match Queue::resume(sockets) {
            Ok((queue, set, left_to)) => {
                state.queue = Some(Arc::new(queue));
                state.set = set;
                state.left_to = left_to;
            }
            Err(error) => {
                warn!(name = %self.name(), %error, "cannot read the stored descriptors of a process");
                let _ = self.store.remove(&self.name());
            }
        }
    }

    /// The descriptor of this role.
    pub(crate) fn get(&self, role: FdRole) -> Option<StreamFd> {
        let state = self.state();
        let found = state.set.iter().find(|(known, _)| *known == role);
        found.map(|(_, descriptor)| descriptor.clone())
    }

    /// Whether nothing is in the set.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.state().set.is_empty()
    }

    /// The first descriptor of these roles that there is, with its role.
    pub(crate) fn first(&self, roles: &[FdRole]) -> Option<(FdRole, StreamFd)> {
        let found = |role: &FdRole| Some((*role, self.get(*role)?));
        roles.iter().find_map(found)
    }

    /// Adds descriptors, each in the place of the one that has its role. On failure the set is what
    /// it was.
    pub(crate) fn insert(
        &self,
        descriptors: impl IntoIterator<Item = (FdRole, StreamFd)>,
    ) -> io::Result<()> {
        self.add(descriptors, true)
    }

    /// Opens a file and stores it, with no instant between the two: that its end is open is noticed
    /// by the client that waits for it, and it must not be closed again by the death of this
    /// daemon. The first error is that of opening. Blocks.
    pub(crate) fn open_and_insert(
        &self,
        role: FdRole,
        path: &CStr,
        flags: libc::c_int,
    ) -> io::Result<io::Result<()>> {
        self.obtain(role, Source::File(path, flags))
            .map(|obtained| obtained.map(drop))
    }

    /// Accepts a connection and stores it, with no instant between the two: its peer may have
    /// sent and gone. The first error is that of accepting, `WouldBlock` if no connection waits.
    /// Needs a stored set.
    pub(crate) fn accept_and_insert(
        &self,
        role: FdRole,
        listener: BorrowedFd<'_>,
    ) -> io::Result<io::Result<StreamFd>> {
        self.obtain(role, Source::Listener(listener))
    }

    fn obtain(&self, role: FdRole, source: Source<'_>) -> io::Result<io::Result<StreamFd>> {
        let mut state = self.state();
        let left_to = state.left_to;
        let Some(queue) = state.queue.clone() else {
            return Err(io::Error::other("nothing is stored yet"));
        };
        let obtained = match queue.obtain_and_send(&state.set, role, left_to, source) {
            Ok(obtained) => obtained,
            Err(error) => return Ok(Err(error)),
        };
        obtained.sent?;
        queue.outdate();
        queue.drop_outdated();
        let descriptor = StreamFd::new(obtained.descriptor);
        state.set.push((role, descriptor.clone()));
        Ok(Ok(descriptor))
    }

    /// Waits until the set outlives this daemon.
    pub(crate) async fn settle(&self) {
        super::settle(self.store.as_ref()).await;
    }

    /// Whether anything is stored.
    pub(crate) fn is_stored(&self) -> bool {
        self.state().queue.is_some()
    }

    /// Adds a descriptor that was opened this moment while no set was stored, and whose other end
    /// has noticed it: a daemon that dies before this returns loses it, so no failpoint is there.
    pub(crate) fn insert_at_once(&self, role: FdRole, descriptor: OwnedFd) -> io::Result<()> {
        self.add([(role, StreamFd::new(descriptor))], false)
    }

    fn add(
        &self,
        descriptors: impl IntoIterator<Item = (FdRole, StreamFd)>,
        has_failpoint: bool,
    ) -> io::Result<()> {
        self.change_at(has_failpoint, |set| {
            for (role, descriptor) in descriptors {
                set.retain(|(known, _)| *known != role);
                set.push((role, descriptor));
            }
        })
    }

    /// Removes and closes what has these roles, but for what is still in use by this process.
    pub(crate) fn remove(&self, roles: &[FdRole]) {
        self.exchange(None, roles);
    }

    /// Removes and closes what has these roles, and adds a descriptor in the same step.
    pub(crate) fn exchange(&self, added: Option<(FdRole, StreamFd)>, removed: &[FdRole]) {
        let exchanged = self.change(|set| {
            set.retain(|(role, _)| !removed.contains(role));
            set.extend(added);
        });
        if let Err(error) = exchanged {
            warn!(name = %self.name(), roles = ?removed, %error, "cannot remove descriptors from the store");
        }
    }

    /// The process will not come to be; the request that wanted it finds the set when it comes
    /// again.
    pub(crate) fn leave_to(&self, request: Option<Request>) {
        self.state().left_to = request;
        if let Err(error) = self.change(|_| {}) {
            warn!(name = %self.name(), %error, "cannot mark a set of descriptors as its request's");
        }
    }

    /// Which request the set was left to.
    pub(crate) fn left_to(&self) -> Option<Request> {
        self.state().left_to
    }

    /// Removes and closes everything.
    ///
    /// The client's ends go first: closing a pipe whose lock a container holds waits, and its
    /// client is not to wait with us for the end.
    pub(crate) fn remove_all(&self) {
        let roles = self.state().set.clone().into_iter().map(|(role, _)| role);
        let of_client: Vec<FdRole> = roles.filter(|role| role.is_of_client()).collect();
        if !of_client.is_empty() {
            self.exchange(None, &of_client);
        }
        if let Err(error) = self.change(Vec::clear) {
            warn!(name = %self.name(), %error, "cannot remove descriptors from the store");
        }
    }

    /// Takes over what has these roles in another set, which is empty afterwards. There is no
    /// instant in which neither has them.
    pub(crate) fn adopt(&self, other: &Self, roles: &[FdRole]) -> io::Result<()> {
        let set = other.state().set.clone();
        // Until the process's record is there, this alone says whose they are.
        let left_to = other.left_to();
        self.state().left_to = left_to;
        self.insert(set.into_iter().filter(|(role, _)| roles.contains(role)))?;
        other.remove_all();
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Set)) -> io::Result<()> {
        self.change_at(true, change)
    }

    fn change_at(&self, has_failpoint: bool, change: impl FnOnce(&mut Set)) -> io::Result<()> {
        let mut state = self.state();
        let mut next = state.set.clone();
        change(&mut next);
        if next.is_empty() && state.set.is_empty() && state.queue.is_none() {
            return Ok(());
        }
        if self.store.is_durable() {
            if has_failpoint {
                failpoint::step("before a set of descriptors is replaced");
            }
            let left_to = state.left_to;
            self.publish(&mut state.queue, &next, left_to)?;
        }
        state.set = next;
        Ok(())
    }

    fn publish(
        &self,
        queue: &mut Option<Arc<Queue>>,
        next: &Set,
        left_to: Option<Request>,
    ) -> io::Result<()> {
        let name = self.name();
        if next.is_empty() {
            if let Some(queue) = queue.take() {
                let removed = self.store.remove(&name);
                off_the_reactor(Emptied(queue));
                removed?;
            }
            return Ok(());
        }
        if let Some(queue) = queue {
            queue.send(next, left_to)?;
            failpoint::step("between two sets of descriptors");
            queue.outdate();
            off_the_reactor(Outdated(Arc::clone(queue)));
            return Ok(());
        }
        let new = Queue::new()?;
        new.send(next, left_to)?;
        self.store
            .add(&name, &[new.receiver.as_fd(), new.sender.as_fd()])?;
        *queue = Some(Arc::new(new));
        Ok(())
    }

    fn name(&self) -> FdName {
        FdName::Process(self.number)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read};
    use std::os::fd::BorrowedFd;

    use super::*;

    /// Holds duplicates, as the keeper does.
    #[derive(Debug, Default)]
    struct Shelf(Mutex<Vec<(FdName, OwnedFd)>>);

    impl FdStore for Shelf {
        fn add(&self, name: &FdName, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
            for fd in fds {
                self.0
                    .lock()
                    .unwrap()
                    .push((*name, fd.try_clone_to_owned()?));
            }
            Ok(())
        }

        fn remove(&self, name: &FdName) -> io::Result<()> {
            self.0.lock().unwrap().retain(|(other, _)| other != name);
            Ok(())
        }
    }

    impl Shelf {
        fn given_back(&self) -> InheritedFds {
            let mut inherited = InheritedFds::default();
            for (name, fd) in self.0.lock().unwrap().iter() {
                inherited.insert(*name, fd.try_clone().unwrap());
            }
            inherited
        }
    }

    fn pipe() -> (PipeReader, StreamFd) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, StreamFd::new(writer))
    }

    fn is_at_end(reader: &mut PipeReader) -> bool {
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&*reader, flags).unwrap();
        reader.read(&mut [0]).is_ok_and(|count| count == 0)
    }

    /// Waits for the end: a child that another test starts has copies of all until it executes its
    /// program.
    fn ends(reader: &mut PipeReader) -> bool {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !is_at_end(reader) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        is_at_end(reader)
    }

    fn successor(shelf: &Arc<Shelf>) -> ProcessFds {
        let next = ProcessFds::new(shelf.clone(), 7);
        next.inherit(&mut shelf.given_back());
        next
    }

    #[test]
    fn a_set_outlives_its_daemon_and_what_is_forgotten_is_closed_at_once() {
        let shelf = Arc::new(Shelf::default());
        let fds = ProcessFds::new(shelf.clone(), 7);
        let ((mut out, out_end), (mut err, err_end)) = (pipe(), pipe());
        fds.insert([
            (FdRole::StdoutClient, out_end),
            (FdRole::StderrClient, err_end),
        ])
        .unwrap();
        drop(fds);
        let next = successor(&shelf);
        assert!(!is_at_end(&mut out) && !is_at_end(&mut err));
        // Nothing is asked of the store for this.
        next.remove(&[FdRole::StdoutClient]);
        assert!(ends(&mut out) && !is_at_end(&mut err));
        drop(next);
        let last = successor(&shelf);
        assert!(last.get(FdRole::StdoutClient).is_none());
        assert!(last.get(FdRole::StderrClient).is_some());
        last.remove_all();
        assert!(ends(&mut err) && shelf.0.lock().unwrap().is_empty());
    }

    #[test]
    fn of_two_sets_the_newer_counts() {
        let shelf = Arc::new(Shelf::default());
        let fds = ProcessFds::new(shelf.clone(), 7);
        let ((mut old, old_end), (mut new, new_end)) = (pipe(), pipe());
        fds.insert([(FdRole::StdinHeld, old_end)]).unwrap();
        // As a daemon leaves it that is killed between the two steps of a change.
        let state = fds.state();
        let next = vec![(FdRole::StdinHeld, new_end)];
        state.queue.as_ref().unwrap().send(&next, None).unwrap();
        drop(state);
        drop((next, fds));
        let next = successor(&shelf);
        assert!(ends(&mut old) && !is_at_end(&mut new));
        next.remove_all();
        assert!(ends(&mut new));
    }

    #[test]
    fn what_is_opened_is_in_the_set_and_what_cannot_be_changes_nothing() {
        let shelf = Arc::new(Shelf::default());
        let fds = ProcessFds::new(shelf.clone(), 7);
        let (mut reader, writer) = pipe();
        fds.insert([(FdRole::StdoutPipe, writer)]).unwrap();
        let open = |path| fds.open_and_insert(FdRole::StdoutClient, path, libc::O_WRONLY);
        let missing = open(c"/nonexistent/fifo").unwrap().unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
        assert!(successor(&shelf).get(FdRole::StdoutClient).is_none());
        open(c"/dev/null").unwrap().unwrap();
        assert!(fds.get(FdRole::StdoutClient).is_some());
        let next = successor(&shelf);
        assert!(next.get(FdRole::StdoutClient).is_some());
        assert!(next.get(FdRole::StdoutPipe).is_some() && !is_at_end(&mut reader));
    }

    #[test]
    fn a_set_knows_the_request_that_it_is_left_to() {
        let shelf = Arc::new(Shelf::default());
        let fds = ProcessFds::new(shelf.clone(), 7);
        let (_reader, writer) = pipe();
        fds.insert([(FdRole::StdoutClient, writer)]).unwrap();
        assert_eq!(successor(&shelf).left_to(), None);
        fds.leave_to(Some((u64::MAX, u32::MAX)));
        let next = successor(&shelf);
        assert_eq!(next.left_to(), Some((u64::MAX, u32::MAX)));
        assert!(next.get(FdRole::StdoutClient).is_some());
    }

    #[test]
    fn an_adopted_end_is_in_one_of_both_sets_at_any_time() {
        let shelf = Arc::new(Shelf::default());
        let fds = ProcessFds::new(shelf.clone(), 7);
        let ((mut client, client_end), (mut other, other_end)) = (pipe(), pipe());
        fds.insert([
            (FdRole::StdoutClient, client_end),
            (FdRole::StdoutPipe, other_end),
        ])
        .unwrap();
        let successor = ProcessFds::new(shelf.clone(), 8);
        successor.adopt(&fds, &[FdRole::StdoutClient]).unwrap();
        assert!(fds.is_empty() && ends(&mut other) && !is_at_end(&mut client));
        successor.remove_all();
        assert!(ends(&mut client));
    }

    #[test]
    fn what_is_no_set_is_refused_and_forgotten() {
        let shelf = Arc::new(Shelf::default());
        let (_reader, writer) = pipe();
        let name = FdName::Process(7);
        shelf.add(&name, &[writer.as_fd()]).unwrap();
        assert!(successor(&shelf).is_empty() && shelf.0.lock().unwrap().is_empty());
        let queue = Queue::new().unwrap();
        rustix::net::send(&queue.sender, b"2abc", rustix::net::SendFlags::empty()).unwrap();
        shelf
            .add(&name, &[queue.sender.as_fd(), queue.receiver.as_fd()])
            .unwrap();
        assert!(successor(&shelf).is_empty() && shelf.0.lock().unwrap().is_empty());
    }
}
