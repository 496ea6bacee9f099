//! The launcher as containerd executes it: what it prints, what it leaves, and that `delete` works
//! with a daemon and without.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::ensure;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::sys::signal::Signal;
use protobuf::Message;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 9] = tests!(WithoutContainerd:
    start_prints_the_address_and_nothing_else,
    start_reads_the_message_of_containerd_2_3,
    many_launchers_start_one_daemon,
    the_daemon_has_nothing_of_containerds_environment,
    delete_of_an_unknown_container_is_quick_and_harmless,
    delete_kills_what_the_daemon_runs,
    delete_works_with_a_daemon_that_lost_its_records,
    delete_works_without_a_daemon_and_without_its_files,
    info_and_version_are_answered_without_a_daemon,
);

/// The launcher in a bundle, with containerd's environment.
fn launcher(stage: &Stage, sandbox: &Sandbox, bundle: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(stage.binary("containerd-shim-embed-v1"));
    command
        .args([
            "-namespace",
            sandbox.namespace(),
            "-address",
            "/run/c.sock",
            "-publish-binary",
            "/bin/containerd",
        ])
        .args(arguments)
        .current_dir(bundle)
        .env("EMBEDSHIM_STATE_DIR", sandbox.state_dir())
        .env("TTRPC_ADDRESS", "/run/c.sock.ttrpc")
        .env("NOTIFY_SOCKET", "/run/systemd/notify")
        .env("GOMAXPROCS", "2")
        .stdin(Stdio::null());
    command
}

fn launch(command: &mut Command, input: &[u8]) -> anyhow::Result<Finished> {
    let mut running = Running::capture(command.stdin(Stdio::piped()))?;
    running.feed(input)?;
    running.finish(PATIENCE)
}

fn start_prints_the_address_and_nothing_else(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    for _ in 0..2 {
        let finished = launch(
            &mut launcher(stage, &sandbox, bundle.path(), &["-id", "c", "start"]),
            b"",
        )?;
        let address = format!("unix://{}/shim.sock", sandbox.state_dir().display());
        ensure!(
            finished.code == Some(0) && finished.stdout == address && finished.stderr.is_empty(),
            "{finished:?}"
        );
        ensure!(
            fs::read_to_string(bundle.path().join("address"))? == address,
            "the address file differs"
        );
        let note = fs::read_to_string(bundle.path().join("embedshim.json"))?;
        ensure!(note.contains("/run/c.sock.ttrpc"), "{note}");
    }
    ensure!(
        Shim::connect(&sandbox)?.state("c").is_err(),
        "start left a task in the daemon"
    );
    Ok(())
}

fn start_reads_the_message_of_containerd_2_3(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let message = BootstrapParams {
        instance_id: "c".into(),
        namespace: sandbox.namespace().into(),
        containerd_ttrpc_address: "/run/other.ttrpc".into(),
        ..BootstrapParams::default()
    };
    let input = message.write_to_bytes()?;
    let finished = launch(
        &mut launcher(stage, &sandbox, bundle.path(), &["-id", "c", "start"]),
        &input,
    )?;
    ensure!(finished.code == Some(0), "{finished:?}");
    let note = fs::read_to_string(bundle.path().join("embedshim.json"))?;
    ensure!(note.contains("/run/other.ttrpc"), "{note}");
    Ok(())
}

fn many_launchers_start_one_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let mut running = Vec::new();
    for number in 0..20 {
        let id = format!("c{number}");
        let bundle = sandbox.directory().join(&id);
        fs::create_dir_all(&bundle)?;
        running.push(Running::capture(&mut launcher(
            stage,
            &sandbox,
            &bundle,
            &["-id", &id, "start"],
        ))?);
    }
    for mut run in running {
        let finished = run.finish(PATIENCE)?;
        ensure!(
            finished.code == Some(0) && finished.stderr.is_empty(),
            "{finished:?}"
        );
    }
    let serving = || sandbox.daemon_log().matches(" serving ").count();
    // It answers before it says so.
    until("a daemon says that it serves", || Ok(serving() > 0))?;
    let serving = serving();
    ensure!(serving == 1, "{serving} daemons: {}", sandbox.daemon_log());
    Ok(())
}

