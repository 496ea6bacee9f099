//! [`Cri`]: containerd as kubelet speaks to it. Blocking, since tests are.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use k8s_cri::v1 as api;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use testbed::image;
use testbed::sandbox::{PATIENCE, Sandbox, until};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};

use crate::streaming::Streaming;

/// A connection to the CRI of a sandbox's containerd.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    cgroup_parent: String,
    logs: String,
}

/// What `exec_sync` answered.
#[derive(Debug)]
pub struct Executed {
    /// The exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
}

impl Cri {
    /// Connects to the containerd of a sandbox that was configured with [`Sandbox::enable_cri`] and
    /// has the image. Returns when the CRI has noticed that: it learns of images by events, and
    /// after its start by looking through them in the background.
    pub fn connect(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let address = format!("unix:{}", sandbox.directory().join("c.sock").display());
        let endpoint = Endpoint::from_shared(address)?
            .connect_timeout(PATIENCE)
            .timeout(PATIENCE);
        let channel = runtime
            .block_on(endpoint.connect())
            .context("cannot connect to the CRI")?;
        let mut images = ImageServiceClient::new(channel.clone());
        until("the CRI knows the image", || {
            let request = api::ImageStatusRequest {
                image: Some(api::ImageSpec {
                    image: image::NAME.into(),
                    ..api::ImageSpec::default()
                }),
                verbose: false,
            };
            let answer = runtime.block_on(images.image_status(request));
            Ok(answer.is_ok_and(|answer| answer.into_inner().image.is_some()))
        })?;
        Ok(Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
            cgroup_parent: format!("/{}", sandbox.namespace()),
            logs: sandbox
                .directory()
                .join("logs")
                .to_string_lossy()
                .into_owned(),
        })
    }

    fn pod(&self, name: &str, namespaces: Namespaces) -> api::PodSandboxConfig {
        let options = namespaces.option();
        let context = api::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..api::LinuxSandboxSecurityContext::default()
        };
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            log_directory: self.logs.clone(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(context),
                ..api::LinuxPodSandboxConfig::default()
            }),
            ..api::PodSandboxConfig::default()
        }
    }

    /// Starts a pod with one of the configured runtime handlers.
    pub fn run_pod(
        &mut self,
        name: &str,
        handler: &str,
        namespaces: Namespaces,
    ) -> anyhow::Result<Pod> {
        self.run_pod_with(name, handler, namespaces, |_| {})
    }

    /// Starts a pod of this configuration, which a test has changed.
    pub fn run_pod_with(
        &mut self,
        name: &str,
        handler: &str,
        namespaces: Namespaces,
        change: impl FnOnce(&mut api::PodSandboxConfig),
    ) -> anyhow::Result<Pod> {
        let mut config = self.pod(name, namespaces);
        change(&mut config);
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let response = self
            .runtime
            .block_on(self.client.run_pod_sandbox(request))?;
        Ok(Pod {
            id: response.into_inner().pod_sandbox_id,
            config,
            namespaces,
        })
    }

    /// Creates and starts a container that has capabilities beyond those that all have.
    pub fn run_capable(
        &mut self,
        pod: &Pod,
        name: &str,
        capabilities: &[&str],
        command: &[&str],
    ) -> anyhow::Result<String> {
        let mut config = container(pod, name, 0, command);
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.capabilities = Some(api::Capability {
            add_capabilities: capabilities.iter().map(|&name| name.to_owned()).collect(),
            ..api::Capability::default()
        });
        self.start(pod, config)
    }

    /// Creates and starts a container in a pod.
    pub fn run_container(
        &mut self,
        pod: &Pod,
        name: &str,
        attempt: u32,
        command: &[&str],
    ) -> anyhow::Result<String> {
        let config = container(pod, name, attempt, command);
        self.start(pod, config)
    }

    /// The same with a standard input, to attach to.
    pub fn run_interactive(
        &mut self,
        pod: &Pod,
        name: &str,
        command: &[&str],
    ) -> anyhow::Result<String> {
        let mut config = container(pod, name, 0, command);
        config.stdin = true;
        self.start(pod, config)
    }

    /// The same with a directory of the host, read-only with all that is mounted in it.
    pub fn run_with_volume(
        &mut self,
        pod: &Pod,
        name: &str,
        (host, at): (&Path, &str),
        command: &[&str],
    ) -> anyhow::Result<String> {
        let mut config = container(pod, name, 0, command);
        config.mounts = vec![api::Mount {
            container_path: at.into(),
            host_path: host.to_string_lossy().into_owned(),
            readonly: true,
            recursive_read_only: true,
            propagation: api::MountPropagation::PropagationPrivate.into(),
            ..api::Mount::default()
        }];
        self.start(pod, config)
    }

    fn start(&mut self, pod: &Pod, config: api::ContainerConfig) -> anyhow::Result<String> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = self
            .runtime
            .block_on(self.client.create_container(request))?
            .into_inner()
            .container_id;
        let request = api::StartContainerRequest {
            container_id: id.clone(),
        };
        self.runtime
            .block_on(self.client.start_container(request))?;
        Ok(id)
    }

    /// What containerd offers kubelet of a runtime handler; nothing before 2.0, which does not
    /// tell.
    pub fn features(
        &mut self,
        handler: &str,
    ) -> anyhow::Result<Option<api::RuntimeHandlerFeatures>> {
        let request = api::StatusRequest { verbose: false };
        let status = self.runtime.block_on(self.client.status(request))?;
        let handlers = status.into_inner().runtime_handlers;
        let of = handlers.into_iter().find(|of| of.name == handler);
        Ok(of.and_then(|of| of.features))
    }

    /// The status of a container.
    pub fn status(&mut self, id: &str) -> anyhow::Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let response = self
            .runtime
            .block_on(self.client.container_status(request))?;
        response.into_inner().status.context("no status")
    }

    /// Runs a command in a container, as a probe does.
    pub fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<Executed, tonic::Status> {
        let request = api::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        };
        let response = self
            .runtime
            .block_on(self.client.exec_sync(request))?
            .into_inner();
        Ok(Executed {
            code: response.exit_code,
            stdout: String::from_utf8_lossy(&response.stdout).into_owned(),
        })
    }

    /// The memory that a container uses, in bytes.
    pub fn memory(&mut self, id: &str) -> anyhow::Result<u64> {
        let request = api::ContainerStatsRequest {
            container_id: id.into(),
        };
        let stats = self
            .runtime
            .block_on(self.client.container_stats(request))?
            .into_inner()
            .stats;
        let memory = stats.context("no stats")?.memory.context("no memory")?;
        Ok(memory.working_set_bytes.context("no working set")?.value)
    }

    /// What a pod uses, as `kubectl top` and the eviction manager see it.
    pub fn pod_usage(&mut self, pod: &Pod) -> anyhow::Result<api::LinuxPodSandboxStats> {
        let request = api::PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let response = self
            .runtime
            .block_on(self.client.pod_sandbox_stats(request))?;
        let stats = response.into_inner().stats.context("no stats")?;
        stats.linux.context("no stats of Linux")
    }

    /// The address of a pod with a network of its own.
    pub fn address(&mut self, pod: &Pod) -> anyhow::Result<String> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let response = self
            .runtime
            .block_on(self.client.pod_sandbox_status(request))?;
        let status = response.into_inner().status.context("no status")?;
        Ok(status.network.context("no network")?.ip)
    }

    /// `kubectl exec`: a command with its streams.
    pub fn exec_streaming(
        &mut self,
        id: &str,
        command: &[&str],
        tty: bool,
    ) -> anyhow::Result<Streaming> {
        let request = api::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let response = self.runtime.block_on(self.client.exec(request))?;
        Streaming::open(&response.into_inner().url)
    }

    /// `kubectl attach`: the streams of a container's init.
    pub fn attach(&mut self, id: &str) -> anyhow::Result<Streaming> {
        let request = api::AttachRequest {
            container_id: id.into(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        let response = self.runtime.block_on(self.client.attach(request))?;
        Streaming::open(&response.into_inner().url)
    }

    /// Stops a container: SIGTERM, and SIGKILL after `grace`.
    pub fn stop(&mut self, id: &str, grace: Duration) -> anyhow::Result<()> {
        let timeout = i64::try_from(grace.as_secs())?;
        let request = api::StopContainerRequest {
            container_id: id.into(),
            timeout,
        };
        self.runtime.block_on(self.client.stop_container(request))?;
        Ok(())
    }

    /// Writes a checkpoint of a container, as an archive, and lets it run on.
    pub fn checkpoint(&mut self, id: &str, archive: &Path) -> anyhow::Result<()> {
        let request = api::CheckpointContainerRequest {
            container_id: id.into(),
            location: archive.to_string_lossy().into_owned(),
            timeout: 0,
        };
        self.runtime
            .block_on(self.client.checkpoint_container(request))?;
        Ok(())
    }

    /// Removes a container.
    pub fn remove(&mut self, id: &str) -> anyhow::Result<()> {
        let request = api::RemoveContainerRequest {
            container_id: id.into(),
        };
        self.runtime
            .block_on(self.client.remove_container(request))?;
        Ok(())
    }

    /// Stops and removes a pod with all its containers.
    pub fn remove_pod(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime
            .block_on(self.client.stop_pod_sandbox(request))?;
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime
            .block_on(self.client.remove_pod_sandbox(request))?;
        Ok(())
    }

    /// Stops a pod with all its containers.
    pub fn stop_pod(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime
            .block_on(self.client.stop_pod_sandbox(request))?;
        Ok(())
    }

    /// Whether a pod is ready, as the list says and as its status says.
    pub fn is_ready(&mut self, pod: &Pod) -> anyhow::Result<(bool, bool)> {
        let ready = i32::from(api::PodSandboxState::SandboxReady);
        let request = api::ListPodSandboxRequest::default();
        let listed = self
            .runtime
            .block_on(self.client.list_pod_sandbox(request))?;
        let listed = listed.into_inner().items;
        let listed = listed.iter().find(|listed| listed.id == pod.id);
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let response = self
            .runtime
            .block_on(self.client.pod_sandbox_status(request))?;
        let status = response.into_inner().status.context("no status")?;
        let listed = listed.context("the pod is not listed")?;
        Ok((listed.state == ready, status.state == ready))
    }

    /// The log file of a container.
    pub fn log(&self, name: &str, attempt: u32) -> String {
        let path = Path::new(&self.logs).join(format!("{name}.{attempt}.log"));
        std::fs::read_to_string(path).unwrap_or_default()
    }
}

fn container(pod: &Pod, name: &str, attempt: u32, command: &[&str]) -> api::ContainerConfig {
    let context = api::LinuxContainerSecurityContext {
        namespace_options: Some(pod.namespaces.option()),
        ..api::LinuxContainerSecurityContext::default()
    };
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata {
            name: name.into(),
            attempt,
        }),
        image: Some(api::ImageSpec {
            image: image::NAME.into(),
            ..api::ImageSpec::default()
        }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.{attempt}.log"),
        linux: Some(api::LinuxContainerConfig {
            security_context: Some(context),
            ..api::LinuxContainerConfig::default()
        }),
        ..api::ContainerConfig::default()
    }
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// Its sandbox's id.
    pub id: String,
    config: api::PodSandboxConfig,
    namespaces: Namespaces,
}

/// Which namespaces a pod has of its own, and its containers.
#[derive(Clone, Copy, Debug)]
pub struct Namespaces {
    /// The host's network, which needs no CNI, or one of the pod's.
    pub network: api::NamespaceMode,
    /// One for each container, or one for all.
    pub pid: api::NamespaceMode,
    /// The host's first of the 65536 users and groups that a pod has in a user namespace of its
    /// own.
    pub users: Option<u32>,
}

impl Namespaces {
    /// The host's network, and every container alone with its processes.
    pub const SIMPLE: Self = Self {
        network: api::NamespaceMode::Node,
        pid: api::NamespaceMode::Container,
        users: None,
    };

    fn option(self) -> api::NamespaceOption {
        let userns_options = self.users.map(|host_id| {
            let mapping = api::IdMapping {
                host_id,
                container_id: 0,
                length: 1 << 16,
            };
            api::UserNamespace {
                mode: api::NamespaceMode::Pod.into(),
                uids: vec![mapping],
                gids: vec![mapping],
            }
        });
        api::NamespaceOption {
            network: self.network.into(),
            pid: self.pid.into(),
            userns_options,
            ..api::NamespaceOption::default()
        }
    }
}
