//! Opening what a client names, and making what a process gets: fifos, log files, pipes. Blocks on
//! the file system, never on a missing peer.
//!
//! A client end is a fifo that is open for reading and writing: as a writer it keeps the client
//! from reading EOF, as a reader it keeps what the client has not read while it is away, and spares
//! us EPIPE.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::pipe2;

use super::StdioError;
use super::non_blocking::set_non_blocking;
use super::plan::Output;
use crate::fdstore::{FdRole, ProcessFds};

/// A process can have any number of descriptors; its standard streams come first.
const MAX_LOOKED_AT: usize = 4096;

/// A pipe between a process and this daemon.
#[derive(Debug)]
pub(super) struct Pipe {
    /// Non-blocking.
    pub(super) ours: OwnedFd,
    pub(super) theirs: OwnedFd,
}

/// Opens the client's end of an output right into the set, if there is anything to be opened.
pub(super) fn output_into(
    fds: &ProcessFds,
    role: FdRole,
    stream: &'static str,
    wanted: &Output,
) -> Result<(), StdioError> {
    if let Output::Path(path) = wanted
        && matches!(kind(stream, path)?, Kind::Fifo)
    {
        return fifo_into(fds, role, stream, path, libc::O_RDWR);
    }
    match output(stream, wanted)? {
        Some(file) => store(fds, role, file),
        None => Ok(()),
    }
}

/// Opens the client's input right into the set: for reading alone, or with `is_held` for writing
/// too.
pub(super) fn input_into(
    fds: &ProcessFds,
    role: FdRole,
    path: &Path,
    is_held: bool,
) -> Result<(), StdioError> {
    check_input(path)?;
    let flags = if is_held {
        libc::O_RDWR
    } else {
        libc::O_RDONLY
    };
    fifo_into(fds, role, "stdin", path, flags)
}

/// A client may wait for this end in `open`, and would read the end, or get `EPIPE`, if it were
/// closed again.
fn fifo_into(
    fds: &ProcessFds,
    role: FdRole,
    stream: &'static str,
    path: &Path,
    access: i32,
) -> Result<(), StdioError> {
    let failed = |source| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    let flags = access | libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    if fds.is_stored() {
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|error| failed(io::Error::other(error)))?;
        let opened = fds.open_and_insert(role, &name, flags);
        return opened
            .map_err(|source| StdioError::NotStored { source })?
            .map_err(failed);
    }
    let mut options = OpenOptions::new();
    options.read(true).write(access == libc::O_RDWR);
    let fifo = existing(stream, path, &mut options, libc::O_NONBLOCK)?;
    store(fds, role, fifo.into())
}

fn store(fds: &ProcessFds, role: FdRole, fd: OwnedFd) -> Result<(), StdioError> {
    fds.insert_at_once(role, fd)
        .map_err(|source| StdioError::NotStored { source })
}

/// Opens the client's end of an output; `None` if there is nothing to be opened: it is not wanted,
/// or a logger's.
pub(super) fn output(stream: &'static str, output: &Output) -> Result<Option<OwnedFd>, StdioError> {
    match output {
        Output::Null | Output::Logger(_) => Ok(None),
        Output::File(path) => log_file(stream, path).map(Some),
        Output::Path(path) => match kind(stream, path)? {
            Kind::Fifo => fifo(stream, path).map(Some),
            Kind::File => {
                let mut options = OpenOptions::new();
                existing(stream, path, options.append(true), libc::O_NONBLOCK)
                    .map(|file| Some(file.into()))
            }
        },
    }
}

fn check_input(path: &Path) -> Result<(), StdioError> {
    match kind("stdin", path)? {
        Kind::Fifo => Ok(()),
        Kind::File => Err(StdioError::WrongKind {
            stream: "stdin",
            path: path.into(),
            what: "a regular file, which only outputs can be",
        }),
    }
}

/// The input fifo with a writer of this process, so that it does not end with its client.
pub(super) fn held_input(path: &Path) -> Result<OwnedFd, StdioError> {
    check_input(path)?;
    fifo("stdin", path)
}

