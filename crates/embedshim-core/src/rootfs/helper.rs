//! File systems in user space (`fuse.X`, `fuse3.X`): mounted by the program that Debian and others install for it, as containerd does.
//! The server it leaves behind is not ours to watch; unmounting ends it.

use std::ffi::OsString;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Mount;
use crate::child_context::ChildContext;
use crate::program::touch;
use crate::reaper::Orphans;

/// How long a helper may take; containerd's own has no limit, and a Create lasts no longer than its client waits.
const LIMIT: Duration = Duration::from_secs(30);
/// How long one that was killed is waited for.
const KILLED: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);
/// How much of what it complains about is passed on.
const MAX_COMPLAINT: u64 = 1024;

/// The helper and the name it knows the file system by; none for what the kernel mounts.
pub(super) fn of(kind: &str) -> Option<(&'static str, &str)> {
    let known = [("fuse3.", "mount.fuse3"), ("fuse.", "mount.fuse")];
    known
        .into_iter()
        .find_map(|(prefix, helper)| Some((helper, kind.strip_prefix(prefix)?)))
}

/// What a helper inherits, and who has to leave its status to us.
#[derive(Clone, Debug, Default)]
pub(crate) struct HelperContext {
    pub(crate) orphans: Orphans,
    pub(crate) context: ChildContext,
    /// Where it works: the bundle.
    pub(crate) directory: PathBuf,
}

/// Runs the helper: `mount.fuse3 SOURCE TARGET -o OPTION ... -t NAME`.
pub(super) fn mount(
    helper: &str,
    name: &str,
    mount: &Mount,
    target: &Path,
    context: &HelperContext,
) -> io::Result<()> {
    let options = mount.options.iter().flat_map(|option| ["-o", option]);
    // Not a pipe: the server that goes on in the background would keep it open.
    let complaint = memfd_create("mount", MFdFlags::MFD_CLOEXEC)?;
    let mut complaint = std::fs::File::from(complaint);
    let mut command = Command::new(helper);
    context.context.give(&mut command, &context.directory);
    command
        .arg(&mount.source)
        .arg(OsString::from(target))
        .args(options)
        .args(["-t", name])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaint.try_clone()?);
    touch(command.get_program(), context.context.variable("PATH"));
    let mut child = context
        .orphans
        .spawn(&mut command)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run {helper}: {error}")))?;
    let Some(status) = wait(&mut child, LIMIT)? else {
        // With what it has started: mount.fuse3 is a shell that runs the server.
        let _ = killpg(Pid::from_raw(child.pid()), Signal::SIGKILL);
        // Uninterruptible, it ends later; then the reaper takes it.
        wait(&mut child, KILLED)?;
        let text = format!("{helper} did not end within {} s", LIMIT.as_secs());
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    };
    if status.success() {
        return Ok(());
    }
    complaint.rewind()?;
    let mut said = Vec::new();
    complaint.take(MAX_COMPLAINT).read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    Err(io::Error::other(format!(
        "{helper}: {status}: {}",
        said.trim()
    )))
}

/// Its status; `None` if it goes on for longer than this.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let give_up = Instant::now() + limit;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() > give_up {
            return Ok(status);
        }
        std::thread::sleep(PAUSE);
    }
}
