//! [`Ground`]: what all subjects share: a sandbox with its namespace and our daemon, one root file
//! system, bundles, and a place for events. Bundles are made before and removed after what is
//! timed.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use testbed::sandbox::{EMBEDSHIM, Sandbox};

use super::spawn::succeed;
use crate::client::EventSink;

/// What containers run: a static program that sleeps.
const COMMAND: [&str; 2] = ["sleep", "1000000"];

/// See above.
#[derive(Debug)]
pub(crate) struct Ground {
    sandbox: Sandbox,
    events: EventSink,
    template: Value,
}

/// The directory of one container.
#[derive(Debug)]
pub(crate) struct Bundle {
    directory: PathBuf,
    /// containerd reads what a shim writes to it; it fits into a fifo that is open.
    _log: File,
}

impl Ground {
    /// Makes a sandbox, and starts our daemon in it.
    pub(crate) fn new(binaries: &Path) -> anyhow::Result<Self> {
        let sandbox = Sandbox::new(binaries, EMBEDSHIM)?;
        let directory = sandbox.directory();
        for name in ["es", "bundles"] {
            sandbox.keep_in_memory(name)?;
        }
        let events = EventSink::listen(directory.join("events"))?;
        let rootfs = directory.join("rootfs");
        let bin = rootfs.join("bin");
        fs::create_dir_all(&bin)?;
        for mounted in ["dev", "proc", "sys"] {
            fs::create_dir_all(rootfs.join(mounted))?;
        }
        fs::copy("/bin/busybox", bin.join("busybox")).context("/bin/busybox")?;
        for applet in ["sleep", "true"] {
            symlink("busybox", bin.join(applet))?;
        }
        let template = template(directory, &rootfs)?;
        sandbox.start_daemon()?;
        Ok(Self {
            sandbox,
            events,
            template,
        })
    }

    /// A bundle for a container.
    pub(crate) fn bundle(&self, id: &str) -> anyhow::Result<Bundle> {
        self.bundle_with(id, |_| {})
    }

    /// The same with something changed in its `config.json`.
    pub(crate) fn bundle_with(
        &self,
        id: &str,
        change: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Bundle> {
        let directory = self.directory().join("bundles").join(id);
        // What a shim unmounts in the end; the root file system itself is one for all.
        fs::create_dir_all(directory.join("rootfs"))?;
        let mut spec = self.template.clone();
        if let Some(path) = spec.pointer_mut("/linux/cgroupsPath") {
            *path = json!(format!("/{}/{id}", self.namespace()));
        }
        change(&mut spec);
        fs::write(directory.join("config.json"), spec.to_string())?;
        let log = directory.join("log");
        mkfifo(&log, Mode::S_IRWXU)?;
        let mut options = File::options();
        let options = options.read(true).write(true);
        let log = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(log)?;
        Ok(Bundle {
            directory,
            _log: log,
        })
    }

    pub(crate) fn namespace(&self) -> &str {
        self.sandbox.namespace()
    }

    pub(crate) fn directory(&self) -> &Path {
        self.sandbox.directory()
    }

    pub(crate) fn events(&self) -> &Path {
        self.events.path()
    }

    pub(crate) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Our daemon and its keeper.
    pub(crate) fn daemon_and_keeper(&self) -> anyhow::Result<[i32; 2]> {
        let daemon = self.sandbox.daemon_pid().context("the daemon is gone")?;
        let keeper = self.sandbox.keeper_pid().context("the keeper is gone")?;
        Ok([daemon, keeper])
    }
}

impl Bundle {
    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn remove(self) -> anyhow::Result<()> {
        Ok(fs::remove_dir_all(&self.directory)?)
    }
}

/// What `runc spec` proposes, without a terminal.
fn template(directory: &Path, rootfs: &Path) -> anyhow::Result<Value> {
    succeed(Command::new("runc").arg("spec").current_dir(directory))?;
    let text = fs::read_to_string(directory.join("config.json"))?;
    let mut spec: Value = serde_json::from_str(&text)?;
    let mut set = |pointer: &str, value| {
        let place = spec.pointer_mut(pointer);
        place
            .map(|place| *place = value)
            .context(pointer.to_owned())
    };
    set("/process/args", json!(COMMAND))?;
    set("/process/env", json!(["PATH=/bin"]))?;
    set("/process/terminal", json!(false))?;
    set("/root/path", json!(rootfs))?;
    let linux = spec.pointer_mut("/linux").and_then(Value::as_object_mut);
    linux
        .context("/linux")?
        .insert("cgroupsPath".into(), json!(""));
    Ok(spec)
}
