//! OCI runtimes and specs that are not runc's usual ones, and clients that read less than there is.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test, binary_name, options, write_program};
use nix::sys::signal::Signal;
use testbed::image;
use testbed::sandbox::{EMBEDSHIM, PATIENCE, RUNC_V2, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(EmbedshimOnly:
    a_runtime_that_says_much_is_read_to_the_end,
    a_reason_over_several_lines_reaches_the_client,
    fields_that_are_null_are_as_fields_that_are_missing,
    a_probe_whose_reader_has_gone_does_not_panic,
    a_container_that_is_frozen_before_it_takes_a_sigkill_ends,
    an_update_that_the_runtime_does_not_read_ends_at_the_deadline,
    an_explicit_systemd_cgroup_option_beats_the_cgroup_parents_form,
    a_cgroup_parent_of_systemd_form_starts_as_with_runc_v2,
);

fn start(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

/// Three megabytes on both streams, from every call.
fn a_runtime_that_says_much_is_read_to_the_end(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = sandbox.directory().join("talkative");
    let text = "#!/bin/sh\nset -e\nif [ \"$1\" != state ]; then head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; fi\n\
                exec runc \"$@\"\n";
    write_program(&runtime, text)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&runtime);
    })?;
    shim.start("c")?;
    shim.kill("c", Signal::SIGKILL)?;
    let code = shim.wait("c")?;
    ensure!(code == 137 && shim.delete("c")? == 137, "{code}");
    before.wait_for_return(&sandbox)
}

/// As crun 1.28 writes them.
fn a_reason_over_several_lines_reaches_the_client(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = sandbox.directory().join("crun");
    let text = "#!/bin/sh\nprev=; for a in \"$@\"; do [ \"$prev\" = --log ] && log=$a; prev=$a; done\n\
                case \" $* \" in *' create '*)\n\
                printf '{\\n  \"msg\": \"executable file `/nope` not found\",\\n  \"level\": \"error\"\\n}\\n' >>\"$log\"; exit 1;; esac\n\
                exec runc \"$@\"\n";
    write_program(&runtime, text)?;
    let bundle = Bundle::new(&sandbox, "c", &["/nope"])?;
    let created = shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&runtime);
    });
    let error = created.err().context("it was created")?.to_string();
    ensure!(
        error.contains("executable file `/nope` not found"),
        "{error}"
    );
    Ok(())
}

fn fields_that_are_null_are_as_fields_that_are_missing(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 3"])?;
    bundle.edit(|spec| {
        spec["linux"]["cgroupsPath"] = serde_json::Value::Null;
        spec["hooks"] = serde_json::Value::Null;
    })?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 3 && shim.delete("c")? == 3, "not 3");
    Ok(())
}

fn a_probe_whose_reader_has_gone_does_not_panic(stage: &Stage) -> anyhow::Result<()> {
    let mut probe = Command::new(stage.binary("embedshimd"));
    probe
        .args(["probe", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = probe.spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !error.contains("panicked") && matches!(output.status.code(), Some(0 | 7)),
        "{}: {error}",
        output.status
    );
    // And the whole of it for who reads.
    let mut probe = Command::new(stage.binary("embedshimd"));
    let whole = Running::capture(probe.args(["probe", "--json"]))?.finish(PATIENCE)?;
    serde_json::from_str::<serde_json::Value>(&whole.stdout)?;
    Ok(())
}

/// The freeze of this runtime is done before the init takes the signal that it is sent. In cgroup
/// version 1 it stays pending.
fn a_container_that_is_frozen_before_it_takes_a_sigkill_ends(stage: &Stage) -> anyhow::Result<()> {
    if !Path::new("/sys/fs/cgroup/freezer").is_dir() {
        eprintln!("skipped, because there is no freezer of cgroup version 1");
        return Ok(());
    }
    let (sandbox, shim) = start(stage)?;
    let runtime = sandbox.directory().join("late");
    let text = "#!/bin/sh\ncase \" $* \" in *' pause '*)\n\
                pid=$(cat init.pid)\n\
                state=/sys/fs/cgroup/freezer$(sed -n 's/^[0-9]*:freezer://p' /proc/$pid/cgroup)/freezer.state\n\
                echo FROZEN >$state\nuntil [ \"$(cat $state)\" = FROZEN ]; do :; done\nkill -9 $pid\nexit 0;; esac\n\
                exec runc \"$@\"\n";
    write_program(&runtime, text)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&runtime);
    })?;
    shim.start("c")?;
    let pause = api::PauseRequest {
        id: "c".into(),
        ..api::PauseRequest::default()
    };
    let paused = shim.tasks.pause(shim.metadata(), &pause);
    let refusal = paused.map_or_else(|error| error.to_string(), |_| "paused".into());
    ensure!(
        refusal.contains("cannot pause a stopped container"),
        "{refusal}"
    );
    until("it has ended", || {
        Ok(shim.state("c")?.status() == api::Status::STOPPED)
    })?;
    ensure!(shim.delete("c")? == 137, "not 137");
    before.wait_for_return(&sandbox)
}

