//! The configuration of a sandbox's containerd, with the CRI or without.

use std::fs;
use std::path::Path;

use anyhow::ensure;

use super::{EMBEDSHIM, PATIENCE, RUNC_V2, Running, Sandbox};
use crate::image;

/// Plugins that need what is not there, or write where they must not.
const NEVER: &str = r#""io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs""#;
const CRI: &str = r#""io.containerd.grpc.v1.cri", "#;

impl Sandbox {
    pub(super) fn write_config(&self, with_cri: bool) -> anyhow::Result<()> {
        let directory = self.directory.display();
        let without = if with_cri { "" } else { CRI };
        let mut config = format!(
            "version = 2\nroot = \"{directory}/root\"\nstate = \"{directory}/state\"\n\
             disabled_plugins = [{without}{NEVER}]\n[grpc]\naddress = \"{directory}/c.sock\"\n"
        );
        if with_cri {
            config.push_str(&self.cri());
        }
        Ok(fs::write(self.directory.join("containerd.toml"), config)?)
    }

    /// The CRI with two handlers: `embed` by our own runtime type, `path` by runc-v2's with the path of our launcher.
    fn cri(&self) -> String {
        let launcher = self.binaries.join("containerd-shim-embed-v1");
        let (launcher, directory, image) =
            (launcher.display(), self.directory.display(), image::NAME);
        format!(
            r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "embed"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.embed]
      runtime_type = "{EMBEDSHIM}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.path]
      runtime_type = "{RUNC_V2}"
      runtime_path = "{launcher}"
"#
        )
    }

    /// Configures the CRI for the next start of containerd.
    pub fn enable_cri(&mut self) -> anyhow::Result<()> {
        self.write_config(true)
    }

    /// Puts the image where kubelet's containers look for it.
    pub fn import_for_kubernetes(&self, archive: &Path) -> anyhow::Result<()> {
        let mut import = self.ctr(["--namespace", "k8s.io", "image", "import"]);
        let finished = Running::capture(import.arg(archive))?.finish(PATIENCE)?;
        ensure!(finished.code == Some(0), "{}", finished.stderr);
        Ok(())
    }
}
