//! OCI runtimes and specs that are not runc's usual ones, and clients that read less than there is.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test, binary_name, write_program};
use nix::sys::signal::Signal;
use xtask::sandbox::{PATIENCE, Running, Sandbox};

use crate::tests;

pub(crate) const TESTS: [Test; 4] = tests!(EmbedshimOnly:
    a_runtime_that_says_much_is_read_to_the_end,
    a_reason_over_several_lines_reaches_the_client,
    fields_that_are_null_are_as_fields_that_are_missing,
    a_probe_whose_reader_has_gone_does_not_panic,
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