/// A pipe whose writing end the process gets. With `outlives_us` that end can be read as well: the
/// process is a reader of its own output, which is not lost, and it gets no EPIPE, when this daemon
/// and the store end together.
pub(super) fn output_pipe(outlives_us: bool) -> io::Result<Pipe> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    set_non_blocking(&reader)?;
    let theirs = if outlives_us {
        reopen(&writer, libc::O_RDWR)?
    } else {
        writer
    };
    Ok(Pipe {
        ours: reader,
        theirs,
    })
}

/// A pipe between the two ends of a stream, in one descriptor for both sides.
pub(super) fn stage() -> io::Result<OwnedFd> {
    let pipe = output_pipe(true)?;
    set_non_blocking(&pipe.theirs)?;
    Ok(pipe.theirs)
}

/// A pipe whose reading end the process gets.
pub(super) fn input_pipe() -> io::Result<Pipe> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
    set_non_blocking(&ours)?;
    Ok(Pipe { ours, theirs })
}

/// The same pipe or fifo again, with another mode. It needs no path of its own.
pub(super) fn reopen(descriptor: &impl AsFd, flags: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd());
    let access = flags & libc::O_ACCMODE;
    let file = OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(flags & !libc::O_ACCMODE)
        .open(path)?;
    Ok(file.into())
}

/// Gives a descriptor's file to the owner that a request names, so that a remapped root can open
/// `/dev/stdout`.
pub(super) fn give(descriptor: &OwnedFd, owner: Option<(u32, u32)>) -> io::Result<()> {
    match owner {
        Some((uid, gid)) => fchown(descriptor, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// Whether it is a pipe or a fifo.
pub(super) fn is_pipe(descriptor: &impl AsFd) -> bool {
    fstat(descriptor)
        .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO)
}

/// Whether bytes can be spliced into it: a pipe, a fifo or a terminal, and no file.
pub(super) fn takes_splice(descriptor: &impl AsFd) -> bool {
    is_pipe(descriptor) || nix::unistd::isatty(descriptor).unwrap_or(false)
}

/// Whether it is open for writing too: a fifo that has a writer in this process.
pub(super) fn is_held(descriptor: &impl AsFd) -> bool {
    fcntl(descriptor, FcntlArg::F_GETFL).is_ok_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR)
}

/// Whether it is open for reading alone: what is left of a client's end whose output is over.
pub(super) fn is_reader(descriptor: &impl AsFd) -> bool {
    fcntl(descriptor, FcntlArg::F_GETFL)
        .is_ok_and(|flags| flags & libc::O_ACCMODE == libc::O_RDONLY)
}

/// The link to the pipe of this inode among the descriptors of a process. Blocks on procfs alone.
pub(super) fn link_to_pipe(pid: i32, inode: u64) -> Option<PathBuf> {
    let directory = format!("/proc/{pid}/fd");
    let name = format!("pipe:[{inode}]");
    let listed = fs::read_dir(&directory).into_iter().flatten().flatten();
    let is_it = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.as_os_str() == name.as_str())
    };
    listed
        .take(MAX_LOOKED_AT)
        .map(|entry| entry.path())
        .find(is_it)
}

/// The pipe of this inode among the descriptors of a process, as a new open file. Nothing else is
/// opened or looked into: what the process has open beside may be a device, or on a file system
/// that does not answer.
pub(super) fn pipe_of(pid: i32, inode: u64, flags: i32) -> Option<OwnedFd> {
    let link = link_to_pipe(pid, inode)?;
    // It may be another file by now: O_PATH opens nothing, and what it names does not change any
    // more.
    let named = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(link)
        .ok()?;
    let is_it = is_pipe(&named) && fstat(&named).is_ok_and(|stat| stat.st_ino == inode);
    is_it.then(|| reopen(&named, flags).ok())?
}

pub(super) fn null(stream: &'static str) -> Result<OwnedFd, StdioError> {
    let mut options = OpenOptions::new();
    let path = Path::new("/dev/null");
    existing(stream, path, options.read(true).write(true), 0).map(OwnedFd::from)
}

fn fifo(stream: &'static str, path: &Path) -> Result<OwnedFd, StdioError> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    existing(stream, path, options, libc::O_NONBLOCK).map(OwnedFd::from)
}

