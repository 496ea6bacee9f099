//! Removes whatever a sandbox may have left on the machine: processes, containers, mounts, cgroups,
//! pins, files. Works from the sandbox's directory alone, so that a signal handler's thread can do
//! it too. Every step is tried, whatever became of others.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::wait::until;

/// Where all daemons pin.
const PINS: &str = "/sys/fs/bpf/embedshim";

static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

pub(super) fn register(directory: &Path) {
    LIVE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(directory.into());
}

/// Leaves a sandbox to be looked at.
pub(super) fn forget(directory: &Path) {
    LIVE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(|live| live != directory);
}

/// Cleans up every sandbox of this process.
pub fn clean_up_all() {
    let live = std::mem::take(&mut *LIVE.lock().unwrap_or_else(PoisonError::into_inner));
    for directory in &live {
        clean_up(directory);
    }
    // Only now, when no daemon of the sandbox can be about to make its own directory in it.
    let _ = fs::remove_dir(PINS);
}

/// Makes SIGINT and SIGTERM clean up before they end this process.
pub fn clean_up_on_signals() -> anyhow::Result<()> {
    let clean_up_and_leave = || {
        eprintln!("\ninterrupted: cleaning up");
        clean_up_all();
        std::process::exit(130);
    };
    Ok(ctrlc::set_handler(clean_up_and_leave)?)
}

/// Removes one sandbox. Idempotent.
pub(super) fn clean_up(directory: &Path) {
    forget(directory);
    let namespace = directory
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .replace('_', "-");
    // First those who would start something again.
    end_processes(directory);
    delete_containers(&namespace, directory);
    unmount_below(directory);
    for controller in cgroup_roots() {
        remove_cgroups(&controller.join(&namespace));
    }
    remove_pins(&pin_dir(directory));
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("cannot remove {}: {error}", directory.display());
    }
}

/// Ends what has the sandbox's directory in its command line or environment: containerd, the
/// launchers, the daemon, shims.
fn end_processes(directory: &Path) {
    let needle = directory.to_string_lossy().into_owned();
    let own = nix::unistd::getpid().as_raw();
    let concerned = |pid: i32| {
        let has = |file: &str| {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).contains(&needle)
        };
        pid != own && (has("cmdline") || has("environ"))
    };
    // Until a look finds none: keeper and daemon start each other while we look.
    let _ = until("processes end", || {
        let found: Vec<i32> = pids().filter(|&pid| concerned(pid)).collect();
        for &pid in &found {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        Ok(found.is_empty())
    });
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The containers of the sandbox's own namespace, and those whose bundle is below its directory:
/// the CRI has one namespace for all.
fn delete_containers(namespace: &str, directory: &Path) {
    let base = Path::new("/run/containerd/runc");
    let needle = directory.to_string_lossy().into_owned();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let root = entry.path();
        for container in fs::read_dir(&root).into_iter().flatten().flatten() {
            let state = fs::read_to_string(container.path().join("state.json")).unwrap_or_default();
            if entry.file_name() == namespace || state.contains(&needle) {
                let mut runc = Command::new("runc");
                let _ = runc
                    .arg("--root")
                    .arg(&root)
                    .args(["delete", "--force"])
                    .arg(container.file_name())
                    .output();
            }
        }
    }
    let _ = fs::remove_dir_all(base.join(namespace));
}

fn unmount_below(directory: &Path) {
    let prefix = format!("{}/", directory.display());
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|target| target.starts_with(&prefix))
        .collect();
    for target in targets.iter().rev() {
        let _ = umount2(*target, MntFlags::MNT_DETACH);
    }
}

/// The roots of all hierarchies: one with cgroup v2, one for each controller with v1.
fn cgroup_roots() -> impl Iterator<Item = PathBuf> {
    let base = PathBuf::from("/sys/fs/cgroup");
    let below = fs::read_dir(&base)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    std::iter::once(base).chain(below)
}

fn remove_cgroups(cgroup: &Path) {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    for pid in fs::read_to_string(cgroup.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        let _ = pid
            .parse()
            .map(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL));
    }
    // A killed process leaves its cgroup a moment later.
    let _ = until("cgroup is empty", || {
        Ok(fs::remove_dir(cgroup).is_ok() || !cgroup.exists())
    });
}

/// Where a daemon with `directory/es` as its state directory pins. The rule is
/// `monitor_bpf::pin_dir_for`'s; a sandbox's path has only characters that stay as they are.
pub(super) fn pin_dir(directory: &Path) -> PathBuf {
    let name = directory
        .join("es")
        .to_string_lossy()
        .trim_start_matches('/')
        .replace('/', "-");
    Path::new(PINS).join(name)
}

fn remove_pins(directory: &Path) {
    for layout in fs::read_dir(directory).into_iter().flatten().flatten() {
        for pin in fs::read_dir(layout.path()).into_iter().flatten().flatten() {
            let _ = fs::remove_file(pin.path());
        }
        let _ = fs::remove_dir(layout.path());
        // The link to the state directory.
        let _ = fs::remove_file(layout.path());
    }
    let _ = fs::remove_dir(directory);
}
