//! The release's `install.sh`, on a system without systemd: it installs, replaces under a running
//! container, refuses to strand one, and leaves nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::sys::signal::Signal;
use testbed::products::workspace;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 3] = tests!(WithoutContainerd:
    an_installation_is_replaced_under_a_container_and_removed_without_a_trace,
    a_damaged_archive_installs_nothing,
    an_archive_for_another_processor_installs_nothing,
);

/// The unpacked archive, made of the programs under test.
fn unpacked(stage: &Stage, sandbox: &Sandbox) -> anyhow::Result<PathBuf> {
    let tree = sandbox.directory().join("dist");
    for directory in ["bin", "systemd", "share/doc/embedshim"] {
        fs::create_dir_all(tree.join(directory))?;
    }
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
            workspace().join("docs/operating.md"),
            "share/doc/embedshim/operating.md",
        ),
    ] {
        fs::copy(&source, tree.join(target)).with_context(|| source.display().to_string())?;
    }
    write_checksums(&tree)?;
    Ok(tree)
}

fn write_checksums(tree: &Path) -> anyhow::Result<()> {
    let mut sums = Command::new("sh");
    let script = "rm -f SHA256SUMS && sha256sum $(find * -type f) > ../sums && \
                  mv ../sums SHA256SUMS";
    sums.args(["-c", script]).current_dir(tree);
    ensure!(sums.status()?.success(), "{sums:?}");
    Ok(())
}

fn script(sandbox: &Sandbox, tree: &Path, words: &[&str]) -> anyhow::Result<Finished> {
    let mut command = Command::new("sh");
    command
        .arg(tree.join("install.sh"))
        .args(["--no-systemd", "--prefix"])
        .arg(sandbox.directory().join("prefix"))
        .args(words)
        .env("EMBEDSHIM_STATE_DIR", sandbox.state_dir())
        .env(
            "EMBEDSHIM_CONFIG",
            sandbox.directory().join("etc/config.toml"),
        )
        .stdin(Stdio::null());
    Running::capture(&mut command)?.finish(PATIENCE * 2)
}

fn files_below(directory: &Path) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.insert(path);
        }
    }
    files
}

fn an_installation_is_replaced_under_a_container_and_removed_without_a_trace(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let tree = unpacked(stage, &sandbox)?;
    let prefix = sandbox.directory().join("prefix");
    let installed = script(&sandbox, &tree, &[])?;
    ensure!(installed.code == Some(0), "{installed:?}");
    let program = prefix.join("bin/embedshimd");
    let mode = fs::metadata(&program)?.permissions().mode();
    ensure!(mode & 0o7777 == 0o755, "{mode:o}");

    sandbox.start_daemon_of(&program)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    let pid = i32::try_from(shim.start("c")?)?;
    let before = sandbox.daemon_pid();
    let replaced = script(&sandbox, &tree, &[])?;
    ensure!(
        replaced.code == Some(0) && replaced.stdout.contains("is replaced by"),
        "{replaced:?}"
    );
    ensure!(
        is_alive(pid) && sandbox.daemon_pid() != before,
        "not replaced"
    );

    let refused = script(&sandbox, &tree, &["--remove"])?;
    ensure!(
        refused.code == Some(1) && refused.stderr.contains("1 containers or pods"),
        "{refused:?}"
    );
    ensure!(program.exists() && is_alive(pid), "it was removed");
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    let removed = script(&sandbox, &tree, &["--remove"])?;
    ensure!(removed.code == Some(0), "{removed:?}");
    until("daemon and keeper end", || {
        Ok(sandbox.daemon_pid().is_none() && sandbox.keeper_pid().is_none())
    })?;
    let left = files_below(&prefix);
    ensure!(left.is_empty(), "{left:?}");
    ensure!(
        sandbox.directory().join("etc/config.toml").exists(),
        "the configuration stays"
    );
    Ok(())
}

fn a_damaged_archive_installs_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let tree = unpacked(stage, &sandbox)?;
    fs::write(tree.join("bin/embedshimd"), "something else")?;
    let refused = script(&sandbox, &tree, &[])?;
    ensure!(
        refused.code == Some(1) && refused.stderr.contains("checksums"),
        "{refused:?}"
    );
    let left = files_below(&sandbox.directory().join("prefix"));
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Its programs would take the place of those that run.
fn an_archive_for_another_processor_installs_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let tree = unpacked(stage, &sandbox)?;
    let program = tree.join("bin/containerd-shim-embed-v1");
    let mut bytes = fs::read(&program)?;
    // The machine in the header of an ELF file.
    let machine = bytes.get_mut(18..20).context("too short")?;
    machine.copy_from_slice(&0xfefe_u16.to_le_bytes());
    fs::write(&program, bytes)?;
    write_checksums(&tree)?;
    let refused = script(&sandbox, &tree, &[])?;
    ensure!(
        refused.code == Some(1) && refused.stderr.contains("does not run on this machine"),
        "{refused:?}"
    );
    let left = files_below(&sandbox.directory().join("prefix"));
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
