//! [`Docker`]: a dockerd of a test's own, on the containerd of its sandbox, and its client.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use testbed::engines::Engine;
use testbed::sandbox::{EMBEDSHIM, Finished, RUNC_V2, Running, Sandbox, until};

use crate::{Stage, stage};

/// What the image is called.
const IMAGE: &str = "guest";
/// Docker's own work is slow on a busy machine.
const LONG: Duration = Duration::from_mins(1);

/// A dockerd, its containerd and its client.
#[derive(Debug)]
pub struct Docker {
    dockerd: Option<Running>,
    engine: Engine,
    sandbox: Sandbox,
}

/// What dockerd and its containerd are started with.
#[derive(Clone, Copy, Debug, Default)]
pub struct DockerSetup<'a> {
    /// More runtimes for `daemon.json`.
    pub runtimes: &'a [(&'a str, Value)],
    /// More directories for the head of containerd's `PATH`.
    pub path: &'a [PathBuf],
    /// Whether our launcher has the name of runc's shim. Always if dockerd takes no other.
    pub by_runcs_name: bool,
}

impl Docker {
    /// Starts containerd and dockerd, and imports the test image.
    pub fn start(stage: &Stage) -> anyhow::Result<Self> {
        Self::start_with(stage, &DockerSetup::default())
    }

    /// The same with more than the usual.
    pub fn start_with(stage: &Stage, setup: &DockerSetup<'_>) -> anyhow::Result<Self> {
        let engine = stage::docker().context("Docker is not fetched")?;
        let takes_types = engine.takes_types()?;
        let by_runcs_name = setup.by_runcs_name || !takes_types;
        let mut sandbox = stage.bare_sandbox()?;
        if by_runcs_name && stage.runtime() == EMBEDSHIM {
            let names = sandbox.directory().join("names");
            fs::create_dir_all(&names)?;
            let launcher = stage.binary("containerd-shim-embed-v1");
            symlink(launcher, names.join("containerd-shim-runc-v2"))?;
            sandbox.use_shims(names);
        }
        let usual = std::env::var_os("PATH").unwrap_or_default();
        let usual = std::env::split_paths(&usual);
        let path = std::env::join_paths(setup.path.iter().cloned().chain(usual))?;
        sandbox.set_environment("PATH", &path.to_string_lossy());
        sandbox.start_containerd()?;
        let mut docker = Self {
            dockerd: None,
            engine,
            sandbox,
        };
        docker.configure(by_runcs_name, takes_types, setup.runtimes)?;
        docker.start_dockerd()?;
        let layer = stage.layer().display().to_string();
        docker.ok(&["import", "--change", "ENV PATH=/bin", &layer, IMAGE])?;
        Ok(docker)
    }

    /// Writes `daemon.json`.
    fn configure(
        &self,
        by_runcs_name: bool,
        takes_types: bool,
        runtimes: &[(&str, Value)],
    ) -> anyhow::Result<()> {
        let entries = runtimes.iter().cloned();
        let mut known: Map<String, Value> = entries.map(|(name, it)| (name.into(), it)).collect();
        let default = if by_runcs_name { RUNC_V2 } else { "tested" };
        if !by_runcs_name {
            let tested = json!({ "runtimeType": self.sandbox.runtime() });
            known.insert(default.into(), tested);
        }
        let mut config = Map::new();
        config.insert("live-restore".into(), json!(true));
        config.insert("default-runtime".into(), json!(default));
        config.insert("runtimes".into(), Value::Object(known));
        if !takes_types {
            // Not /etc/docker/key.json.
            config.insert("deprecated-key-path".into(), json!(self.file("key.json")));
        }
        let config = Value::Object(config).to_string();
        Ok(fs::write(self.file("daemon.json"), config)?)
    }