/// A document that does not fit into a pipe, for a runtime that does not take it.
fn an_update_that_the_runtime_does_not_read_ends_at_the_deadline(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    let config = sandbox.directory().join("config.toml");
    fs::write(&config, "[runtime]\ndeadline_seconds = 3\n")?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let runtime = sandbox.directory().join("deaf");
    let text =
        "#!/bin/sh\ncase \" $* \" in *' update '*) exec sleep 1000;; esac\nexec runc \"$@\"\n";
    write_program(&runtime, text)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&runtime);
    })?;
    shim.start("c")?;
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: vec![b' '; 1 << 20],
        ..Any::default()
    };
    let request = api::UpdateTaskRequest {
        id: "c".into(),
        resources: MessageField::some(resources),
        ..api::UpdateTaskRequest::default()
    };
    let (metadata, tasks) = (shim.metadata(), shim.tasks.clone());
    let (answered, has_answered) = mpsc::channel();
    std::thread::spawn(move || answered.send(tasks.update(metadata, &request).map(drop)));
    let answer = has_answered.recv_timeout(PATIENCE).context("it hangs")?;
    let error = answer.err().context("it was updated")?.to_string();
    ensure!(error.contains("did not finish within 3 s"), "{error}");
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(shim.wait("c")? == 137 && shim.delete("c")? == 137, "no 137");
    Ok(())
}

/// Without an option the form decides, but where systemd is not the init system nothing can be
/// asked of it.
fn an_explicit_systemd_cgroup_option_beats_the_cgroup_parents_form(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    let (programs, said) = (
        sandbox.directory().join("programs"),
        sandbox.directory().join("said"),
    );
    fs::create_dir(&programs)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let text = format!(
        "#!/bin/sh\necho \"$*\" >>{}\nPATH={path}\nshift_systemd() {{ for a; do shift; [ \"$a\" = --systemd-cgroup ] || set -- \"$@\" \"$a\"; done; \
         exec runc \"$@\"; }}\nshift_systemd \"$@\"\n",
        said.display()
    );
    write_program(&programs.join("runc"), &text)?;
    sandbox.set_environment("PATH", &format!("{}:{path}", programs.display()));
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let has_systemd = Path::new("/run/systemd/system").is_dir();
    for (number, (option, is_asked)) in [
        (Some(false), false),
        (Some(true), true),
        (None, has_systemd),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("c{number}");
        fs::write(&said, "")?;
        let bundle = Bundle::new(&sandbox, &id, &["true"])?;
        let parent = format!("{}.slice:embedshim:{id}", sandbox.namespace());
        bundle.edit(|spec| spec["linux"]["cgroupsPath"] = parent.clone().into())?;
        shim.create_with(&id, bundle.path(), |request| {
            if let Some(systemd_cgroup) = option {
                request.options = options(&Options {
                    systemd_cgroup,
                    ..Options::default()
                });
            }
        })?;
        let said = fs::read_to_string(&said)?;
        ensure!(said.contains(" create "), "{said}");
        ensure!(
            said.contains("--systemd-cgroup") == is_asked,
            "{option:?}: {said}"
        );
        shim.start(&id)?;
        ensure!(shim.wait(&id)? == 0 && shim.delete(&id)? == 0, "no 0");
    }
    Ok(())
}

/// By containerd, with the options that it sends.
fn a_cgroup_parent_of_systemd_form_starts_as_with_runc_v2(stage: &Stage) -> anyhow::Result<()> {
    if Path::new("/run/systemd/system").is_dir() {
        println!("skipped, because systemd is the init system here");
        return Ok(());
    }
    let sandbox = stage.sandbox()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has_runc_v2 = std::env::split_paths(&path)
        .any(|directory| directory.join("containerd-shim-runc-v2").exists());
    // That of another release does not start beside the installed libraries.
    let has_runc_v2 = has_runc_v2 && stage.programs().is_none();
    let runtimes = [EMBEDSHIM, RUNC_V2];
    for runtime in runtimes.into_iter().take(1 + usize::from(has_runc_v2)) {
        let parent = format!("{}.slice:embedshim:c", sandbox.namespace());
        let mut ctr = sandbox.ctr(["run", "--rm", "--runtime", runtime]);
        ctr.args(["--cgroup", &parent, image::NAME, "c", "sh", "-c", "exit 4"]);
        let finished = Running::capture(&mut ctr)?.finish(PATIENCE)?;
        ensure!(finished.code == Some(4), "{runtime}: {finished:?}");
    }
    Ok(())
}
