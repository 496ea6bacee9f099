//! What goes wrong is told where the user looks, and nothing is left behind.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(AnyRuntime:
    a_program_that_is_not_in_the_image_is_named,
    an_exec_of_a_program_that_is_not_in_the_image_is_named,
);
pub(crate) const OURS: [Test; 13] = tests!(EmbedshimOnly:
    a_daemon_that_cannot_listen_attaches_nothing,
    a_missing_runc_is_named,
    a_mount_that_fails_is_named,
    a_bad_bundle_is_named,
    an_unknown_runtime_option_is_named,
    a_full_table_is_named_and_the_first_container_unharmed,
    an_unwritable_state_directory_is_named,
    a_wrong_configuration_is_named,
    without_bpffs_containers_run_and_probe_says_what_would_help,
    without_bpf_permission_containers_run_and_probe_says_so,
    in_a_time_namespace_exits_are_recorded_and_probe_promises_it,
    what_records_no_exit_is_not_promised,
    a_second_daemon_is_refused,
);

/// Runs a container that must not start, and checks that the error names `words` and nothing stays.
fn refused(
    sandbox: &Sandbox,
    options: &[&str],
    command: &[&str],
    words: &[&str],
) -> anyhow::Result<()> {
    let before = Footprint::of(sandbox);
    let finished =
        Running::capture(&mut sandbox.run(options, "refused", command))?.finish(PATIENCE)?;
    ensure!(finished.code != Some(0), "it ran: {finished:?}");
    for word in words {
        ensure!(
            finished.stderr.contains(word),
            "{word:?} is not in: {}",
            finished.stderr
        );
    }
    let _ = sandbox.ctr_ok(&["container", "rm", "refused"]);
    before.wait_for_return(sandbox)
}

/// A sandbox whose daemon is up already.
fn warm(stage: &Stage, environment: &[(&str, &str)]) -> anyhow::Result<Sandbox> {
    let sandbox = stage.sandbox_with(environment)?;
    let finished =
        Running::capture(&mut sandbox.run(&["--rm"], "first", &["true"]))?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    Ok(sandbox)
}

fn a_program_that_is_not_in_the_image_is_named(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = warm(stage, &[])?;
    let words = [
        "OCI runtime create failed",
        "exec: \"nonsense\": executable file not found in $PATH",
    ];
    refused(&sandbox, &["--rm"], &["nonsense"], &words)?;
    refused(
        &sandbox,
        &["--rm"],
        &["/etc"],
        &["OCI runtime create failed", "exec: \"/etc\""],
    )
}

fn an_exec_of_a_program_that_is_not_in_the_image_is_named(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    let error = sandbox
        .ctr_ok(&["task", "exec", "--exec-id", "e", "c", "nonsense"])
        .unwrap_err()
        .to_string();
    for words in [
        "OCI runtime exec failed",
        "executable file not found in $PATH",
    ] {
        ensure!(error.contains(words), "{error}");
    }
    ensure!(
        sandbox.task("c")?.status == "RUNNING",
        "the container ended with the failed exec"
    );
    before.wait_for_return(&sandbox)
}

fn a_missing_runc_is_named(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox_with(&[])?;
    sandbox.stop_containerd()?;
    let path = sandbox.directory().join("path");
    fs::create_dir_all(&path)?;
    let containerd = testbed::machine::find_on_path("containerd").context("no containerd")?;
    std::os::unix::fs::symlink(containerd, path.join("containerd"))?;
    sandbox.set_environment(
        "PATH",
        &format!("{}:{}", stage.binary("").display(), path.display()),
    );
    sandbox.start_containerd()?;
    sandbox.start_daemon()?;
    refused(
        &sandbox,
        &["--rm"],
        &["true"],
        &["OCI runtime create failed", "runc"],
    )
}

fn a_mount_that_fails_is_named(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = warm(stage, &[])?;
    let missing = "type=bind,src=/nonexistent/source,dst=/mnt,options=rbind:ro";
    refused(
        &sandbox,
        &["--rm", "--mount", missing],
        &["true"],
        &["OCI runtime create failed", "/nonexistent/source"],
    )
}