enum Kind {
    Fifo,
    File,
}

fn kind(stream: &'static str, path: &Path) -> Result<Kind, StdioError> {
    let failed = |source| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    let kind = fs::symlink_metadata(path).map_err(failed)?.file_type();
    let wrong = |what| {
        Err(StdioError::WrongKind {
            stream,
            path: path.into(),
            what,
        })
    };
    match () {
        () if kind.is_fifo() => Ok(Kind::Fifo),
        () if kind.is_file() => Ok(Kind::File),
        () if kind.is_dir() => wrong("a directory"),
        () if kind.is_symlink() => wrong("a symbolic link"),
        () => wrong("a device or a socket"),
    }
}

/// Opens what [`kind`] has looked at; should it have become a symbolic link since, it is refused.
fn existing(
    stream: &'static str,
    path: &Path,
    options: &mut OpenOptions,
    flags: i32,
) -> Result<File, StdioError> {
    options
        .custom_flags(flags | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|source| StdioError::Open {
            stream,
            path: path.into(),
            source,
        })
}

/// A log file, made with its directories if it is missing, as runc-v2 does.
fn log_file(stream: &'static str, path: &Path) -> Result<OwnedFd, StdioError> {
    let failed = |source: io::Error| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed)?;
    }
    // Non-blocking: should a fifo without a reader be there, opening fails instead of waiting.
    let mut options = OpenOptions::new();
    let file = options
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    file.map(OwnedFd::from).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};

    use super::super::pump::fill;
    use super::*;

    fn read_all(mut pipe: &File) -> (Vec<u8>, Option<ErrorKind>) {
        let mut bytes = Vec::new();
        let end = pipe.read_to_end(&mut bytes);
        (bytes, end.err().map(|error| error.kind()))
    }

    #[test]
    fn an_inits_output_waits_in_its_pipe_when_every_other_end_is_gone() {
        let pipe = output_pipe(true).unwrap();
        drop(pipe.ours);
        let mut theirs = File::from(pipe.theirs);
        theirs.write_all(b"no reader yet!").unwrap();
        let again = File::from(reopen(&theirs, libc::O_RDONLY | libc::O_NONBLOCK).unwrap());
        drop(theirs);
        assert_eq!(read_all(&again), (b"no reader yet!".to_vec(), None));
    }

    #[test]
    fn a_pipe_is_found_again_in_its_process_and_nothing_else_is() {
        let pipe = output_pipe(true).unwrap();
        let inode = fstat(&pipe.ours).unwrap().st_ino;
        drop(pipe.ours);
        fill(&File::from(pipe.theirs.try_clone().unwrap()), b"waits");
        let own = i32::try_from(std::process::id()).unwrap();
        let flags = libc::O_RDONLY | libc::O_NONBLOCK;
        let found = File::from(pipe_of(own, inode, flags).unwrap());
        drop(pipe.theirs);
        assert_eq!(read_all(&found), (b"waits".to_vec(), None));
        assert!(pipe_of(own, inode + 1_000_000, flags).is_none());
    }

    #[test]
    fn an_execs_output_pipe_is_not_its_own_reader() {
        let pipe = output_pipe(false).unwrap();
        drop(pipe.ours);
        let error = File::from(pipe.theirs).write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_is_not_there_or_not_a_stream_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let path = dir.path().join(name);
            output("stdout", &Output::Path(path)).unwrap_err()
        };
        let missing = open("missing");
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
        let directory = open("");
        assert!(
            directory.to_string().contains("is a directory"),
            "{directory}"
        );
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(open("link").to_string().contains("symbolic link"));
        fs::write(dir.path().join("file"), "").unwrap();
        let error = check_input(&dir.path().join("file")).unwrap_err();
        assert!(error.to_string().contains("only outputs"), "{error}");
    }

    #[test]
    fn a_log_file_is_made_with_its_directories_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/log");
        for text in ["one ", "two"] {
            let file = output("stdout", &Output::File(path.clone()))
                .unwrap()
                .unwrap();
            File::from(file).write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "one two");
    }
}
