//! File systems in user space (`fuse.X`, `fuse3.X`): mounted by the program that Debian and others install for it, as containerd does.
//! The server it leaves behind is not ours to watch; unmounting ends it.

use std::ffi::OsString;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Mount;

/// How long a helper may take; containerd's own has no limit, and a Create lasts no longer than its client waits.
const LIMIT: Duration = Duration::from_secs(30);
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

/// Runs the helper: `mount.fuse3 SOURCE TARGET -o OPTION ... -t NAME`.
pub(super) fn mount(helper: &str, name: &str, mount: &Mount, target: &Path) -> io::Result<()> {
    let options = mount.options.iter().flat_map(|option| ["-o", option]);
    // Not a pipe: the server that goes on in the background would keep it open.
    let complaint = memfd_create("mount", MFdFlags::MFD_CLOEXEC)?;
    let mut complaint = std::fs::File::from(complaint);
    let mut child = Command::new(helper)
        .arg(&mount.source)
        .arg(OsString::from(target))
        .args(options)
        .args(["-t", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaint.try_clone()?)
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run {helper}: {error}")))?;
    let give_up = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > give_up {
            child.kill()?;
            child.wait()?;
            let text = format!("{helper} did not end within {} s", LIMIT.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(PAUSE);
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
