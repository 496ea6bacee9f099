//! Obtaining a descriptor, by opening a file or accepting a connection, and sending it on, both in
//! a process of its own: a SIGKILL for this process does not come between the two. Never decides
//! what is sent, nor where to.

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SigSet, SigmaskHow};

use crate::sys::wait_unseen;

/// The stack of the process, in units of 16 bytes, to which a stack has to be aligned.
const STACK: usize = 4096;

/// Where the descriptor comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// open(2) with these flags, which contain `O_CLOEXEC`.
    File(&'a CStr, c_int),
    /// accept4(2) of this listener, which is non-blocking. The connection is non-blocking too.
    Listener(BorrowedFd<'a>),
}

/// A descriptor that is this process's now.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// The descriptor.
    pub(crate) descriptor: OwnedFd,
    /// Whether it was sent.
    pub(crate) sent: io::Result<()>,
}

/// What the two processes share: memory and descriptors are the same in both.
struct Task<'a> {
    source: Source<'a>,
    socket: RawFd,
    message: libc::msghdr,
    /// Where the number of the descriptor belongs in the message; it may be unaligned.
    place: *mut RawFd,
    /// What was obtained, or -1.
    descriptor: AtomicI32,
    /// The error of the last step; 0 after the last.
    errno: AtomicI32,
}

/// Obtains a descriptor and sends it with this text, after `others`, in one message. The error is
/// that of obtaining it, or of starting the process. Does not wait for room in the socket.
///
/// The process shares memory and descriptors with this one, so it costs no copy of either, and goes
/// on if this one is killed, but for lack of memory: then the kernel kills both. The calling thread
/// waits for its end.
pub(crate) fn obtain_and_send(
    source: Source<'_>,
    socket: BorrowedFd<'_>,
    text: &[u8],
    others: &[RawFd],
) -> io::Result<Obtained> {
    let count = others.len() + 1;
    let length = u32::try_from(count * size_of::<RawFd>()).map_err(io::Error::other)?;
    // SAFETY: plain arithmetic.
    let space = unsafe { libc::CMSG_SPACE(length) } as usize;
    // Of words, so that the header in it is aligned.
    let mut control = vec![0_u64; space.div_ceil(size_of::<u64>())];
    let mut part = libc::iovec {
        iov_base: text.as_ptr().cast_mut().cast(),
        iov_len: text.len(),
    };
    // SAFETY: msghdr is plain data for which all zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space;
    // SAFETY: the buffer has room for one header with `count` descriptors.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: the header is in the buffer and aligned.
    let fields = unsafe { &mut *header };
    fields.cmsg_level = libc::SOL_SOCKET;
    fields.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: plain arithmetic.
    fields.cmsg_len = unsafe { libc::CMSG_LEN(length) } as usize;
    // SAFETY: the data follows the header in the buffer.
    let data: *mut RawFd = unsafe { libc::CMSG_DATA(header) }.cast();
    for (index, fd) in others.iter().enumerate() {
        // SAFETY: `index` is below `count`, for which there is room.
        let place = unsafe { data.add(index) };
        // SAFETY: the place is in the buffer; it may be unaligned.
        unsafe { place.write_unaligned(*fd) };
    }
    let task = Task {
        source,
        socket: socket.as_raw_fd(),
        message,
        // SAFETY: as above, the last of `count`.
        place: unsafe { data.add(count - 1) },
        descriptor: AtomicI32::new(-1),
        errno: AtomicI32::new(libc::EINTR),
    };
    run(&task)?;
    let result = match task.errno.load(Ordering::Acquire) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    };
    match task.descriptor.load(Ordering::Acquire) {
        number if number >= 0 => Ok(Obtained {
            // SAFETY: the process has obtained it in our table this moment, and has ended.
            descriptor: unsafe { OwnedFd::from_raw_fd(number) },
            sent: result,
        }),
        _ => Err(result.err().unwrap_or_else(|| io::ErrorKind::Other.into())),
    }
}