fn the_daemon_has_nothing_of_containerds_environment(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    launch(
        &mut launcher(stage, &sandbox, bundle.path(), &["-id", "c", "start"]),
        b"",
    )?;
    let (daemon, keeper) = (sandbox.daemon_pid().unwrap(), sandbox.keeper_pid().unwrap());
    for pid in [daemon, keeper] {
        let environment = fs::read(format!("/proc/{pid}/environ"))?;
        let names: Vec<String> = environment
            .split(|&byte| byte == 0)
            .filter(|entry| !entry.is_empty())
            .map(|entry| {
                let entry = String::from_utf8_lossy(entry);
                entry.split('=').next().unwrap_or_default().to_owned()
            })
            .collect();
        let is_ours = |name: &String| {
            let name = name.as_str();
            let of_keeper = name.starts_with("LISTEN_")
                || ["NOTIFY_SOCKET", "FDSTORE", "WATCHDOG_USEC"].contains(&name);
            name.starts_with("EMBEDSHIM_")
                || ["PATH", "XDG_RUNTIME_DIR"].contains(&name)
                || (of_keeper && pid == daemon)
        };
        ensure!(names.iter().all(is_ours), "{names:?}");
        ensure!(
            !String::from_utf8_lossy(&environment).contains("/run/systemd/notify"),
            "containerd's socket"
        );
        ensure!(
            fs::read_link(format!("/proc/{pid}/cwd"))? == Path::new("/"),
            "it keeps the bundle busy"
        );
        let (group, session) = (
            nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid)))?,
            nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid)))?,
        );
        ensure!(
            group.as_raw() == pid && session.as_raw() == keeper,
            "it is in its launcher's session"
        );
    }
    Ok(())
}

fn delete_of_an_unknown_container_is_quick_and_harmless(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let before = Footprint::of(&sandbox);
    for _ in 0..3 {
        let finished = delete(stage, &sandbox, &bundle, "c")?;
        ensure!(finished.exit_status == 137, "{finished:?}");
    }
    before.wait_for_return(&sandbox)
}

/// Runs `delete` and reads its message.
pub(crate) fn delete(
    stage: &Stage,
    sandbox: &Sandbox,
    bundle: &Bundle,
    id: &str,
) -> anyhow::Result<DeleteResponse> {
    let path = bundle.path().to_string_lossy().into_owned();
    let mut command = launcher(
        stage,
        sandbox,
        bundle.path(),
        &["-id", id, "-bundle", &path, "delete"],
    );
    let output = command.output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(DeleteResponse::parse_from_bytes(&output.stdout)?)
}

fn delete_kills_what_the_daemon_runs(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    let response = delete(stage, &sandbox, &bundle, "c")?;
    ensure!(
        (response.pid, response.exit_status) == (pid, 137),
        "{response:?}"
    );
    before.wait_for_return(&sandbox)?;
    // A container that has ended by itself keeps its own code.
    let ended = Bundle::new(&sandbox, "ended", &["sh", "-c", "exit 6"])?;
    let pid = shim.create("ended", ended.path())?;
    shim.start("ended")?;
    ensure!(shim.wait("ended")? == 6, "not 6");
    let response = delete(stage, &sandbox, &ended, "ended")?;
    ensure!(
        (response.pid, response.exit_status) == (pid, 6),
        "{response:?}"
    );
    Ok(())
}

fn delete_works_with_a_daemon_that_lost_its_records(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = Footprint::of(&sandbox);
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = i32::try_from(shim.create("c", bundle.path())?)?;
    shim.start("c")?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    fs::remove_dir_all(sandbox.state_dir().join("tasks"))?;
    sandbox.start_daemon()?;
    let response = delete(stage, &sandbox, &bundle, "c")?;
    ensure!(response.exit_status == 137, "{response:?}");
    until("the container is killed", || Ok(!is_alive(pid)))?;
    before.wait_for_return(&sandbox)
}

fn delete_works_without_a_daemon_and_without_its_files(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = i32::try_from(shim.create("c", bundle.path())?)?;
    shim.start("c")?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    // No daemon can start any more: its configuration is wrong.
    let config = sandbox.directory().join("wrong.toml");
    fs::write(&config, "nonsense")?;
    for file in ["address", "embedshim.json", "init.pid", "log.json"] {
        let _ = fs::remove_file(bundle.path().join(file));
    }
    let path = bundle.path().to_string_lossy().into_owned();
    for _ in 0..2 {
        let mut command = launcher(
            stage,
            &sandbox,
            bundle.path(),
            &["-id", "c", "-bundle", &path, "delete"],
        );
        let output = command.env("EMBEDSHIM_CONFIG", &config).output()?;
        ensure!(output.status.success(), "{output:?}");
        let response = DeleteResponse::parse_from_bytes(&output.stdout)?;
        ensure!(
            response.exit_status == 137 && response.exited_at.is_some(),
            "{response:?}"
        );
    }
    until("the container is killed", || Ok(!is_alive(pid)))
}

fn info_and_version_are_answered_without_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let binary = stage.binary("containerd-shim-embed-v1");
    let output = Command::new(&binary)
        .arg("-info")
        .stdin(Stdio::null())
        .output()?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout)?;
    ensure!(
        output.status.success() && info.name == "io.containerd.embed.v1",
        "{output:?}"
    );
    ensure!(!info.version.version.is_empty(), "{info:?}");
    let output = Command::new(&binary)
        .arg("-v")
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success() && text.starts_with("containerd-shim-embed-v1:\n  Version:"),
        "{text}"
    );
    let output = Command::new(&binary)
        .args(["-id", "../x", "-namespace", "n", "start"])
        .stdin(Stdio::null())
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && error.contains("container id \"../x\" is not valid"),
        "{error}"
    );
    Ok(())
}