fn a_bad_bundle_is_named(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let broken = Bundle::new(&sandbox, "broken", &["true"])?;
    fs::write(broken.path().join("config.json"), "{ not json")?;
    let empty = sandbox.directory().join("bundles/empty");
    fs::create_dir_all(&empty)?;
    let file = bundle.path().join("config.json");
    let relative = Path::new("bundles/c");
    let missing = Path::new("/nonexistent/bundle");
    for (path, words) in [
        (missing, "/nonexistent/bundle"),
        (relative, "not an absolute path"),
        (&file, "config.json"),
        (&empty, "config.json"),
        (broken.path(), "config.json"),
    ] {
        let error = shim.create("c", path).unwrap_err().to_string();
        ensure!(error.contains(words), "{}: {error}", path.display());
    }
    before.wait_for_return(&sandbox)?;
    // And with a good one, the same id works.
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    ensure!(
        shim.wait("c")? == 0 && shim.delete("c")? == 0,
        "a good bundle fails"
    );
    before.wait_for_return(&sandbox)
}

fn an_unknown_runtime_option_is_named(stage: &Stage) -> anyhow::Result<()> {
    use containerd_shim_protos::api::CreateTaskRequest;
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let create = |type_url: &str, value: &[u8]| {
        let options = Any {
            type_url: type_url.into(),
            value: value.to_vec(),
            ..Any::default()
        };
        let request = CreateTaskRequest {
            id: "c".into(),
            bundle: bundle.path().to_string_lossy().into_owned(),
            options: MessageField::some(options),
            ..CreateTaskRequest::default()
        };
        shim.tasks.create(shim.metadata(), &request)
    };
    let error = create("io.example.Options", b"").unwrap_err().to_string();
    ensure!(
        error.contains("unsupported runtime options") && error.contains("io.example.Options"),
        "{error}"
    );
    let error = create("containerd.runc.v1.Options", b"\xff\xff")
        .unwrap_err()
        .to_string();
    ensure!(error.contains("containerd.runc.v1.Options"), "{error}");
    before.wait_for_return(&sandbox)?;
    // A file that ctr --runtime-config-path names is read.
    let config = sandbox.directory().join("runtime.toml");
    fs::write(&config, "BinaryName = \"/no/such/runtime\"\n")?;
    let path = config.to_string_lossy().into_owned();
    let message = [&[0x12, u8::try_from(path.len())?], path.as_bytes()].concat();
    let error = create("runtimeoptions.v1.Options", &message)
        .unwrap_err()
        .to_string();
    ensure!(error.contains("/no/such/runtime"), "{error}");
    before.wait_for_return(&sandbox)?;
    // An option that is unknown within a known kind is logged by its name, and the container runs.
    let body = b"Unheard = 1\n";
    let mut message = vec![0x1a, u8::try_from(body.len())?];
    message.extend_from_slice(body);
    create("runtimeoptions.v1.Options", &message)?;
    ensure!(
        sandbox.daemon_log().contains("Unheard"),
        "{}",
        sandbox.daemon_log()
    );
    shim.start("c")?;
    ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "it fails");
    Ok(())
}

fn a_full_table_is_named_and_the_first_container_unharmed(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    fs::write(&config, "[monitor]\ncapacity = 1\n")?;
    let sandbox = stage.sandbox_with(&[("EMBEDSHIM_CONFIG", &config.to_string_lossy())])?;
    sandbox.detached(&[], "first", &["sleep", "1000"])?;
    refused(
        &sandbox,
        &["--rm"],
        &["true"],
        &["the exit monitor's table is full", "monitor.capacity"],
    )?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "first"])?;
    sandbox.wait_for_status("first", "STOPPED")?;
    ensure!(
        sandbox.delete_task("first")? == 137,
        "the first container's code was lost"
    );
    // Its place is free again.
    sandbox
        .detached(&[], "second", &["sleep", "1000"])
        .map(drop)
}