/// Starts the process and waits for its end.
fn run(task: &Task<'_>) -> io::Result<()> {
    let mut stack: Vec<u128> = Vec::with_capacity(STACK);
    // SAFETY: one past the end of the allocation; a stack grows down.
    let top = unsafe { stack.as_mut_ptr().add(STACK) };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    let argument = std::ptr::from_ref(task).cast_mut().cast();
    // No handler of this process may run in the other one.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // Without an exit signal no reaper of other children sees it.
    // SAFETY: CLONE_VFORK: this thread waits for its end, so task and stack outlive it.
    let child = unsafe { libc::clone(obtain, top.cast(), flags, argument) };
    let error = io::Error::last_os_error();
    before.thread_set_mask()?;
    if child < 0 {
        return Err(error);
    }
    wait_unseen(child).map(drop)
}

/// In the process: system calls only. What they return is left in the task.
extern "C" fn obtain(task: *mut c_void) -> c_int {
    let task = task.cast_const().cast::<Task<'_>>();
    // SAFETY: the caller of `clone` gave a task that lives until this process has ended.
    let task = unsafe { &*task };
    let descriptor = match task.source {
        // SAFETY: a C string that lives as long as the task.
        Source::File(path, flags) => unsafe { libc::open(path.as_ptr(), flags) },
        Source::Listener(listener) => {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            // SAFETY: the listener is borrowed and so open; the peer's address is not asked for.
            unsafe { libc::accept4(listener.as_raw_fd(), null_mut(), null_mut(), flags) }
        }
    };
    let mut is_done = descriptor >= 0;
    if is_done {
        task.descriptor.store(descriptor, Ordering::Release);
        // SAFETY: a place in the control buffer, which nothing else uses meanwhile.
        unsafe { task.place.write_unaligned(descriptor) };
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message and all that it points to live as long as the task.
        is_done = unsafe { libc::sendmsg(task.socket, &raw const task.message, flags) } >= 0;
    }
    let errno = if is_done {
        0
    } else {
        nix::errno::Errno::last_raw()
    };
    task.errno.store(errno, Ordering::Release);
    0
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn received(socket: &UnixDatagram) -> (Vec<u8>, usize) {
        let mut text = [0; 64];
        let mut parts = [io::IoSliceMut::new(&mut text)];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let message = nix::sys::socket::recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            flags,
        )
        .unwrap();
        let length = message.bytes;
        let mut count = 0;
        for control in message.cmsgs().unwrap() {
            if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = control {
                count += fds.len();
                fds.into_iter().map(crate::sys::own_received).for_each(drop);
            }
        }
        (text[..length].to_vec(), count)
    }

    #[test]
    fn an_accepted_connection_is_sent_and_owned() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let accept = || {
            let other = [dir_fd()];
            let fds = [other[0].as_raw_fd()];
            obtain_and_send(
                Source::Listener(listener.as_fd()),
                ours.as_fd(),
                b"name",
                &fds,
            )
        };
        assert_eq!(accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut client = UnixStream::connect(dir.path().join("s")).unwrap();
        let obtained = accept().unwrap();
        obtained.sent.unwrap();
        assert_eq!(received(&theirs), (b"name".to_vec(), 2));
        // The only one left: its end is the connection's.
        drop(obtained.descriptor);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn what_cannot_be_sent_is_owned_nevertheless() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        drop(theirs);
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        let source = Source::File(c"/dev/null", flags);
        let obtained = obtain_and_send(source, ours.as_fd(), b"x", &[]).unwrap();
        let error = obtained.sent.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        nix::sys::stat::fstat(&obtained.descriptor).unwrap();
        let missing = Source::File(c"/no/such", flags);
        let error = obtain_and_send(missing, ours.as_fd(), b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    fn dir_fd() -> OwnedFd {
        std::fs::File::open("/").unwrap().into()
    }
}
