//! The ends of a process's streams: those it gets, and those we keep while it lives.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::plan::{Output, Plan, keep_reader, keep_writer};
use crate::descriptor::{Deposit, Role};

/// The streams for the process. Whoever starts it lets go of them right after: a writer of ours would hide EOF.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    /// Its input.
    pub(crate) stdin: OwnedFd,
    /// Its output.
    pub(crate) stdout: OwnedFd,
    /// Its error output.
    pub(crate) stderr: OwnedFd,
}

/// Our ends: a writer to its input until that is closed, and readers of its outputs that never read. All are deposited: a moment without
/// the writer would be an end of the input, and what nobody holds at the process's end is lost unread.
#[derive(Debug)]
pub(crate) struct HeldStdio {
    stdin: Mutex<Input>,
    deposit: Deposit,
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "held for what holding them does")
    )]
    readers: Vec<OwnedFd>,
}

/// What keeps a process's input open while its client is away.
#[derive(Debug)]
pub(super) enum Input {
    /// Nothing does, or ever will again.
    Closed,
    /// Nothing does yet: the process does not read before it is started. The reader tells who has come and gone.
    Undecided { reader: OwnedFd, path: PathBuf },
    /// A writer of ours does.
    Held { writer: OwnedFd },
}

impl HeldStdio {
    pub(super) fn new(stdin: Input, readers: Vec<(Role, OwnedFd)>, deposit: Deposit) -> Self {
        match &stdin {
            Input::Closed => {}
            Input::Undecided { reader, .. } => deposit.keep(Role::StdinReader, reader),
            Input::Held { writer } => deposit.keep(Role::Stdin, writer),
        }
        for (role, reader) in &readers {
            deposit.keep(*role, reader);
        }
        Self::with(stdin, readers, deposit)
    }

    fn with(stdin: Input, readers: Vec<(Role, OwnedFd)>, deposit: Deposit) -> Self {
        Self {
            stdin: Mutex::new(stdin),
            deposit,
            readers: readers.into_iter().map(|(_, reader)| reader).collect(),
        }
    }

    /// Takes the ends up again after a restart: those that were deposited, or else what can be opened again. Blocks on the file system.
    pub(crate) fn reopen(plan: &Plan, kept: Vec<(Role, OwnedFd)>, deposit: Deposit) -> Self {
        if kept.is_empty() {
            return Self::open_again(plan, deposit);
        }
        let (mut writer, mut reader, mut outputs) = (None, None, Vec::new());
        for (role, end) in kept {
            match role {
                Role::Stdin => writer = Some(end),
                Role::StdinReader => reader = Some(end),
                _ => outputs.push((role, end)),
            }
        }
        let stdin = match (writer, reader, &plan.stdin) {
            (Some(writer), ..) => Input::Held { writer },
            (None, Some(reader), Some(path)) => Input::Undecided {
                reader,
                path: path.clone(),
            },
            _ => Input::Closed,
        };
        Self::with(stdin, outputs, deposit)
    }

    fn open_again(plan: &Plan, deposit: Deposit) -> Self {
        let stdin = plan
            .stdin
            .as_deref()
            .and_then(|path| keep_writer(path).ok())
            .map_or(Input::Closed, |writer| Input::Held { writer });
        let reader = |role, stream, output: &Output| match output {
            Output::Path(path) => Some((role, keep_reader(stream, path).ok()?)),
            _ => None,
        };
        let readers = [
            reader(Role::Stdout, "stdout", &plan.stdout),
            reader(Role::Stderr, "stderr", &plan.stderr),
        ];
        Self::new(stdin, readers.into_iter().flatten().collect(), deposit)
    }

    /// Whether the client has come, written and gone already, right before the process may read: then its input ends with what is in it.
    ///
    /// `ctr run` sends `CloseIO` at the end of its own input, but not if that comes before `NewTask` has returned, as with
    /// `echo hi | ctr run ... cat`; a writer of ours would then keep the container waiting for ever.
    pub(crate) fn client_has_gone(&self) -> bool {
        matches!(&*self.stdin(), Input::Undecided { reader, .. } if has_hung_up(reader))
    }

    /// Has the input outlive its client from now on; returns false if it cannot. Asks for no client: the writer of a daemon that died
    /// right after opening it looks like one that has gone.
    pub(crate) fn hold_stdin(&self) -> bool {
        let mut stdin = self.stdin();
        if let Input::Undecided { path, .. } = &*stdin {
            let writer = keep_writer(path).ok();
            if let Some(writer) = &writer {
                self.deposit.keep(Role::Stdin, writer);
            }
            self.deposit.forget(Role::StdinReader);
            *stdin = writer.map_or(Input::Closed, |writer| Input::Held { writer });
        }
        matches!(*stdin, Input::Held { .. })
    }

    /// Gives up our writer to the input. Idempotent.
    pub(crate) fn close_stdin(&self) {
        *self.stdin() = Input::Closed;
        self.deposit.forget(Role::Stdin);
        self.deposit.forget(Role::StdinReader);
    }