    /// Starts dockerd and waits until it answers.
    pub fn start_dockerd(&mut self) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.file("dockerd.log"))?;
        let namespace = self.sandbox.namespace();
        let mut dockerd = self.engine.dockerd();
        dockerd
            .arg("--config-file")
            .arg(self.file("daemon.json"))
            .arg("--data-root")
            .arg(self.file("docker"))
            .arg("--exec-root")
            .arg(self.file("dx"))
            .arg("--pidfile")
            .arg(self.file("dockerd.pid"))
            .arg("--containerd")
            .arg(self.file("c.sock"))
            .args(["--containerd-namespace", namespace])
            .args([format!(
                "--containerd-plugins-namespace={namespace}-plugins"
            )])
            .args([format!("--cgroup-parent=/{namespace}")])
            .args([format!("--host={}", self.host())])
            // No network of the machine is touched, and any file system will do.
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args([
                "--ip-forward=false",
                "--ip-masq=false",
                "--userland-proxy=false",
            ])
            .args(["--storage-driver=vfs", "--experimental"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        self.dockerd = Some(Running::spawn(&mut dockerd)?);
        let answers = || {
            let mut version = self.command(&["version"]);
            Ok(version.output().is_ok_and(|output| output.status.success()))
        };
        until("dockerd answers", answers).with_context(|| self.log())
    }

    /// Ends dockerd; containers go on.
    pub fn end_dockerd(&mut self, signal: Signal) -> anyhow::Result<()> {
        let mut dockerd = self.dockerd.take().context("dockerd does not run")?;
        dockerd.signal(signal)?;
        dockerd.finish(LONG)?;
        // A killed one leaves it, and its number may be another process's by now.
        let _ = fs::remove_file(self.file("dockerd.pid"));
        Ok(())
    }

    /// The sandbox, with the containerd and the daemon.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// The same, to kill and start containerd.
    pub fn sandbox_mut(&mut self) -> &mut Sandbox {
        &mut self.sandbox
    }

    /// What dockerd has complained of last.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.file("dockerd.log")).unwrap_or_default();
        let is_complaint =
            |line: &&str| !line.contains("level=info") && !line.contains("level=warn");
        let mut lines: Vec<&str> = text.lines().rev().filter(is_complaint).take(5).collect();
        lines.reverse();
        format!("dockerd's log:\n{}", lines.join("\n"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.sandbox.directory().join(name)
    }

    fn host(&self) -> String {
        format!("unix://{}", self.file("docker.sock").display())
    }
}

impl Docker {
    /// `docker` with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut docker = self.engine.docker();
        docker
            .args(["--host", &self.host(), "--config"])
            .arg(self.file("client"))
            .args(arguments)
            .stdin(Stdio::null());
        docker
    }

    /// `docker run` of a command in the test image, without a network unless the options name one.
    pub fn run_command(&self, options: &[&str], command: &[&str]) -> Command {
        let run: &[&str] = if options.contains(&"--network") {
            &["run"]
        } else {
            &["run", "--network", "none"]
        };
        self.command(&[run, options, &[IMAGE], command].concat())
    }

    /// Runs `docker` to its end.
    pub fn finish(&self, mut docker: Command) -> anyhow::Result<Finished> {
        Running::capture(&mut docker)?
            .finish(LONG)
            .with_context(|| self.log())
    }

    /// The same with an input, which is closed afterwards.
    pub fn finish_fed(&self, mut docker: Command, input: &str) -> anyhow::Result<Finished> {
        let mut running = Running::capture(docker.stdin(Stdio::piped()))?;
        running.feed(input.as_bytes())?;
        running.finish(LONG).with_context(|| self.log())
    }

    /// `docker run` to its end.
    pub fn run(&self, options: &[&str], command: &[&str]) -> anyhow::Result<Finished> {
        self.finish(self.run_command(options, command))
    }

    /// Starts a container in the background.
    pub fn detached(&self, name: &str, options: &[&str], command: &[&str]) -> anyhow::Result<()> {
        let options = [&["--detach", "--name", name], options].concat();
        let finished = self.run(&options, command)?;
        ensure!(finished.code == Some(0), "{finished:?}\n{}", self.log());
        Ok(())
    }

    /// Runs `docker` and returns what it printed, or an error with what it complained of.
    pub fn ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let finished = self.finish(self.command(arguments))?;
        ensure!(
            finished.code == Some(0),
            "docker {}: {}\n{}",
            arguments.join(" "),
            finished.stderr.trim(),
            self.log()
        );
        Ok(finished.stdout)
    }

    /// What `docker inspect` says of a container, such as `.State.ExitCode`.
    pub fn inspect(&self, name: &str, field: &str) -> anyhow::Result<String> {
        let format = format!("{{{{{field}}}}}");
        let text = self.ok(&["inspect", "--format", &format, name])?;
        Ok(text.trim().to_owned())
    }

    /// Waits until a container has this status.
    pub fn wait_for_status(&self, name: &str, status: &str) -> anyhow::Result<()> {
        let has = || Ok(self.inspect(name, ".State.Status")? == status);
        until(&format!("{name} is {status}"), has).with_context(|| self.log())
    }

    /// Waits for the end of a container and returns its code, as `docker wait` tells it.
    pub fn wait(&self, name: &str) -> anyhow::Result<i32> {
        let text = self.ok(&["wait", name])?;
        text.trim().parse().with_context(|| text.clone())
    }

    /// Waits until this text is in a container's log.
    pub fn wait_for_log(&self, name: &str, text: &str) -> anyhow::Result<()> {
        until(&format!("{text:?} comes"), || {
            Ok(self.ok(&["logs", name])?.contains(text))
        })
    }
}

/// A runtime of `daemon.json` by its containerd type, with options.
pub fn runtime_type(runtime: &str, options: &Value) -> Value {
    json!({ "runtimeType": runtime, "options": options })
}

/// A runtime of `daemon.json` by the path of an OCI runtime.
pub fn runtime_path(program: &Path) -> Value {
    json!({ "path": program })
}
