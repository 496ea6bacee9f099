//! [`Sandbox`]: a containerd of our own with its own root, state, sockets, namespace and
//! `embedshimd`, in a directory that is gone afterwards. The system's containerd is never touched.

mod cleanup;
mod config;
mod daemon;
mod process;
mod tasks;
mod wait;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

pub use cleanup::{clean_up_all, clean_up_on_signals};
pub use daemon::stop;
pub use process::{Finished, Running};
pub use tasks::Task;
pub use wait::{PATIENCE, until};

use crate::image;

/// Our runtime, by the name that containerd resolves to the launcher.
pub const EMBEDSHIM: &str = "io.containerd.embed.v1";
/// The Go shim, for comparison.
pub const RUNC_V2: &str = "io.containerd.runc.v2";

/// A private containerd.
#[derive(Debug)]
pub struct Sandbox {
    directory: PathBuf,
    namespace: String,
    runtime: String,
    binaries: PathBuf,
    programs: Option<PathBuf>,
    shims: Option<PathBuf>,
    oci_runtime: Option<PathBuf>,
    has_sandboxer: bool,
    has_nri: bool,
    containerd: Option<Running>,
    environment: Vec<(String, String)>,
}

impl Sandbox {
    /// Starts a containerd that finds the launcher in `binaries`, with the image of `archive` in
    /// it.
    pub fn start(binaries: &Path, runtime: &str, archive: &Path) -> anyhow::Result<Self> {
        let mut sandbox = Self::new(binaries, runtime)?;
        sandbox.start_containerd()?;
        sandbox.import(archive)?;
        Ok(sandbox)
    }

    /// The same with nothing started yet.
    pub fn new(binaries: &Path, runtime: &str) -> anyhow::Result<Self> {
        // Short, because of the 107 bytes of a socket's path, and plain, so that the pins'
        // directory has the same name.
        let directory = tempfile::Builder::new()
            .prefix("embedshim_")
            .tempdir_in("/tmp")?
            .keep();
        let namespace = directory
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .replace('_', "-");
        cleanup::register(&directory);
        let sandbox = Self {
            directory,
            namespace,
            runtime: runtime.into(),
            binaries: binaries.into(),
            programs: None,
            shims: None,
            oci_runtime: None,
            has_sandboxer: false,
            has_nri: false,
            containerd: None,
            environment: Vec::new(),
        };
        sandbox.write_config(false)?;
        Ok(sandbox)
    }

    /// Mounts a tmpfs over this directory of its own, which is made if it is missing: what is below
    /// `/run` on a node is in memory there.
    pub fn keep_in_memory(&self, name: &str) -> anyhow::Result<()> {
        let directory = self.directory.join(name);
        fs::create_dir_all(&directory)?;
        let (tmpfs, none) = (Some("tmpfs"), MsFlags::empty());
        mount(tmpfs, &directory, tmpfs, none, Some("mode=0755"))
            .with_context(|| directory.display().to_string())
    }

    /// Takes `containerd` and `ctr` from this directory, from their next start on.
    pub fn use_programs(&mut self, directory: Option<PathBuf>) {
        self.programs = directory;
    }

    /// Lets containerd look for shims in this directory first, from its next start on.
    pub fn use_shims(&mut self, directory: PathBuf) {
        self.shims = Some(directory);
    }

    /// Lets the handlers of the CRI use this OCI runtime, when [`Sandbox::enable_cri`] is called
    /// next.
    pub fn use_oci_runtime(&mut self, program: PathBuf) {
        self.oci_runtime = Some(program);
    }

