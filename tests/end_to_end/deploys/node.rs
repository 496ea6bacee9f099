//! [`Node`]: a node of a cluster without systemd, in namespaces of its own, with a real containerd
//! whose configuration a test writes. Owns the namespaces; all processes in them end with it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::Stage;
use testbed::machine;
use testbed::products::workspace;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, until};

/// The folder of the stand-ins.
const STAND_INS: &str = "tests/end_to_end/deploys";
/// containerd's configuration on the node.
pub(super) const CONFIG: &str = "/etc/containerd/config.toml";

/// One node.
pub(super) struct Node {
    sandbox: Sandbox,
    /// Its end is that of the namespaces.
    _init: Running,
    init_pid: i32,
    archive: PathBuf,
}

impl Node {
    /// A node whose containerd has this configuration, or none, and serves.
    pub(super) fn new(stage: &Stage, config: Option<&str>) -> anyhow::Result<Self> {
        let sandbox = stage.bare_sandbox()?;
        let upper = sandbox.directory().join("node");
        let programs = match stage.programs() {
            Some(directory) => directory,
            None => installed(&sandbox.directory().join("programs"))?,
        };
        let stand_ins = workspace().join(STAND_INS);
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg("sh")
            .arg(stand_ins.join("prepare.sh"))
            .args([&upper, &programs, &stand_ins])
            .stdin(Stdio::null());
        let init = Running::capture(&mut unshare)?;
        let mut init_pid = None;
        until("the node is prepared", || {
            init_pid = child_of(init.pid())?;
            Ok(init_pid.is_some_and(is_prepared))
        })?;
        let init_pid = init_pid.context("no first process")?;
        let archive = sandbox.directory().join("archive");
        write_archive(stage, &archive)?;
        let node = Self {
            sandbox,
            _init: init,
            init_pid,
            archive,
        };
        if let Some(config) = config {
            node.write(CONFIG, config)?;
        }
        node.succeed("systemctl restart containerd.service && rm /run/stand-in/restarts")?;
        Ok(node)
    }

    /// Runs a line of shell on the node.
    pub(super) fn run(&self, line: &str) -> anyhow::Result<Finished> {
        let mut command = Command::new("nsenter");
        command
            .args(["--mount", "--pid", "--target"])
            .arg(self.init_pid.to_string())
            // A process group of its own, which a step may kill.
            .args(["--", "setsid", "--wait", "sh", "-c", line])
            .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null());
        Running::capture(&mut command)?.finish(PATIENCE * 4)
    }

    /// The same, and it must not fail. Returns what it prints.
    pub(super) fn succeed(&self, line: &str) -> anyhow::Result<String> {
        let finished = self.run(line)?;
        ensure!(finished.code == Some(0), "{line}: {finished:?}");
        Ok(finished.stdout)
    }

    /// Runs `deploy.sh` on the node, which must end with this code. Returns all that it says.
    pub(super) fn deploy(&self, arguments: &str, code: i32) -> anyhow::Result<String> {
        let script = self.archive.join("kubernetes/deploy.sh");
        let finished = self.run(&format!("{} {arguments}", script.display()))?;
        ensure!(
            finished.code == Some(code),
            "{arguments}, not {code}: {finished:?}"
        );
        Ok(finished.stdout + &finished.stderr)
    }

    /// Where the archive is, on the node as well.
    pub(super) fn archive(&self) -> &Path {
        &self.archive
    }

    /// Makes another version of the archive.
    pub(super) fn change_archive(&self) -> anyhow::Result<()> {
        let file = self.archive.join("share/doc/embedshim/new.md");
        let before = fs::read_to_string(&file).unwrap_or_default();
        fs::write(file, before + "new\n")?;
        write_checksums(&self.archive)
    }

    /// Writes a file of the node.
    pub(super) fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let from = self.sandbox.directory().join("written");
        fs::write(&from, text)?;
        self.succeed(&format!("cat {} > {path}", from.display()))?;
        Ok(())
    }

    /// Every file that the deployment can write, with its checksum, mode and owner.
    pub(super) fn files(&self) -> anyhow::Result<String> {
        self.succeed(
            "for file in $(find /etc/containerd /etc/embedshim /etc/systemd/system/embedshimd.* \
             /opt/embedshim /run/embedshim 2>/dev/null | sort); do \
             echo \"$(stat -c '%n %F %a %u:%g' $file) $([ ! -f $file ] || sha256sum < $file)\"; done; \
             ls /run/stand-in/active /run/stand-in/enabled 2>/dev/null; true",
        )
    }

    /// Fails, and says which files differ, unless all are as they were.
    pub(super) fn expect_files(&self, before: &str, when: &str) -> anyhow::Result<()> {
        let after = self.files()?;
        let differing = |from: &str, other: &str| -> Vec<String> {
            let lines = from
                .lines()
                .filter(|line| !other.lines().any(|it| it == *line));
            lines.map(str::to_owned).collect()
        };
        let (gone, new) = (differing(before, &after), differing(&after, before));
        ensure!(
            gone.is_empty() && new.is_empty(),
            "{when}: gone {gone:#?}, new {new:#?}"
        );
        Ok(())
    }

    /// How often containerd was restarted.
    pub(super) fn restarts(&self) -> anyhow::Result<usize> {
        let text = self.succeed("cat /run/stand-in/restarts 2>/dev/null; true")?;
        Ok(text.lines().count())
    }
}

/// The installed programs by the names that another release's have.
fn installed(directory: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(directory)?;
    for name in ["containerd", "ctr"] {
        let program = machine::find_on_path(name).with_context(|| name.to_owned())?;
        symlink(program, directory.join(name))?;
    }
    Ok(directory.to_owned())
}

fn child_of(pid: i32) -> anyhow::Result<Option<i32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(children
        .split_whitespace()
        .next()
        .map(str::parse)
        .transpose()?)
}

fn is_prepared(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
}

/// The release's archive with the programs under test.
fn write_archive(stage: &Stage, tree: &Path) -> anyhow::Result<()> {
    let packaging = workspace().join("packaging");
    for (source, target) in [
        (stage.binary("embedshimd"), "bin/embedshimd"),
        (
            stage.binary("containerd-shim-embed-v1"),
            "bin/containerd-shim-embed-v1",
        ),
        (packaging.join("install.sh"), "install.sh"),
        (packaging.join("config.toml"), "config.toml"),
        (
            packaging.join("embedshimd.service"),
            "systemd/embedshimd.service",
        ),
        (
            packaging.join("embedshimd.socket"),
            "systemd/embedshimd.socket",
        ),
        (
            packaging.join("kubernetes/deploy.sh"),
            "kubernetes/deploy.sh",
        ),
        (
            workspace().join("docs/operating.md"),
            "share/doc/embedshim/operating.md",
        ),
    ] {
        let target = tree.join(target);
        fs::create_dir_all(target.parent().context("no directory")?)?;
        fs::copy(&source, target).with_context(|| source.display().to_string())?;
    }
    write_checksums(tree)
}

fn write_checksums(tree: &Path) -> anyhow::Result<()> {
    let script = "rm -f SHA256SUMS && sha256sum $(find * -type f) > ../sums && \
                  mv ../sums SHA256SUMS";
    let mut sums = Command::new("sh");
    sums.args(["-c", script]).current_dir(tree);
    ensure!(sums.status()?.success(), "{sums:?}");
    Ok(())
}