fn an_unwritable_state_directory_is_named(stage: &Stage) -> anyhow::Result<()> {
    // No user, root included, can make a directory there.
    let sandbox = stage.sandbox_with(&[("EMBEDSHIM_STATE_DIR", "/sys/kernel/embedshim")])?;
    refused(
        &sandbox,
        &["--rm"],
        &["true"],
        &["cannot create the state directory", "/sys/kernel/embedshim"],
    )
}

fn a_wrong_configuration_is_named(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    fs::write(&config, "[monitor]\nbackend = \"telepathy\"\n")?;
    let shown = config.to_string_lossy().into_owned();
    let output = Command::new(stage.binary("embedshimd"))
        .args(["serve", "--config", &shown])
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(3) && error.contains(&shown) && error.contains("telepathy"),
        "{output:?}"
    );
    // And where containerd's user looks.
    let sandbox = stage.sandbox_with(&[("EMBEDSHIM_CONFIG", &shown)])?;
    refused(
        &sandbox,
        &["--rm"],
        &["true"],
        &["embedshimd did not start", "telepathy"],
    )?;
    ensure!(
        sandbox.keeper_pid().is_none(),
        "a keeper goes on without a daemon"
    );
    Ok(())
}

/// Runs `embedshimd probe` by way of another program that takes something away first.
fn probe_under(stage: &Stage, wrapper: &[&str]) -> anyhow::Result<Finished> {
    let (program, arguments) = wrapper.split_first().context("no wrapper")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .arg(stage.binary("embedshimd"))
        .arg("probe");
    Running::capture(&mut command)?.finish(PATIENCE)
}

const WITHOUT_BPFFS: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "umount -l /sys/fs/bpf && exec \"$@\"",
    "sh",
];
const WITHOUT_BPF: [&str; 3] = ["setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin"];

/// In a namespace whose clocks are ahead by two different times.
const IN_A_TIME_NAMESPACE: [&str; 6] = [
    "unshare",
    "--time",
    "--boottime",
    "1000",
    "--monotonic=70",
    "--kill-child",
];
/// The same, where it cannot be told how far they are ahead.
const IN_AN_UNKNOWN_TIME: [&str; 9] = [
    "unshare",
    "--time",
    "--boottime=1000",
    "--mount",
    "--kill-child",
    "sh",
    "-c",
    "mount --bind /dev/null /proc/$$/timens_offsets && exec \"$@\"",
    "sh",
];

/// A daemon that is started by way of a wrapper, once it serves.
fn start_under(stage: &Stage, sandbox: &Sandbox, wrapper: &[&str]) -> anyhow::Result<Running> {
    fs::create_dir_all(sandbox.state_dir())?;
    let log = fs::File::create(sandbox.state_dir().join("embedshimd.log"))?;
    let (program, arguments) = wrapper.split_first().context("no wrapper")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .arg(stage.binary("embedshimd"))
        .args(["serve", "--state-dir"])
        .arg(sandbox.state_dir())
        .stderr(log);
    let daemon = Running::spawn(&mut command)?;
    until("embedshimd serves", || {
        Ok(sandbox.daemon_log().contains(" serving "))
    })
    .with_context(|| sandbox.daemon_log())?;
    Ok(daemon)
}

/// Serves by way of a wrapper and runs a bundle; the daemon's log must say how exits can be kept.
fn serve_under(stage: &Stage, wrapper: &[&str], words: &str) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 19"])?;
    let _daemon = start_under(stage, &sandbox, wrapper)?;
    let log = sandbox.daemon_log();
    ensure!(
        log.contains(words) && log.contains("exits can be lost"),
        "{log}"
    );
    let shim = Shim::connect(&sandbox)?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let code = shim.wait("c")?;
    ensure!(code == 19 && shim.delete("c")? == 19, "{code}");
    Ok(())
}

