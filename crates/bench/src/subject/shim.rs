//! [`Shim`]: a shim as containerd uses it: its launcher, one connection for each container, `Wait`
//! on its way from the creation on, `Shutdown` and the launcher again in the end.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::bare::true_process;
use super::spawn::capture;
use super::{Bundle, Ground};
use crate::client::{Connection, Pending, Version};

/// A shim.
#[derive(Clone, Debug)]
pub(crate) struct Shim {
    name: String,
    launcher: PathBuf,
}

/// A container of it.
#[derive(Debug)]
pub(crate) struct ShimContainer {
    id: String,
    bundle: Bundle,
    launcher: Launcher,
    connection: Connection,
    exit: Option<Pending<api::WaitResponse>>,
    pid: u32,
}

/// The program that containerd executes, with all that it is given for one container.
#[derive(Clone, Debug)]
pub(crate) struct Launcher {
    program: PathBuf,
    namespace: String,
    events: PathBuf,
    state_dir: PathBuf,
    id: String,
    bundle: PathBuf,
}

impl Shim {
    pub(crate) fn new(name: &str, launcher: &Path) -> Self {
        Self {
            name: name.into(),
            launcher: launcher.into(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn launcher(&self, ground: &Ground, id: &str, bundle: &Bundle) -> Launcher {
        Launcher {
            program: self.launcher.clone(),
            namespace: ground.namespace().into(),
            events: ground.events().into(),
            state_dir: ground.sandbox().state_dir(),
            id: id.into(),
            bundle: bundle.path().into(),
        }
    }

    /// Starts the launcher, and connects to where it says.
    pub(crate) fn launch(
        &self,
        ground: &Ground,
        id: &str,
        bundle: Bundle,
    ) -> anyhow::Result<ShimContainer> {
        let launcher = self.launcher(ground, id, &bundle);
        let (address, version) = launcher.start()?;
        let connection = Connection::open(&address, version, ground.namespace())?;
        Ok(ShimContainer {
            id: id.into(),
            bundle,
            launcher,
            connection,
            exit: None,
            pid: 0,
        })
    }
}

impl Launcher {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", &self.namespace, "-address"])
            .arg(&self.events)
            .args(["-publish-binary", "/bin/true", "-id", &self.id])
            .current_dir(&self.bundle)
            // As containerd sets them.
            .env("GOMAXPROCS", "2")
            .env("TTRPC_ADDRESS", &self.events)
            .env("EMBEDSHIM_STATE_DIR", &self.state_dir);
        command
    }

    /// The socket that it names, and the API that is spoken there.
    pub(crate) fn start(&self) -> anyhow::Result<(PathBuf, Version)> {
        let said = capture(self.command().arg("start"))?;
        parse_address(&String::from_utf8_lossy(&said))
    }

    pub(crate) fn delete(&self) -> anyhow::Result<()> {
        let mut command = self.command();
        command.arg("-bundle").arg(&self.bundle);
        capture(command.arg("delete")).map(drop)
    }
}

/// An address alone, or JSON with a version: see docs/shim-contract.md.
fn parse_address(said: &str) -> anyhow::Result<(PathBuf, Version)> {
    let said = said.trim();
    let (address, version) = if said.starts_with('{') {
        let answer: Value = serde_json::from_str(said).with_context(|| said.to_owned())?;
        let address = answer.get("address").and_then(Value::as_str);
        let is_new = answer.get("version").and_then(Value::as_u64) == Some(3);
        let version = if is_new { Version::V3 } else { Version::V2 };
        (address.context("no address")?.to_owned(), version)
    } else {
        (said.to_owned(), Version::V2)
    };
    match address.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok((path.into(), version)),
        _ => bail!("the launcher printed no address: {said}"),
    }
}

impl ShimContainer {
    /// Changes how long an answer may take.
    pub(crate) fn set_patience(&self, patience: Duration) -> anyhow::Result<()> {
        self.connection.set_patience(patience)
    }

