//! The configuration of a sandbox's containerd, with the CRI or without.

use std::fs;
use std::path::Path;

use anyhow::ensure;

use super::{EMBEDSHIM, PATIENCE, RUNC_V2, Running, Sandbox};
use crate::image;
use crate::machine::CNI_PLUGINS;

/// Plugins that need what is not there, or write where they must not.
const NEVER: &str = r#""io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs""#;
/// Of the range for documentation: no machine has it.
const SUBNET: &str = "192.0.2.0/24";
/// Unless it is asked for.
const NRI: &str = r#""io.containerd.nri.v1.nri", "#;
const CRI: &str = r#""io.containerd.grpc.v1.cri", "#;

impl Sandbox {
    pub(super) fn write_config(&self, with_cri: bool) -> anyhow::Result<()> {
        let directory = self.directory.display();
        let cri = if with_cri { "" } else { CRI };
        let nri = if self.has_nri { "" } else { NRI };
        let mut config = format!(
            "version = 2\nroot = \"{directory}/root\"\nstate = \"{directory}/state\"\n\
             disabled_plugins = [{cri}{nri}{NEVER}]\n[grpc]\naddress = \"{directory}/c.sock\"\n"
        );
        if with_cri {
            config.push_str(&self.cri());
        }
        config.push_str(&self.plugins());
        Ok(fs::write(self.directory.join("containerd.toml"), config)?)
    }

    /// The Node Resource Interface.
    fn plugins(&self) -> String {
        if !self.has_nri {
            return String::new();
        }
        let directory = self.directory.display();
        format!(
            r#"[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{directory}/nri.sock"
  plugin_path = "{directory}/nri"
  plugin_config_path = "{directory}/nri"
"#
        )
    }

    /// The CRI with three handlers: `embed` by our own runtime type, `path` by runc-v2's with the
    /// path of our launcher, `runc-v2` by its own; and `pauseless` by our sandbox controller, after
    /// [`Sandbox::enable_sandboxer`].
    fn cri(&self) -> String {
        let launcher = self.binaries.join("containerd-shim-embed-v1");
        let options = |handler| self.options(handler);
        let [embed, path, runc_v2] = ["embed", "path", "runc-v2"].map(options);
        let pauseless = self.sandboxer();
        let (launcher, directory, image) =
            (launcher.display(), self.directory.display(), image::NAME);
        format!(
            r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "embed"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.embed]
      runtime_type = "{EMBEDSHIM}"
{embed}    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.path]
      runtime_type = "{RUNC_V2}"
      runtime_path = "{launcher}"
{path}    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-v2]
      runtime_type = "{RUNC_V2}"
{runc_v2}{pauseless}"#
        )
    }

    /// The options of a handler that name the OCI runtime, if it is not the installed one.
    fn options(&self, handler: &str) -> String {
        let binary = self.oci_runtime.as_ref();
        binary.map_or_else(String::new, |binary| {
            let table = format!(
                "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{handler}.options"
            );
            format!(
                "    [{table}]\n      BinaryName = \"{}\"\n",
                binary.display()
            )
        })
    }

    /// Our daemon as a sandbox controller, and the handler of its pods.
    fn sandboxer(&self) -> String {
        if !self.has_sandboxer {
            return String::new();
        }
        let socket = self.state_dir().join("pods.sock");
        format!(
            r#"    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.pauseless]
      runtime_type = "{RUNC_V2}"
      sandboxer = "embed"
{}[proxy_plugins.embed]
  type = "sandbox"
  address = "{}"
"#,
            self.options("pauseless"),
            socket.display()
        )
    }

    /// Configures daemon and containerd for pods without a pause container, from their next start
    /// on.
    pub fn enable_sandboxer(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.clone();
        let config = directory.join("embedshim.toml");
        let text = format!(
            "[sandbox]\nenabled = true\ncri_root = \"{0}/root/io.containerd.grpc.v1.cri\"\n\
             cri_state = \"{0}/state/io.containerd.grpc.v1.cri\"\n\
             containerd = \"{0}/c.sock\"\nevents = \"{0}/c.sock.ttrpc\"\n",
            directory.display()
        );
        fs::write(&config, text)?;
        self.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
        self.has_sandboxer = true;
        self.enable_cri()
    }

    /// Lets plugins of the Node Resource Interface connect to the next containerd, at `nri.sock`.
    pub fn enable_nri(&mut self) {
        self.has_nri = true;
    }

    /// Configures the CRI for the next start of containerd.
    pub fn enable_cri(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.join("cni");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("ptp.conflist"), self.network())?;
        self.write_config(true)
    }

    /// A network that has nothing in common with others: a pair of interfaces for each pod, which
    /// goes away with it.
    fn network(&self) -> String {
        let addresses = self.directory.join("addresses");
        format!(
            r#"{{"cniVersion": "0.4.0", "name": "{name}", "plugins": [{{"type": "ptp",
              "ipam": {{"type": "host-local", "subnet": "{SUBNET}", "dataDir": "{addresses}"}}}}]}}"#,
            name = self.namespace,
            addresses = addresses.display(),
        )
    }

    /// Puts the image where kubelet's containers look for it.
    pub fn import_for_kubernetes(&self, archive: &Path) -> anyhow::Result<()> {
        let mut import = self.ctr(["--namespace", "k8s.io", "image", "import"]);
        let finished = Running::capture(import.arg(archive))?.finish(PATIENCE)?;
        ensure!(finished.code == Some(0), "{}", finished.stderr);
        Ok(())
    }
}