    /// Where everything is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The containerd namespace that only this sandbox uses.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The runtime under test.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// The daemon's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("es")
    }

    /// Where the daemon pins its BPF program and maps.
    pub fn pin_dir(&self) -> PathBuf {
        cleanup::pin_dir(&self.directory)
    }

    /// The bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory
            .join("state/io.containerd.runtime.v2.task")
            .join(&self.namespace)
            .join(id)
    }

    /// Sets a variable for the containerd (and by it, launcher and daemon) that is started next.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.into(), value.into()));
    }

    /// Starts containerd and waits until it answers.
    pub fn start_containerd(&mut self) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.containerd_log())?;
        let set = self.environment.iter().find(|(name, _)| name == "PATH");
        let usual = set.map_or_else(
            || std::env::var("PATH").unwrap_or_default(),
            |(_, path)| path.clone(),
        );
        let own = [&self.shims, &self.programs, &Some(self.binaries.clone())];
        let own = own.into_iter().flatten().cloned();
        let path = std::env::join_paths(own.chain(std::env::split_paths(&usual)))?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.directory.join("containerd.toml"))
            .env("EMBEDSHIM_STATE_DIR", self.state_dir())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for us, who then stop it in order.
            .process_group(0);
        self.containerd = Some(Running::spawn(&mut command)?);
        until("containerd answers", || {
            Ok(self
                .ctr(["version"])
                .output()
                .is_ok_and(|output| output.status.success()))
        })
        .with_context(|| tail(&self.containerd_log()))
    }

    /// Stops containerd, politely; containers go on.
    pub fn stop_containerd(&mut self) -> anyhow::Result<()> {
        self.end_containerd(Signal::SIGTERM)
    }

    /// Kills containerd; containers go on.
    pub fn kill_containerd(&mut self) -> anyhow::Result<()> {
        self.end_containerd(Signal::SIGKILL)
    }

    fn end_containerd(&mut self, signal: Signal) -> anyhow::Result<()> {
        let Some(mut containerd) = self.containerd.take() else {
            return Ok(());
        };
        containerd.signal(signal)?;
        containerd.finish(PATIENCE)?;
        Ok(())
    }

    /// containerd's log.
    pub fn containerd_log(&self) -> PathBuf {
        self.directory.join("containerd.log")
    }

    /// `ctr` for this containerd.
    pub fn ctr<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut ctr = Command::new(
            self.programs
                .as_ref()
                .map_or_else(|| "ctr".into(), |programs| programs.join("ctr")),
        );
        ctr.arg("--address")
            .arg(self.directory.join("c.sock"))
            .args(["--namespace", &self.namespace])
            .args(arguments);
        // From 2.2 on it would say of cgroup v1 what is not of the container.
        ctr.env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1");
        ctr.stdin(Stdio::null());
        ctr
    }

    /// `ctr run` of a command in the test image, with more of `ctr run`'s options.
    pub fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Command {
        let mut ctr = self.ctr(["run", "--runtime", &self.runtime, "--fifo-dir"]);
        ctr.arg(self.directory.join("fifo"))
            .args(options)
            .args([image::NAME, id])
            .args(command);
        ctr
    }

    /// Runs `ctr` and returns what it printed, or an error with what it complained of.
    pub fn ctr_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let finished = Running::capture(&mut self.ctr(arguments))?.finish(PATIENCE)?;
        if finished.code != Some(0) {
            bail!(
                "ctr {} failed: {}",
                arguments.join(" "),
                finished.stderr.trim()
            );
        }
        Ok(finished.stdout)
    }

    /// Puts the image of `archive` in.
    pub fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let archive = archive.to_string_lossy();
        self.ctr_ok(&["image", "import", &archive]).map(drop)
    }
}

impl Sandbox {
    /// Leaves everything as it is, to be looked at and cleaned up by hand.
    pub fn keep(mut self) -> PathBuf {
        if let Some(containerd) = self.containerd.take() {
            containerd.leave();
        }
        cleanup::forget(&self.directory);
        let directory = self.directory.clone();
        std::mem::forget(self);
        directory
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::env::var_os("EMBEDSHIM_KEEP_SANDBOX").is_some() {
            eprintln!("kept: {}", self.directory.display());
            cleanup::forget(&self.directory);
            return;
        }
        if let Some(mut containerd) = self.containerd.take() {
            // What is left is removed the hard way right below.
            let _ = containerd.signal(Signal::SIGKILL);
            let _ = containerd.finish(PATIENCE);
        }
        cleanup::clean_up(&self.directory);
    }
}

/// Whether a process exists and any of its threads is no zombie: a killed daemon's main thread is
/// one before the others have let go of its descriptors.
pub fn is_alive(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    threads.into_iter().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim_start().chars().next());
        state.is_some_and(|state| !"ZX".contains(state))
    })
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(10)..)
        .unwrap_or_default()
        .join("\n")
}
