//! Terminals: how the runtime hands one over, and the copying between it and the client's fifos.
//! Owns the master while the process lives; what is copied and when it ends is in `copy`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::debug;

use super::StdioError;
use super::copy::{Sink, copy_input, copy_output, non_blocking};
use super::plan::{Plan, TerminalInput};
use crate::descriptor::{Deposit, Role};
use crate::sys;

/// Numbers the sockets of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The socket over which an OCI runtime sends the master of a terminal (`--console-socket`).
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    deposit: Deposit,
}

impl ConsoleSocket {
    /// Listens in `directory`, which must be ours alone and have a short path (107 bytes with the name). Needs a
    /// tokio runtime. Deposited, it takes a terminal also while no daemon is there.
    pub(crate) fn bind(directory: &Path, deposit: Deposit) -> Result<Self, StdioError> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("console-{}-{number}", std::process::id()));
        let failed = |source| StdioError::Console {
            doing: "listen for a terminal",
            source,
        };
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        deposit.keep(Role::Console, &listener);
        Ok(Self {
            listener,
            path,
            deposit,
        })
    }

    /// The one that a predecessor has left, if its socket is among what was kept.
    pub(crate) fn resume(listener: OwnedFd, deposit: Deposit) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let path = address.as_pathname().unwrap_or(Path::new("")).to_owned();
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            path,
            deposit,
        })
    }

    /// What to tell the runtime.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the master, and has it kept.
    pub(crate) async fn accept(self, limit: Duration) -> Result<OwnedFd, StdioError> {
        let failed = |source| StdioError::Console {
            doing: "receive a terminal",
            source,
        };
        let received = async {
            let (stream, _) = self.listener.accept().await?;
            receive(&stream).await
        };
        let master = tokio::time::timeout(limit, received)
            .await
            .map_err(|_| StdioError::NoConsole(limit))?;
        let master = master.map_err(failed)?;
        if !nix::unistd::isatty(&master).unwrap_or(false) {
            return Err(failed(io::Error::other(
                "what the OCI runtime sent is not a terminal",
            )));
        }
        self.deposit.keep(Role::Terminal, &master);
        Ok(master)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        self.deposit.forget(Role::Console);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One descriptor in one message, as runc's `SendFd` writes it.
async fn receive(stream: &UnixStream) -> io::Result<OwnedFd> {
    stream
        .async_io(Interest::READABLE, || {
            let mut name = [0; 4096];
            let mut parts = [io::IoSliceMut::new(&mut name)];
            let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
            let received: Vec<OwnedFd> = message
                .cmsgs()?
                .filter_map(|control| match control {
                    ControlMessageOwned::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .map(sys::own_received)
                .collect();
            received
                .into_iter()
                .next()
                .ok_or_else(|| io::Error::other("the message holds no descriptor"))
        })
        .await
}

/// A process's terminal.
#[derive(Debug)]
pub(crate) struct Console {
    master: OwnedFd,
    stdin: Mutex<Option<OwnedFd>>,
    deposit: Deposit,
    ended: watch::Sender<bool>,
    drained: watch::Receiver<bool>,
    copiers: [AbortHandle; 2],
}

impl Console {
    /// Begins to copy between the terminal and the plan's stdin and stdout. Needs a tokio runtime.
    /// `pipe` is the logger's, if there is one.
    pub(crate) fn start(
        master: OwnedFd,
        plan: &Plan,
        pipe: Option<OwnedFd>,
        deposit: Deposit,
    ) -> Result<Self, StdioError> {
        let input = plan.open_input()?;
        if let Some(input) = &input {
            deposit.keep(Role::Stdin, &input.writer);
            deposit.keep(Role::StdinReader, &input.reader);
        }
        Self::with(master, plan, pipe, input, deposit)
    }

    /// Goes on with the terminal that a predecessor has left among `kept`; `None` if it is not there.
    pub(crate) fn resume(
        plan: &Plan,
        kept: Vec<(Role, OwnedFd)>,
        deposit: Deposit,
    ) -> Option<Result<Self, StdioError>> {
        let (mut master, mut pipe, mut writer, mut reader) = (None, None, None, None);
        for (role, end) in kept {
            match role {
                Role::Terminal => master = Some(end),
                Role::Stdout => pipe = Some(end),
                Role::Stdin => writer = Some(end),
                Role::StdinReader => reader = Some(File::from(end)),
                _ => {}
            }
        }
        let input = writer
            .zip(reader)
            .map(|(writer, reader)| TerminalInput { reader, writer });
        master.map(|master| Self::with(master, plan, pipe, input, deposit))
    }

    fn with(
        master: OwnedFd,
        plan: &Plan,
        pipe: Option<OwnedFd>,
        input: Option<TerminalInput>,
        deposit: Deposit,
    ) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Console {
            doing: "set up a terminal",
            source,
        };
        let output_end = non_blocking(master.try_clone().map_err(failed)?).map_err(failed)?;
        let input_end = non_blocking(master.try_clone().map_err(failed)?).map_err(failed)?;
        let sink = Sink::open(&plan.stdout, pipe)?;
        let (ended, process_ended) = watch::channel(false);
        let (told, drained) = watch::channel(false);
        let output = tokio::spawn(async move {
            if let Err(error) = copy_output(output_end, sink, process_ended).await {
                debug!(%error, "a terminal's output cannot be copied any more");
            }
            // The sink is closed by now: the client sees EOF.
            told.send_replace(true);
        });
        let (reader, stdin) = input.map(|input| (input.reader, input.writer)).unzip();
        let reader = reader.map(sys::register).transpose().map_err(failed)?;
        let input = tokio::spawn(async move {
            if let Some(reader) = reader
                && let Err(error) = copy_input(reader, input_end).await
            {
                debug!(%error, "a terminal's input cannot be copied any more");
            }
        });
        Ok(Self {
            master,
            stdin: Mutex::new(stdin),
            deposit,
            ended,
            drained,
            copiers: [output.abort_handle(), input.abort_handle()],
        })
    }

    /// Gives up our writer to the input. Idempotent.
    pub(crate) fn close_stdin(&self) {
        self.stdin
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.deposit.forget(Role::Stdin);
    }

    /// The process has ended: what is in the terminal is still copied, then the output is closed.
    pub(crate) fn end_of_process(&self) {
        self.close_stdin();
        self.ended.send_replace(true);
    }

    /// Waits until the output is closed, for at most `limit`.
    pub(crate) async fn drained(&self, limit: Duration) {
        let mut drained = self.drained.clone();
        let _ = tokio::time::timeout(limit, drained.wait_for(|done| *done)).await;
    }

    /// Sets the size in characters.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), StdioError> {
        sys::set_window_size(self.master.as_fd(), width, height).map_err(|source| {
            StdioError::Console {
                doing: "resize a terminal",
                source,
            }
        })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.copiers.iter().for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::Arc;

    use nix::pty::openpty;
    use nix::sys::stat::Mode;

    use super::*;
    use crate::descriptor::Unkept;
    use crate::stdio::StdioPaths;

    fn deposit() -> Deposit {
        Deposit::new(Arc::new(Unkept), 1)
    }

    const LIMIT: Duration = Duration::from_secs(10);

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    fn plan(dir: &Path) -> Plan {
        let paths = StdioPaths {
            stdin: fifo(dir, "in"),
            stdout: fifo(dir, "out"),
            stderr: String::new(),
            terminal: true,
        };
        Plan::parse(&paths).unwrap()
    }

    #[tokio::test]
    async fn large_output_is_complete_when_its_process_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        let mut client = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(dir.path().join("out"))
            .unwrap();
        let pty = openpty(None, None).unwrap();
        let console = Console::start(pty.master, &plan, None, deposit()).unwrap();
        let writer = std::thread::spawn(move || {
            let mut slave = File::from(pty.slave);
            for line in 0..20_000 {
                writeln!(slave, "{line:08}").unwrap();
            }
        });
        // A client that reads only at the end of everything would block the process: it reads as it comes.
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
        let reader = tokio::task::spawn_blocking(move || {
            nix::fcntl::fcntl(&client, flags).unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            text
        });
        tokio::task::spawn_blocking(|| writer.join().unwrap())
            .await
            .unwrap();
        console.end_of_process();
        let text = tokio::time::timeout(LIMIT, reader)
            .await
            .expect("no EOF")
            .unwrap();
        assert_eq!(text.lines().count(), 20_000);
        assert!(text.ends_with("00019999\r\n"));
        console.drained(LIMIT).await;
    }

    #[tokio::test]
    async fn input_reaches_the_process_and_a_background_holder_does_not_delay_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        let mut client = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(dir.path().join("out"))
            .unwrap();
        let pty = openpty(None, None).unwrap();
        let console = Console::start(pty.master, &plan, None, deposit()).unwrap();
        console.resize(123, 45).unwrap();
        OpenOptions::new()
            .write(true)
            .open(dir.path().join("in"))
            .unwrap()
            .write_all(b"hi\n")
            .unwrap();
        let slave = File::from(pty.slave);
        let mut reading = slave.try_clone().unwrap();
        let line = tokio::task::spawn_blocking(move || {
            let mut text = [0; 3];
            reading.read_exact(&mut text).unwrap();
            text
        });
        assert_eq!(
            &tokio::time::timeout(LIMIT, line)
                .await
                .expect("no input")
                .unwrap(),
            b"hi\n"
        );
        // `slave` is still open, as in a process that was left in the background.
        console.end_of_process();
        console.drained(LIMIT).await;
        let mut text = String::new();
        client
            .read_to_string(&mut text)
            .expect("the output was not closed");
        assert_eq!(text, "hi\r\n", "the terminal's echo");
        drop(slave);
    }

    #[tokio::test]
    async fn a_console_socket_takes_terminals_only_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        for (sent, accepted) in [
            (openpty(None, None).unwrap().master, true),
            (File::open("/dev/null").unwrap().into(), false),
        ] {
            let socket = ConsoleSocket::bind(dir.path(), deposit()).unwrap();
            let path = socket.path().to_owned();
            let sender = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let fds = [sent.as_raw_fd()];
            let rights = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
            let name = [io::IoSlice::new(b"/dev/ptmx")];
            nix::sys::socket::sendmsg::<()>(
                sender.as_raw_fd(),
                &name,
                &rights,
                MsgFlags::empty(),
                None,
            )
            .unwrap();
            assert_eq!(socket.accept(LIMIT).await.is_ok(), accepted);
            assert!(!path.exists());
        }
        let socket = ConsoleSocket::bind(dir.path(), deposit()).unwrap();
        let late = socket.accept(Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(late, StdioError::NoConsole(_)), "{late}");
    }
}