    fn stdin(&self) -> MutexGuard<'_, Input> {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the fifo had a writer since this reader was opened, and has none now (`pipe_poll` in the kernel).
fn has_hung_up(reader: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    polled.is_ok()
        && fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use nix::sys::stat::Mode;

    use super::*;
    use crate::descriptor::Unkept;
    use crate::stdio::{StdioError, StdioPaths};

    fn deposit() -> Deposit {
        Deposit::new(Arc::new(Unkept), 1)
    }

    struct Fifos {
        dir: tempfile::TempDir,
        plan: Plan,
    }

    fn fifos() -> Fifos {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
            path.display().to_string()
        };
        let paths = StdioPaths {
            stdin: make("in"),
            stdout: make("out"),
            stderr: make("err"),
            terminal: false,
        };
        let plan = Plan::parse(&paths).unwrap();
        Fifos { dir, plan }
    }

    fn reader(path: &Path) -> File {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .unwrap()
    }

    fn write(path: &Path, text: &[u8]) {
        OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .write_all(text)
            .unwrap();
    }

    #[test]
    fn opening_waits_for_nobody_and_eof_needs_only_the_process_to_let_go() {
        let fifos = fifos();
        let (child, held) = fifos.plan.open(None, None, deposit()).unwrap();
        File::from(child.stdout).write_all(b"hello").unwrap();
        // The client comes late; the keeper has kept the output, and is no writer that would hide EOF.
        let mut client = reader(&fifos.dir.path().join("out"));
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(held);
    }

    #[test]
    fn a_reader_that_goes_away_costs_neither_epipe_nor_output() {
        let fifos = fifos();
        let (child, _held) = fifos.plan.open(None, None, deposit()).unwrap();
        let mut stdout = File::from(child.stdout);
        drop(reader(&fifos.dir.path().join("out")));
        stdout.write_all(b"while away").unwrap();
        let mut text = [0; 10];
        reader(&fifos.dir.path().join("out"))
            .read_exact(&mut text)
            .unwrap();
        assert_eq!(&text, b"while away");
    }

    #[test]
    fn input_ends_with_close_io_and_not_with_a_client() {
        let fifos = fifos();
        let (child, held) = fifos.plan.open(None, None, deposit()).unwrap();
        let mut stdin = File::from(child.stdin);
        let path = fifos.dir.path().join("in");
        assert!(!held.client_has_gone());
        assert!(held.hold_stdin());
        write(&path, b"one");
        let mut text = [0; 3];
        stdin.read_exact(&mut text).unwrap();
        // No client, but our writer: a read would block, so ask without blocking by another reader.
        assert_eq!(
            reader(&path).read(&mut text).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        held.close_stdin();
        held.close_stdin();
        assert_eq!(stdin.read(&mut text).unwrap(), 0);
    }

    #[test]
    fn input_ends_for_a_client_that_was_gone_before_the_start() {
        let fifos = fifos();
        let (child, held) = fifos.plan.open(None, None, deposit()).unwrap();
        write(&fifos.dir.path().join("in"), b"hi");
        assert!(held.client_has_gone());
        held.close_stdin();
        let mut text = String::new();
        File::from(child.stdin).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi");
    }

    #[test]
    fn a_restarted_daemon_takes_the_ends_up_again() {
        let fifos = fifos();
        let (child, held) = fifos.plan.open(None, None, deposit()).unwrap();
        drop(held);
        let again = HeldStdio::reopen(&fifos.plan, Vec::new(), deposit());
        assert!(matches!(*again.stdin(), Input::Held { .. }));
        assert_eq!(again.readers.len(), 2);
        drop(child);
        fs::remove_file(fifos.dir.path().join("out")).unwrap();
        assert_eq!(
            HeldStdio::reopen(&fifos.plan, Vec::new(), deposit())
                .readers
                .len(),
            1
        );
    }

    #[test]
    fn a_log_file_is_made_with_its_directories_and_shared() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a/b/log");
        let paths = StdioPaths {
            stdout: format!("file://{}", log.display()),
            ..StdioPaths::default()
        };
        let (child, _held) = Plan::parse(&paths)
            .unwrap()
            .open(None, None, deposit())
            .unwrap();
        File::from(child.stdout).write_all(b"out ").unwrap();
        File::from(child.stderr).write_all(b"err").unwrap();
        assert_eq!(fs::read_to_string(log).unwrap(), "out err");
    }

    #[test]
    fn what_is_not_there_or_not_a_stream_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = |stdout: PathBuf| {
            let paths = StdioPaths {
                stdout: stdout.display().to_string(),
                ..StdioPaths::default()
            };
            Plan::parse(&paths)
                .unwrap()
                .open(None, None, deposit())
                .unwrap_err()
        };
        let missing = open(dir.path().join("missing"));
        assert!(
            matches!(
                missing,
                StdioError::Open {
                    stream: "stdout",
                    ..
                }
            ),
            "{missing}"
        );
        let directory = open(dir.path().to_owned());
        assert!(
            directory.to_string().contains("is a directory"),
            "{directory}"
        );
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(
            open(dir.path().join("link"))
                .to_string()
                .contains("symbolic link")
        );
    }
}
