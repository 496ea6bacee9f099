//! [`Shim`]: the daemon as containerd speaks to it, without containerd: for requests that
//! containerd would never send.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use containerd_shim_protos::TaskClient;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testbed::sandbox::Sandbox;
use ttrpc::context::{self, Context as Metadata};

/// A connection to the daemon of a sandbox.
pub struct Shim {
    /// The Task service.
    pub tasks: TaskClient,
    metadata: HashMap<String, Vec<String>>,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("metadata", &self.metadata)
            .finish_non_exhaustive()
    }
}

impl Shim {
    /// Connects.
    pub fn connect(sandbox: &Sandbox) -> anyhow::Result<Self> {
        Self::at(&sandbox.state_dir(), sandbox.namespace())
    }

    /// Connects to the daemon of a state directory.
    pub fn at(state_dir: &Path, namespace: &str) -> anyhow::Result<Self> {
        let address = format!("unix://{}/shim.sock", state_dir.display());
        Self::at_address(&address, namespace)
    }

    /// Connects to the shim at an address, such as a shim's `start` prints.
    pub fn at_address(address: &str, namespace: &str) -> anyhow::Result<Self> {
        let client = ttrpc::Client::connect(address).with_context(|| address.to_owned())?;
        Ok(Self {
            tasks: TaskClient::new(client),
            metadata: HashMap::from([(
                "containerd-namespace-ttrpc".into(),
                vec![namespace.into()],
            )]),
        })
    }

    /// The same, whose calls have this beside their requests, too.
    #[must_use]
    pub fn with_metadata(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), vec![value.into()]);
        self
    }

    /// What a call has beside its request: the namespace, and what was added.
    pub fn metadata(&self) -> Metadata {
        context::with_metadata(self.metadata.clone())
    }

    /// Creates a task from a bundle.
    pub fn create(&self, id: &str, bundle: &Path) -> ttrpc::Result<u32> {
        self.create_with(id, bundle, |_| {})
    }

    /// Creates a task with something more in the request: streams, mounts, options.
    pub fn create_with(
        &self,
        id: &str,
        bundle: &Path,
        more: impl FnOnce(&mut api::CreateTaskRequest),
    ) -> ttrpc::Result<u32> {
        let mut request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_string_lossy().into_owned(),
            ..api::CreateTaskRequest::default()
        };
        more(&mut request);
        self.tasks
            .create(self.metadata(), &request)
            .map(|response| response.pid)
    }

    /// Closes the init's input.
    pub fn close_stdin(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::CloseIORequest {
            id: id.into(),
            stdin: true,
            ..api::CloseIORequest::default()
        };
        self.tasks.close_io(self.metadata(), &request).map(drop)
    }

    /// Starts its init.
    pub fn start(&self, id: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: id.into(),
            ..api::StartRequest::default()
        };
        self.tasks
            .start(self.metadata(), &request)
            .map(|response| response.pid)
    }

    /// Sends a signal to its init.
    pub fn kill(&self, id: &str, signal: Signal) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: id.into(),
            signal: (signal as i32).unsigned_abs(),
            ..api::KillRequest::default()
        };
        self.tasks.kill(self.metadata(), &request).map(drop)
    }

    /// Its state.
    pub fn state(&self, id: &str) -> ttrpc::Result<api::StateResponse> {
        let request = api::StateRequest {
            id: id.into(),
            ..api::StateRequest::default()
        };
        self.tasks.state(self.metadata(), &request)
    }

    /// Waits for its end and returns the code.
    pub fn wait(&self, id: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: id.into(),
            ..api::WaitRequest::default()
        };
        self.tasks
            .wait(self.metadata(), &request)
            .map(|response| response.exit_status)
    }

    /// Deletes it and returns the code.
    pub fn delete(&self, id: &str) -> ttrpc::Result<u32> {
        let request = api::DeleteRequest {
            id: id.into(),
            ..api::DeleteRequest::default()
        };
        self.tasks
            .delete(self.metadata(), &request)
            .map(|response| response.exit_status)
    }
}

impl Shim {
    /// Declares an exec of a command, with something more in the request: streams, a terminal.
    pub fn exec_with(
        &self,
        id: &str,
        exec: &str,
        command: &[&str],
        more: impl FnOnce(&mut api::ExecProcessRequest),
    ) -> ttrpc::Result<()> {
        let spec = json!({
            "args": command, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}
        });
        let mut request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: spec.to_string().into_bytes(),
                ..Any::default()
            }),
            ..api::ExecProcessRequest::default()
        };
        more(&mut request);
        self.tasks.exec(self.metadata(), &request).map(drop)
    }

    /// Starts an exec.
    pub fn start_exec(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..api::StartRequest::default()
        };
        self.tasks
            .start(self.metadata(), &request)
            .map(|response| response.pid)
    }

    /// Waits for the end of an exec and returns the code.
    pub fn wait_exec(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..api::WaitRequest::default()
        };
        self.tasks
            .wait(self.metadata(), &request)
            .map(|response| response.exit_status)
    }

    /// Deletes an exec and returns the code.
    pub fn delete_exec(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::DeleteRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..api::DeleteRequest::default()
        };
        self.tasks
            .delete(self.metadata(), &request)
            .map(|response| response.exit_status)
    }
}

/// The options of a task that name another OCI runtime.
pub fn binary_name(program: &Path) -> MessageField<Any> {
    options(&Options {
        binary_name: program.to_string_lossy().into_owned(),
        ..Options::default()
    })
}

/// The options of a task.
pub fn options(options: &Options) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    })
}

/// Writes a file that can be executed.
pub fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// A bundle made by hand: `runc spec` with the static busybox as its root.
#[derive(Debug)]
pub struct Bundle {
    directory: PathBuf,
}

impl Bundle {
    /// A bundle for a command.
    pub fn new(sandbox: &Sandbox, id: &str, command: &[&str]) -> anyhow::Result<Self> {
        let directory = sandbox.directory().join("bundles").join(id);
        let bin = directory.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        if !bin.join("busybox").exists() {
            fs::copy("/bin/busybox", bin.join("busybox"))?;
            for applet in ["sh", "sleep", "true"] {
                std::os::unix::fs::symlink("busybox", bin.join(applet))?;
            }
        }
        // The same id may be created again.
        let _ = fs::remove_file(directory.join("config.json"));
        let output = Command::new("runc")
            .arg("spec")
            .current_dir(&directory)
            .output()?;
        ensure!(
            output.status.success(),
            "runc spec: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let bundle = Self { directory };
        let cgroup = format!("/{}/{id}", sandbox.namespace());
        bundle.edit(|spec| {
            set(spec, "/process/args", json!(command));
            set(spec, "/process/terminal", json!(false));
            if let Some(linux) = spec.pointer_mut("/linux").and_then(Value::as_object_mut) {
                linux.insert("cgroupsPath".into(), json!(cgroup));
            }
        })?;
        Ok(bundle)
    }

    /// Changes its `config.json`.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
        let path = self.directory.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
        change(&mut spec);
        Ok(fs::write(path, spec.to_string())?)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }
}

fn set(spec: &mut Value, pointer: &str, value: Value) {
    if let Some(place) = spec.pointer_mut(pointer) {
        *place = value;
    }
}
