//! The process that lets an init go on which waits at its fifo. Owns that it is a process: an init
//! whose reader ends between the opening and its write would end as well, so a SIGKILL for the
//! daemon must not come between the two.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use crate::sys::{fork_unseen, wait_unseen};

/// What has become of it, as the status with which the process exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    /// The init has written, and so goes on. The fifo is gone.
    Started = 0,
    /// The fifo cannot be opened: nothing was done.
    NotOpened = 10,
    /// The init has not written: another reader has let it go on, or it has ended.
    Silent = 11,
    /// The fifo was open until the limit.
    Late = 12,
    /// The init goes on, and the fifo is there still.
    NotRemoved = 13,
}

/// How often the process looks whether it is alone.
const LOOK: libc::c_int = 100;

/// Opens the fifo, reads from it until its writer has closed it, and removes it. Blocks for at most
/// `limit`. An error is that of starting the process, `None` that it was killed.
pub(super) fn open_read_and_remove(
    directory: BorrowedFd<'_>,
    fifo: &CStr,
    init: BorrowedFd<'_>,
    limit: Duration,
) -> io::Result<Option<Outcome>> {
    let work = Work {
        directory: directory.as_raw_fd(),
        fifo,
        init: init.as_raw_fd(),
        end: now().saturating_add(limit),
        parent: std::process::id(),
    };
    // With our table of descriptors, not a copy: of a thousand streams none is to be kept open, nor
    // to be closed again. What of it lasts, as the daemon's lock, it keeps if we are killed.
    // SAFETY: the child makes system calls only, and ends without a destructor or handler.
    let child = unsafe { fork_unseen(libc::CLONE_FILES) }?;
    if child == 0 {
        let outcome = work.carry_out();
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(outcome as libc::c_int) };
    }
    let status = wait_unseen(child)?;
    let all = [
        Outcome::Started,
        Outcome::NotOpened,
        Outcome::Silent,
        Outcome::Late,
        Outcome::NotRemoved,
    ];
    let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    let mut outcomes = all.into_iter();
    Ok(outcomes.find(|outcome| code == Some(*outcome as libc::c_int)))
}

/// What the process needs, all of it made before it begins.
struct Work<'a> {
    directory: RawFd,
    fifo: &'a CStr,
    init: RawFd,
    /// By the monotonic clock.
    end: Duration,
    parent: u32,
}

/// In the process: only calls that are safe after the fork of a process with threads.
impl Work<'_> {
    fn carry_out(&self) -> Outcome {
        block_signals();
        let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: a C string that lives through the call, and a descriptor of our table.
        let fd = unsafe { libc::openat(self.directory, self.fifo.as_ptr(), flags) };
        if fd < 0 {
            return Outcome::NotOpened;
        }
        let outcome = self.read(fd);
        // The table may be the daemon's.
        // SAFETY: opened above, and nothing else has the number.
        unsafe { libc::close(fd) };
        outcome
    }

    /// Reads to the end, as runc does: then the init has closed the fifo, or is the program. The
    /// fifo is removed as soon as the init has written, not at the end: a runc that opened it in
    /// between would wait for another writer for as long as the container lives.
    fn read(&self, fifo: RawFd) -> Outcome {
        let mut outcome = Outcome::Silent;
        let mut is_alone = false;
        loop {
            let left = self.end.saturating_sub(now()).as_millis();
            if left == 0 {
                return match outcome {
                    Outcome::Silent => Outcome::Late,
                    // What it does now takes its time, but it was started.
                    started => started,
                };
            }
            let pause = libc::c_int::try_from(left).map_or(LOOK, |left| left.min(LOOK));
            let [has_something, has_ended] = poll([fifo, self.init], pause);
            // Also if nothing is announced, as it is not of a writer that had closed the fifo
            // before it was opened here: what it has written for another reader may be there.
            let is_closed = loop {
                match read(fifo) {
                    Read::Something if outcome == Outcome::Silent => outcome = self.remove(),
                    Read::Something => {}
                    Read::Nothing => break false,
                    Read::End => break true,
                }
            };
            let is_started = outcome != Outcome::Silent;
            // Without a writer that has come and gone, it has not come yet.
            if has_ended || is_closed && (is_started || has_something) {
                return outcome;
            }
            if !has_something {
                // Another reader has let the init go on, and has noted it.
                if !is_started && self.is_fifo_gone() {
                    return outcome;
                }
                if !is_alone && self.is_orphan() {
                    is_alone = self.let_go_of_all_but(fifo);
                }
            }
        }
    }

    fn remove(&self) -> Outcome {
        // SAFETY: a C string that lives through the call, and a descriptor of our table.
        let removed = unsafe { libc::unlinkat(self.directory, self.fifo.as_ptr(), 0) };
        let is_gone = removed == 0 || errno() == libc::ENOENT;
        if is_gone {
            Outcome::Started
        } else {
            Outcome::NotRemoved
        }
    }

    fn is_fifo_gone(&self) -> bool {
        // SAFETY: a C string that lives through the call, and a descriptor of our table.
        let found = unsafe { libc::faccessat(self.directory, self.fifo.as_ptr(), libc::F_OK, 0) };
        found != 0 && errno() == libc::ENOENT
    }

    fn is_orphan(&self) -> bool {
        // SAFETY: getppid has no arguments and cannot fail.
        unsafe { libc::getppid() }.unsigned_abs() != self.parent
    }

    /// The daemon is gone, and the init takes its time: a successor is not to wait for our copy of
    /// its lock. What it finds is an init that does not wait any more.
    fn let_go_of_all_but(&self, fifo: RawFd) -> bool {
        // Another such process may have the same table.
        // SAFETY: touches no memory.
        if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
            return false;
        }
        let mut kept = [fifo, self.init, self.directory];
        kept.sort_unstable();
        let mut first = 0;
        for number in kept {
            close_range(first, number.saturating_sub(1));
            first = number.saturating_add(1);
        }
        close_range(first, libc::c_int::MAX);
        true
    }
}

