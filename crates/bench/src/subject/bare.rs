//! [`Bare`]: an OCI runtime, called as shims call it, without a shim: what a life costs at least,
//! if the runtime does all of it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use super::spawn::{open, succeed, wait_for_end};
use super::{Bundle, Ground};

/// A runtime.
#[derive(Clone, Debug)]
pub(crate) struct Bare {
    name: String,
    program: PathBuf,
}

/// A container of it.
#[derive(Debug)]
pub(crate) struct BareContainer {
    program: PathBuf,
    root: PathBuf,
    id: String,
    bundle: Bundle,
    init: Option<(Pid, OwnedFd)>,
}

impl Bare {
    pub(crate) fn new(name: &str, program: &Path) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where it keeps its containers' states: not with those of the shims, nor of another runtime.
    pub(crate) fn root(&self, ground: &Ground) -> PathBuf {
        let name = format!("{}-{}", ground.namespace(), self.name);
        Path::new("/run/containerd/runc").join(name)
    }

    pub(super) fn container(&self, ground: &Ground, id: &str, bundle: Bundle) -> BareContainer {
        BareContainer {
            program: self.program.clone(),
            root: self.root(ground),
            id: id.into(),
            bundle,
            init: None,
        }
    }
}

impl BareContainer {
    pub(super) fn create(&mut self) -> anyhow::Result<()> {
        let pid_file = self.bundle.path().join("init.pid");
        let mut create = self.call("create");
        create.arg("--bundle").arg(self.bundle.path());
        create.arg("--pid-file").arg(&pid_file);
        self.run(create.arg(&self.id))?;
        let init = read_pid(&pid_file)?;
        let pidfd = open(init.as_raw())?.context("the init is gone")?;
        self.init = Some((init, pidfd));
        Ok(())
    }

    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        self.run(self.call("start").arg(&self.id))
    }

    pub(super) fn exec(&mut self) -> anyhow::Result<()> {
        let process = self.bundle.path().join("process.json");
        let pid_file = self.bundle.path().join("exec.pid");
        fs::write(&process, true_process().to_string())?;
        let mut exec = self.call("exec");
        exec.arg("--process").arg(&process).arg("--detach");
        exec.arg("--pid-file").arg(&pid_file);
        self.run(exec.arg(&self.id))?;
        let process = read_pid(&pid_file)?;
        let pidfd = open(process.as_raw())?.context("the exec is gone")?;
        reap(process, &pidfd)
    }

    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        let (init, _) = self.init.as_ref().context("there is no init")?;
        match kill(*init, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(super) fn wait(&mut self) -> anyhow::Result<()> {
        let (init, pidfd) = self.init.as_ref().context("there is no init")?;
        reap(*init, pidfd)
    }

    pub(super) fn delete(&mut self) -> anyhow::Result<()> {
        self.run(self.call("delete").arg(&self.id))
    }

    pub(super) fn into_bundle(self) -> Bundle {
        self.bundle
    }

    fn call(&self, command: &str) -> Command {
        let mut call = Command::new(&self.program);
        call.arg("--root").arg(&self.root);
        call.arg("--log").arg(self.log());
        call.args(["--log-format", "json", command]);
        call
    }

    fn run(&self, call: &mut Command) -> anyhow::Result<()> {
        let log = || fs::read_to_string(self.log()).unwrap_or_default();
        succeed(call).with_context(log)
    }

    fn log(&self) -> PathBuf {
        self.bundle.path().join("log.json")
    }
}

/// Waits for the end of a process that has become a child of this one.
fn reap(process: Pid, pidfd: &OwnedFd) -> anyhow::Result<()> {
    wait_for_end(pidfd)?;
    waitpid(process, Some(WaitPidFlag::WNOHANG))?;
    Ok(())
}

fn read_pid(path: &Path) -> anyhow::Result<Pid> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(Pid::from_raw(text.trim().parse()?))
}

/// The process that an exec runs.
pub(super) fn true_process() -> serde_json::Value {
    json!({
        "args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}
    })
}
