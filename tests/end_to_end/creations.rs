//! A creation that takes longer than its daemon lives: the container that the runtime has made is
//! taken over with its streams, not made again.

use std::fs;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, write_program};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::bootstrap::delete;
use crate::half_done::{SlowRuntime, terminal};
use crate::tests;

pub(crate) const TESTS: [Test; 5] = tests!(WithoutContainerd:
    a_creation_that_outlives_three_daemons_ends,
    a_creation_that_outlives_three_daemons_keeps_its_terminal,
    a_creation_that_outlives_three_daemons_keeps_its_log_file,
    a_creation_that_outlives_its_daemon_is_cleaned_up_if_containerd_gives_it_up,
    a_mount_helper_that_outlives_its_daemon_mounts_nothing_afterwards,
);

fn calls_of_create(sandbox: &Sandbox) -> usize {
    let calls = fs::read_to_string(sandbox.directory().join("calls")).unwrap_or_default();
    calls
        .lines()
        .filter(|call| call.contains(" create "))
        .count()
}

/// Kills three daemons while one `create` is under way, before or after the container is made.
fn outlive(stage: &Stage, is_terminal: bool, is_file: bool) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let sandbox = stage.bare_sandbox()?;
        sandbox.start_daemon()?;
        let shim = Shim::connect(&sandbox)?;
        let runtime = SlowRuntime::new(&sandbox, "create", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "echo it runs; exit 7"])?;
        if is_terminal {
            terminal(&bundle)?;
        }
        let stdout = sandbox.directory().join("out");
        let before = Footprint::of(&sandbox);
        let output = if is_file {
            None
        } else {
            mkfifo(&stdout, Mode::S_IRWXU)?;
            Some(Reader::of(stdout.clone()))
        };
        let pid = scope(|scope| {
            let request = scope.spawn(|| {
                shim.create_with("c", bundle.path(), |request| {
                    let scheme = if is_file { "file://" } else { "" };
                    request.stdout = format!("{scheme}{}", stdout.display());
                    request.terminal = is_terminal;
                    runtime.choose(request);
                })
            });
            let going = sandbox.directory().join("going");
            until("the runtime is in its call", || Ok(going.exists()))?;
            for _ in 0..3 {
                sandbox.kill_daemon()?;
            }
            fs::remove_file(&going)?;
            request
                .join()
                .ok()
                .context("a request panicked")?
                .context("Create")
        })?;
        ensure!(
            calls_of_create(&sandbox) == 1,
            "made {} times",
            calls_of_create(&sandbox)
        );
        ensure!(shim.start("c")? == pid, "another pid");
        ensure!(shim.wait("c")? == 7, "not 7");
        if let Some(output) = output {
            output.wait_for("it runs")?;
        }
        ensure!(shim.delete("c")? == 7, "not 7");
        if is_file {
            let written = fs::read_to_string(&stdout)?;
            ensure!(written == "it runs\n", "{written:?}");
        }
        before.wait_for_return(&sandbox)?;
    }
    Ok(())
}

fn a_creation_that_outlives_three_daemons_ends(stage: &Stage) -> anyhow::Result<()> {
    outlive(stage, false, false)
}

fn a_creation_that_outlives_three_daemons_keeps_its_terminal(stage: &Stage) -> anyhow::Result<()> {
    outlive(stage, true, false)
}

fn a_creation_that_outlives_three_daemons_keeps_its_log_file(stage: &Stage) -> anyhow::Result<()> {
    outlive(stage, false, true)
}

/// The clean-up waits for what becomes of the creation: it would leave what comes after it.
fn a_creation_that_outlives_its_daemon_is_cleaned_up_if_containerd_gives_it_up(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let runtime = SlowRuntime::new(&sandbox, "create", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    scope(|scope| {
        let request =
            scope.spawn(|| shim.create_with("c", bundle.path(), |request| runtime.choose(request)));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        sandbox.kill_daemon()?;
        let cleaning = scope.spawn(|| delete(stage, &sandbox, &bundle, "c"));
        fs::remove_file(&going)?;
        let cleaned = cleaning.join().ok().context("the clean-up panicked")??;
        ensure!(cleaned.exit_status == 137, "{cleaned:?}");
        drop(request.join());
        anyhow::Ok(())
    })?;
    ensure!(shim.state("c").is_err(), "it is still there");
    before.wait_for_return(&sandbox)
}

/// The creation is undone and done again, with another helper. The first one would mount over what
/// that has mounted, or into a bundle that is no more.
fn a_mount_helper_that_outlives_its_daemon_mounts_nothing_afterwards(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    let (programs, directory) = (
        sandbox.directory().join("programs"),
        sandbox.directory().to_owned(),
    );
    fs::create_dir(&programs)?;
    let going = directory.join("going");
    // Not the shell itself but a child of it does the work, as a script may have it.
    let helper = format!(
        "#!/bin/sh\nif mkdir {0}/once 2>/dev/null; then\n\
         (echo $$ >{0}/pid; mv {0}/pid {0}/going; while [ -e {0}/going ]; do sleep 0.02; done; \
         mount -t tmpfs stray \"$2\"; touch {0}/mounted)\nexit\nfi\n\
         exec mount --bind \"$1\" \"$2\"\n",
        directory.display()
    );
    write_program(&programs.join("mount.fuse3"), &helper)?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
    sandbox.set_environment("PATH", &path);
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 9"])?;
    let files = directory.join("files");
    fs::rename(bundle.path().join("rootfs"), &files)?;
    for name in ["proc", "dev", "sys"] {
        fs::create_dir_all(files.join(name))?;
    }
    let root = api::Mount {
        type_: "fuse3.any".into(),
        source: files.to_string_lossy().into_owned(),
        ..api::Mount::default()
    };
    let before = Footprint::of(&sandbox);
    scope(|scope| {
        let create = scope
            .spawn(|| shim.create_with("c", bundle.path(), |request| request.rootfs = vec![root]));
        until("the helper is at work", || Ok(going.exists()))?;
        sandbox.kill_daemon()?;
        create.join().ok().context("a request panicked")??;
        anyhow::Ok(())
    })?;
    let pid = fs::read_to_string(&going)?.trim().parse()?;
    ensure!(!is_alive(pid), "the first helper is at work yet");
    shim.start("c")?;
    ensure!(shim.wait("c")? == 9 && shim.delete("c")? == 9, "not 9");
    // Whatever of it is left goes on now.
    fs::remove_file(&going)?;
    before.wait_for_return(&sandbox)?;
    ensure!(!directory.join("mounted").exists(), "it has mounted");
    let note = bundle.path().join("mount-helper");
    ensure!(!note.exists(), "its note is left");
    Ok(())
}
