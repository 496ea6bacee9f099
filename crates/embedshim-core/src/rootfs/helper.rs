//! File systems in user space (`fuse.X`, `fuse3.X`): mounted by the program that Debian and others
//! install for it, as containerd does. The server it leaves behind is not ours to watch; unmounting
//! ends it. A helper that a predecessor has left running is ended before what it may have mounted
//! is unmounted: which process it is, it has noted in the bundle itself.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tracing::warn;

use super::Mount;
use crate::child_context::ChildContext;
use crate::process::{HostRoot, Process, parse_stat_field};
use crate::program::touch;
use crate::reaper::{Awaited, Reaper};
use crate::sys;

/// How long a helper may take; containerd's own has no limit, and a Create lasts no longer than its
/// client waits.
const LIMIT: Duration = Duration::from_secs(30);
/// How long one that was killed is waited for.
const KILLED: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);
/// How much of what it complains about is passed on.
const MAX_COMPLAINT: u64 = 1024;
/// In the bundle, while a helper runs: its `/proc/PID/stat`.
const NOTE: &str = "mount-helper";
const MAX_NOTE: u64 = 1024;
/// Fields of `/proc/PID/stat` (proc(5)).
const GROUP: usize = 5;
const START_TIME: usize = 22;

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
    pub(crate) reaper: Reaper,
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
    let complaint = File::from(complaint);
    let mut command = Command::new(helper);
    context.context.give(&mut command, &context.directory);
    command
        .arg(&mount.source)
        .arg(OsString::from(target))
        .args(options)
        .args(["-t", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaint.try_clone()?);
    touch(command.get_program(), context.context.variable("PATH"));
    let note = context.directory.join(NOTE);
    let noted = CString::new(note.as_os_str().as_bytes()).map_err(io::Error::other)?;
    sys::note_self(&mut command, noted);
    let mut child = context
        .reaper
        .spawn(&mut command)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run {helper}: {error}")))?;
    let ended = finish(&mut child, helper, complaint);
    // One that was killed and has not ended is for the next to look for.
    if child.try_wait().is_ok_and(|status| status.is_some()) {
        let _ = fs::remove_file(note);
    }
    ended
}

/// Waits until the helper has mounted, or has failed.
fn finish(child: &mut Awaited, helper: &str, mut complaint: File) -> io::Result<()> {
    let Some(status) = wait(child, LIMIT)? else {
        // With what it has started: mount.fuse3 is a shell that runs the server.
        let _ = killpg(Pid::from_raw(child.pid()), Signal::SIGKILL);
        // Uninterruptible, it ends later; then the reaper takes it.
        wait(child, KILLED)?;
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

/// Ends the helper that a predecessor has left running in this bundle, if there is one, and what
/// that has started: nothing is mounted by it afterwards. One in uninterruptible sleep is waited
/// for no longer than a second.
pub(crate) fn end_left(bundle: &Path) {
    let note = bundle.join(NOTE);
    let Some(helper) = left(&note) else {
        // It has ended, if there ever was one; its number may be another's by now.
        let _ = fs::remove_file(note);
        return;
    };
    let pid = helper.identity().pid;
    warn!(pid, bundle = %bundle.display(), "ending a mount helper of a predecessor");
    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    let give_up = Instant::now() + KILLED;
    while is_at_work(pid) {
        if Instant::now() > give_up {
            warn!(pid, "a mount helper does not end: it can still mount");
            return;
        }
        std::thread::sleep(PAUSE);
    }
    let _ = fs::remove_file(note);
}

/// The process that the note names, if it is there.
fn left(note: &Path) -> Option<Process> {
    let mut stat = Vec::new();
    let file = File::open(note).ok()?;
    file.take(MAX_NOTE).read_to_end(&mut stat).ok()?;
    let number = stat.split(|&byte| byte == b' ').next()?;
    let pid = str::from_utf8(number).ok()?.parse().ok()?;
    let process = Process::open(pid).ok()?;
    let is_same = Some(process.identity().start_ticks) == parse_stat_field(&stat, START_TIME);
    (is_same && HostRoot::find()?.owns(pid)).then_some(process)
}

/// Whether a process of this group is neither a zombie nor gone.
fn is_at_work(group: i32) -> bool {
    let is_its = |stat: &[u8]| {
        let state = stat.rsplit(|&byte| byte == b')').next();
        let state = state.and_then(|rest| rest.get(1)).copied();
        parse_stat_field(stat, GROUP) == u64::try_from(group).ok()
            && state.is_some_and(|state| !b"ZX".contains(&state))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut stats = processes.filter_map(|process| fs::read(process.path().join("stat")).ok());
    stats.any(|stat| is_its(&stat))
}