    pub(crate) fn create(
        &mut self,
        more: impl FnOnce(&mut api::CreateTaskRequest),
    ) -> anyhow::Result<()> {
        let mut request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.path().to_string_lossy().into_owned(),
            ..api::CreateTaskRequest::default()
        };
        more(&mut request);
        let created: api::CreateTaskResponse = self.connection.call("Create", &request)?;
        self.pid = created.pid;
        let request = api::WaitRequest {
            id: self.id.clone(),
            ..api::WaitRequest::default()
        };
        self.exit = Some(self.connection.send("Wait", &request)?);
        Ok(())
    }

    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        let request = api::StartRequest {
            id: self.id.clone(),
            ..api::StartRequest::default()
        };
        let _: api::StartResponse = self.connection.call("Start", &request)?;
        Ok(())
    }

    pub(crate) fn exec(&mut self) -> anyhow::Result<()> {
        let (id, exec_id) = (self.id.clone(), "e".to_owned());
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: true_process().to_string().into_bytes(),
            ..Any::default()
        };
        let request = api::ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            spec: MessageField::some(spec),
            ..api::ExecProcessRequest::default()
        };
        let _: api::Empty = self.connection.call("Exec", &request)?;
        let request = api::WaitRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            ..api::WaitRequest::default()
        };
        let exit: Pending<api::WaitResponse> = self.connection.send("Wait", &request)?;
        let request = api::StartRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            ..api::StartRequest::default()
        };
        let _: api::StartResponse = self.connection.call("Start", &request)?;
        let exit = self.connection.receive(&exit)?;
        if exit.exit_status != 0 {
            bail!("true ended with {}", exit.exit_status);
        }
        let request = api::DeleteRequest {
            id,
            exec_id,
            ..api::DeleteRequest::default()
        };
        let _: api::DeleteResponse = self.connection.call("Delete", &request)?;
        Ok(())
    }

    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        let request = api::KillRequest {
            id: self.id.clone(),
            signal: (Signal::SIGKILL as i32).unsigned_abs(),
            ..api::KillRequest::default()
        };
        let _: api::Empty = self.connection.call("Kill", &request)?;
        Ok(())
    }

    /// Waits until the answer to `Wait` says that it has ended.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        let exit = self.exit.take().context("nothing waits for the end")?;
        self.connection.receive(&exit)?;
        Ok(())
    }

    /// Takes the answer to `Wait` from the connection, to wait for many at once.
    pub(crate) fn take_exit(
        &mut self,
    ) -> anyhow::Result<(&mut Connection, Pending<api::WaitResponse>)> {
        let exit = self.exit.take().context("nothing waits for the end")?;
        Ok((&mut self.connection, exit))
    }

    /// The whole rest of a life that is not to be timed.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.kill()?;
        self.wait()?;
        self.delete()?;
        self.clean_up()?.remove()
    }

    pub(crate) fn delete(&mut self) -> anyhow::Result<()> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            ..api::DeleteRequest::default()
        };
        let _: api::DeleteResponse = self.connection.call("Delete", &request)?;
        Ok(())
    }

    pub(crate) fn state(&mut self) -> anyhow::Result<api::StateResponse> {
        let request = self.state_request();
        self.connection.call("State", &request)
    }

    /// Asks for the state, to wait for many answers at once.
    pub(crate) fn ask_state(
        &mut self,
    ) -> anyhow::Result<(&mut Connection, Pending<api::StateResponse>)> {
        let request = self.state_request();
        let pending = self.connection.send("State", &request)?;
        Ok((&mut self.connection, pending))
    }

    fn state_request(&self) -> api::StateRequest {
        api::StateRequest {
            id: self.id.clone(),
            ..api::StateRequest::default()
        }
    }

    /// The init's number.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn shim_pid(&mut self) -> anyhow::Result<u32> {
        let request = api::ConnectRequest {
            id: self.id.clone(),
            ..api::ConnectRequest::default()
        };
        let connected: api::ConnectResponse = self.connection.call("Connect", &request)?;
        Ok(connected.shim_pid)
    }

    /// `Shutdown`, to which a shim may end without an answer; the end of the connection; and the
    /// launcher.
    pub(crate) fn clean_up(mut self) -> anyhow::Result<Bundle> {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            ..api::ShutdownRequest::default()
        };
        let _: anyhow::Result<api::Empty> = self.connection.call("Shutdown", &request);
        drop(self.connection);
        self.launcher.delete()?;
        Ok(self.bundle)
    }
}

/// Makes a container one of another OCI runtime.
pub(crate) fn fake_runtime(program: &Path) -> impl FnOnce(&mut api::CreateTaskRequest) {
    let options = Options {
        binary_name: program.to_string_lossy().into_owned(),
        ..Options::default()
    };
    let any = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    };
    move |request| request.options = MessageField::some(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_print_an_address_or_json() {
        let parsed = |said| parse_address(said).ok();
        let path = PathBuf::from("/run/s/1");
        assert_eq!(
            parsed("unix:///run/s/1\n"),
            Some((path.clone(), Version::V2))
        );
        let json = r#"{"version":3,"address":"unix:///run/s/1","protocol":"ttrpc"}"#;
        assert_eq!(parsed(json), Some((path.clone(), Version::V3)));
        let json = r#"{"version":2,"address":"unix:///run/s/1","protocol":"ttrpc"}"#;
        assert_eq!(parsed(json), Some((path, Version::V2)));
        assert_eq!(parsed("a complaint"), None);
    }
}