enum Read {
    Something,
    Nothing,
    End,
}

fn read(fifo: RawFd) -> Read {
    let mut buffer = [0_u8; 64];
    // SAFETY: the buffer lives through the call and is as long as it says.
    let length = unsafe { libc::read(fifo, buffer.as_mut_ptr().cast(), buffer.len()) };
    match length {
        0 => Read::End,
        1.. => Read::Something,
        _ => Read::Nothing,
    }
}

/// Which of two are ready, within milliseconds.
fn poll(fds: [RawFd; 2], milliseconds: libc::c_int) -> [bool; 2] {
    let mut polled = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: the array of two lives through the call.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), 2, milliseconds) };
    polled.map(|fd| count > 0 && fd.revents != 0)
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // Before Linux 5.9 they stay open.
        // SAFETY: closes descriptors of a table that this process has to itself.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// A handler of the daemon's must not run here.
fn block_signals() {
    // SAFETY: the set is plain data for which all zeros are valid.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set lives through the call.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: the set lives through the call, and no other is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) };
}

fn now() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

fn errno() -> libc::c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;
    use std::process::{Child, Command};
    use std::thread;

    use nix::sys::stat::Mode;

    use super::*;
    use crate::process::Process;

    const LIMIT: Duration = Duration::from_secs(30);

    struct Scene {
        directory: tempfile::TempDir,
        init: Child,
        process: Process,
    }

    impl Scene {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            nix::unistd::mkfifo(&directory.path().join("fifo"), Mode::S_IRWXU).unwrap();
            let init = Command::new("sleep").arg("1000").spawn().unwrap();
            let process = Process::open(i32::try_from(init.id()).unwrap()).unwrap();
            Self {
                directory,
                init,
                process,
            }
        }

        fn fifo(&self) -> std::path::PathBuf {
            self.directory.path().join("fifo")
        }

        fn start(&self, limit: Duration) -> Outcome {
            let directory = File::open(self.directory.path()).unwrap();
            let init = self.process.pidfd().unwrap();
            open_read_and_remove(directory.as_fd(), c"fifo", init, limit)
                .unwrap()
                .expect("the process was killed")
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = self.init.kill();
            let _ = self.init.wait();
        }
    }

    fn write_when_opened(fifo: &Path) -> thread::JoinHandle<()> {
        let fifo = fifo.to_owned();
        thread::spawn(move || {
            let mut writer = OpenOptions::new().write(true).open(fifo).unwrap();
            writer.write_all(b"0").unwrap();
        })
    }

    fn open_descriptors() -> usize {
        fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn a_writer_goes_on_and_the_fifo_is_gone() {
        let scene = Scene::new();
        for _ in 0..20 {
            let writer = write_when_opened(&scene.fifo());
            assert_eq!(scene.start(LIMIT), Outcome::Started);
            writer.join().unwrap();
            assert!(!scene.fifo().exists());
            nix::unistd::mkfifo(&scene.fifo(), Mode::S_IRWXU).unwrap();
        }
    }

    /// Its writer has gone before the fifo was opened here, and nothing tells of that.
    #[test]
    fn what_was_written_for_another_reader_is_read_to_its_end() {
        let scene = Scene::new();
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(libc::O_NONBLOCK);
        let _other = options.open(scene.fifo()).unwrap();
        write_when_opened(&scene.fifo()).join().unwrap();
        let began = now();
        assert_eq!(scene.start(LIMIT), Outcome::Started);
        assert!(
            now() < began + LIMIT / 2,
            "it has waited for an end that was there"
        );
    }

    #[test]
    fn without_a_writer_nothing_is_started() {
        let mut scene = Scene::new();
        let before = open_descriptors();
        assert_eq!(scene.start(Duration::from_millis(300)), Outcome::Late);
        let fifo = scene.fifo();
        let remover = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            fs::remove_file(fifo).unwrap();
        });
        assert!(matches!(
            scene.start(LIMIT),
            Outcome::Silent | Outcome::NotOpened
        ));
        remover.join().unwrap();
        nix::unistd::mkfifo(&scene.fifo(), Mode::S_IRWXU).unwrap();
        scene.init.kill().unwrap();
        assert_eq!(scene.start(LIMIT), Outcome::Silent);
        assert!(scene.fifo().exists());
        fs::remove_file(scene.fifo()).unwrap();
        assert_eq!(scene.start(LIMIT), Outcome::NotOpened);
        // Other tests open and close files meanwhile.
        assert!(open_descriptors() < before + 50);
    }
}
