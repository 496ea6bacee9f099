//! What a client is told of a runtime that ends without a word: the same as by runc-v2. The `ctr`
//! of containerd 1 adds ": unknown" to all of it, that of 2 does not.

use std::fs;

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test, write_program};
use tempfile::TempDir;
use testbed::machine;
use testbed::sandbox::{PATIENCE, Running, Sandbox};

use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(AnyRuntime:
    a_runtime_that_ends_without_a_word_is_told_of_as_by_runc_v2,
);

/// A runc that ends in one of its calls as a file says, and is the real one otherwise.
struct Mute {
    directory: TempDir,
}

impl Mute {
    fn new() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let order = directory.path().join("order");
        let runc = machine::find_on_path("runc").context("no runc")?;
        let script = format!(
            "#!/bin/sh\nverb= end=\n[ -e {0} ] && read -r verb end <{0}\nfor word; do\n\
             [ \"$word\" = \"$verb\" ] && {{ eval \"$end\"; }}\ndone\nexec {1} \"$@\"\n",
            order.display(),
            runc.display()
        );
        write_program(&directory.path().join("runc"), &script)?;
        Ok(Self { directory })
    }

    /// A sandbox in which it is found first.
    fn sandbox(&self, stage: &Stage) -> anyhow::Result<Sandbox> {
        let usual = std::env::var("PATH").unwrap_or_default();
        stage.sandbox_with(&[(
            "PATH",
            &format!("{}:{usual}", self.directory.path().display()),
        )])
    }

    /// In which call it ends, and how.
    fn order(&self, order: &str) -> anyhow::Result<()> {
        Ok(fs::write(
            self.directory.path().join("order"),
            format!("{order}\n"),
        )?)
    }
}

fn a_runtime_that_ends_without_a_word_is_told_of_as_by_runc_v2(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mute = Mute::new()?;
    let sandbox = mute.sandbox(stage)?;
    let version = sandbox.ctr_ok(&["--version"])?;
    let end = if version.contains("/v2 ") {
        ""
    } else {
        ": unknown"
    };
    let said = |status: &str| format!("runc did not terminate successfully: {status}{end}");
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let exec = ["task", "exec", "--exec-id", "e", "c", "true"];
    for (order, status) in [
        ("kill -9 $$", "exit status 137"),
        ("exit 3", "exit status 3"),
    ] {
        mute.order(&format!("exec {order}"))?;
        let error = sandbox.ctr_ok(&exec).unwrap_err().to_string();
        let words = format!("OCI runtime exec failed: {}", said(status));
        ensure!(error.contains(&words), "{words:?} is not in {error}");
    }
    for (number, (order, rest)) in [
        ("kill -9 $$", "exit status 137: "),
        ("exit 3", "exit status 3: "),
        ("echo words >&2; exit 3", "exit status 3: words\n"),
    ]
    .into_iter()
    .enumerate()
    {
        mute.order(&format!("start {order}"))?;
        let run = ["--rm", "--null-io"];
        let id = format!("d{number}");
        let finished =
            Running::capture(&mut sandbox.run(&run, &id, &["true"]))?.finish(PATIENCE)?;
        let words = format!("OCI runtime start failed: {}", said(rest));
        ensure!(
            finished.stderr.contains(&words),
            "{words:?} is not in {finished:?}"
        );
        mute.order("none true")?;
    }
    for (order, status) in [
        ("kill -9 $$", "exit status 137"),
        ("exit 3", "exit status 3"),
    ] {
        mute.order(&format!("create {order}"))?;
        let run = ["--rm"];
        let id = status.replace(' ', "-");
        let finished =
            Running::capture(&mut sandbox.run(&run, &id, &["true"]))?.finish(PATIENCE)?;
        let words = format!("log.json: no such file or directory): {}", said(status));
        ensure!(
            finished.stderr.contains(
                "OCI runtime create failed: unable to retrieve OCI runtime error (open /"
            ) && finished.stderr.contains(&words),
            "{words:?} is not in {finished:?}"
        );
    }
    Ok(())
}