fn without_bpffs_containers_run_and_probe_says_what_would_help(
    stage: &Stage,
) -> anyhow::Result<()> {
    let probed = probe_under(stage, &WITHOUT_BPFFS)?;
    ensure!(
        probed.code == Some(7) && probed.stdout.contains("mount -t bpf bpf /sys/fs/bpf"),
        "{probed:?}"
    );
    serve_under(stage, &WITHOUT_BPFFS, "mount -t bpf bpf /sys/fs/bpf")
}

fn without_bpf_permission_containers_run_and_probe_says_so(stage: &Stage) -> anyhow::Result<()> {
    let probed = probe_under(stage, &WITHOUT_BPF)?;
    ensure!(
        probed.code == Some(7) && probed.stdout.contains("CAP_BPF"),
        "{probed:?}"
    );
    ensure!(probed.stdout.contains("bpf: cannot run"), "{probed:?}");
    // runc needs CAP_SYS_ADMIN for a container, so there is nothing to serve here.
    Ok(())
}

fn in_a_time_namespace_exits_are_recorded_and_probe_promises_it(
    stage: &Stage,
) -> anyhow::Result<()> {
    let probed = probe_under(stage, &IN_A_TIME_NAMESPACE)?;
    ensure!(
        probed.code == Some(0) && probed.stdout.contains("1. bpf, chosen"),
        "{probed:?}"
    );
    let sandbox = stage.bare_sandbox()?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let daemon = start_under(stage, &sandbox, &IN_A_TIME_NAMESPACE)?;
    let shim = Shim::connect(&sandbox)?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let init = Pid::from_raw(i32::try_from(shim.state("c")?.pid)?);
    let pid = sandbox.daemon_pid().context("no daemon")?;
    drop(daemon);
    until("the daemon is gone", || Ok(!is_alive(pid)))?;
    kill(init, Signal::SIGKILL)?;
    until("the container ends", || Ok(!is_alive(init.as_raw())))?;
    let _daemon = start_under(stage, &sandbox, &IN_A_TIME_NAMESPACE)?;
    let shim = Shim::connect(&sandbox)?;
    let code = shim.wait("c")?;
    let log = sandbox.daemon_log();
    // A zombie that is left would tell the code, too.
    ensure!(code == 137 && log.contains("evidence=Bpf"), "{code}: {log}");
    shim.delete("c")?;
    Ok(())
}

/// Where BPF attaches and records nothing, neither probe nor daemon promises that it does.
fn what_records_no_exit_is_not_promised(stage: &Stage) -> anyhow::Result<()> {
    let probed = probe_under(stage, &IN_AN_UNKNOWN_TIME)?;
    let reason = "bpf: cannot run: exits are not recorded here: in a time namespace";
    ensure!(
        probed.code == Some(7) && probed.stdout.contains(reason),
        "{probed:?}"
    );
    serve_under(stage, &IN_AN_UNKNOWN_TIME, "exits can be lost")
}

fn a_daemon_that_cannot_listen_attaches_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let state_dir = sandbox.directory().join("long".repeat(25));
    let pinned = || {
        let all = fs::read_dir("/sys/fs/bpf/embedshim").into_iter().flatten();
        let names = all.flatten().map(|entry| entry.file_name());
        names
            .filter(|name| name.to_string_lossy().contains("longlong"))
            .count()
    };
    let mut command = Command::new(stage.binary("embedshimd"));
    command.args(["serve", "--state-dir"]).arg(&state_dir);
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(1), "{finished:?}");
    ensure!(pinned() == 0, "programs are pinned");
    Ok(())
}

fn a_second_daemon_is_refused(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let daemon = sandbox.daemon_pid();
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["serve", "--state-dir"])
        .arg(sandbox.state_dir());
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(6) && finished.stderr.contains("another embedshimd works on"),
        "{finished:?}"
    );
    // Nor a second keeper: the first one holds what must not be lost.
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["keep", "--state-dir"])
        .arg(sandbox.state_dir());
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(6) && finished.stderr.contains("another keeper works on"),
        "{finished:?}"
    );
    ensure!(sandbox.daemon_pid() == daemon, "the first daemon is gone");
    Ok(())
}
