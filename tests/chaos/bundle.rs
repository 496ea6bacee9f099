//! [`Bundles`]: bundles that cost next to nothing: one specification that is made once, one root
//! file system for all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use serde_json::{Value, json};
use shim_api::bundle::BundleNote;

use crate::logger::Logger;
use crate::plan::{Life, Rootfs};

/// What all bundles have in common.
#[derive(Debug)]
pub(crate) struct Bundles {
    directory: PathBuf,
    rootfs: PathBuf,
    namespace: String,
    events: PathBuf,
    template: Value,
    pub(crate) logger: Logger,
}

/// One bundle, and what the request to create its container says.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) path: PathBuf,
    pub(crate) mounts: Vec<api::Mount>,
}

impl Bundles {
    /// Bundles below `directory`, whose events go to `events`.
    pub(crate) fn new(
        directory: &Path,
        rootfs: &Path,
        namespace: &str,
        events: &Path,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let output = Command::new("runc")
            .arg("spec")
            .current_dir(directory)
            .output()
            .context("cannot run runc")?;
        ensure!(
            output.status.success(),
            "runc spec: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let path = directory.join("config.json");
        let template = serde_json::from_slice(&fs::read(&path)?)?;
        fs::remove_file(path)?;
        Ok(Self {
            directory: directory.into(),
            rootfs: rootfs.into(),
            namespace: namespace.into(),
            events: events.into(),
            template,
            logger: Logger::install(directory)?,
        })
    }

    /// Where the bundle of a container is.
    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Makes the bundle of a container, in a pod if that is told.
    pub(crate) fn make(&self, id: &str, life: &Life, pod: Option<&Joined>) -> anyhow::Result<Made> {
        let path = self.path(id);
        fs::create_dir_all(path.join("rootfs"))?;
        let (root, mounts) = match life.rootfs {
            Rootfs::Shared => (self.rootfs.clone(), Vec::new()),
            Rootfs::Bind => ("rootfs".into(), vec![self.bind()]),
            Rootfs::Overlay => ("rootfs".into(), vec![self.overlay(&path)?]),
        };
        let mut spec = self.template.clone();
        set(&mut spec, "/process/args", json!(life.init.arguments()));
        set(
            &mut spec,
            "/process/terminal",
            json!(life.init.streams.terminal),
        );
        set(&mut spec, "/root/path", json!(root));
        set(
            &mut spec,
            "/root/readonly",
            json!(life.rootfs == Rootfs::Shared),
        );
        if let Some(linux) = spec.pointer_mut("/linux").and_then(Value::as_object_mut) {
            let cgroup = format!("/{}/{id}", self.namespace);
            linux.insert("cgroupsPath".into(), json!(cgroup));
        }
        if life.is_checkpointed {
            edit_namespaces(&mut spec, |namespaces| {
                // CRIU locks its network by iptables, which is not what is tested here.
                namespaces.retain(|namespace| namespace.get("type") != Some(&json!("network")));
            });
        }
        if let Some(pod) = pod {
            pod.put_into(&mut spec);
        }
        fs::write(path.join("config.json"), spec.to_string())?;
        if let Some(pod) = pod.filter(|pod| pod.pid == Some(0)) {
            // containerd executes no launcher for it, which would leave a note.
            fs::write(path.join("sandbox"), &pod.id)?;
        } else {
            self.note(&path)?;
        }
        Ok(Made { path, mounts })
    }

    /// As the launcher leaves it.
    fn note(&self, bundle: &Path) -> anyhow::Result<()> {
        let note = BundleNote {
            namespace: self.namespace.clone(),
            events: self.events.display().to_string(),
            ..BundleNote::default()
        };
        Ok(note.write(bundle)?)
    }

    fn bind(&self) -> api::Mount {
        mount("bind", &self.rootfs.display().to_string(), &["rbind", "ro"])
    }

    fn overlay(&self, bundle: &Path) -> anyhow::Result<api::Mount> {
        for directory in ["upper", "work"] {
            fs::create_dir_all(bundle.join(directory))?;
        }
        let options = [
            format!("lowerdir={}", self.rootfs.display()),
            format!("upperdir={}", bundle.join("upper").display()),
            format!("workdir={}", bundle.join("work").display()),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Ok(mount("overlay", "overlay", &options))
    }

    /// Removes the bundle of a container that is gone. The error names what is left in it.
    pub(crate) fn remove(&self, id: &str) -> anyhow::Result<()> {
        let path = self.path(id);
        fs::remove_dir_all(&path).with_context(|| {
            let left = Command::new("find")
                .arg(&path)
                .args(["-printf", "%P %Tc; "])
                .output();
            let left = left.map(|output| output.stdout).unwrap_or_default();
            let left = String::from_utf8_lossy(&left);
            format!("cannot remove {} ({left})", path.display())
        })
    }
}

/// The first container of a pod, as the others join it.
#[derive(Clone, Debug)]
pub(crate) struct Joined {
    pub(crate) id: String,
    /// None for the first container itself; 0 for a pod of our sandbox controller.
    pub(crate) pid: Option<u32>,
    pub(crate) shares_pids: bool,
}

impl Joined {
    /// As the CRI plugin does: the namespaces of the first one, and annotations.
    fn put_into(&self, spec: &mut Value) {
        let kind = if self.pid.is_some() {
            "container"
        } else {
            "sandbox"
        };
        let annotations = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": self.id,
        });
        if let Some(spec) = spec.as_object_mut() {
            spec.insert("annotations".into(), annotations);
            // The pod has a name.
            spec.remove("hostname");
        }
        let Some(pid) = self.pid else { return };
        edit_namespaces(spec, |namespaces| {
            for namespace in namespaces {
                let file = match namespace.get("type").and_then(Value::as_str) {
                    Some("network") => "net",
                    Some("ipc") => "ipc",
                    Some("uts") => "uts",
                    Some("pid") if self.shares_pids => "pid",
                    _ => continue,
                };
                if let Some(namespace) = namespace.as_object_mut() {
                    let path = format!("/proc/{pid}/ns/{file}");
                    namespace.insert("path".into(), json!(path));
                }
            }
        });
    }
}

fn edit_namespaces(spec: &mut Value, edit: impl FnOnce(&mut Vec<Value>)) {
    let namespaces = spec.pointer_mut("/linux/namespaces");
    if let Some(namespaces) = namespaces.and_then(Value::as_array_mut) {
        edit(namespaces);
    }
}

fn mount(kind: &str, source: &str, options: &[&str]) -> api::Mount {
    api::Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..api::Mount::default()
    }
}

fn set(spec: &mut Value, pointer: &str, value: Value) {
    if let Some(place) = spec.pointer_mut(pointer) {
        *place = value;
    }
}
