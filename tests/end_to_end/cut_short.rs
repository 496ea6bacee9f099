//! Calls of the OCI runtime that are killed, as by the OOM killer, right before or right after they
//! have done what they were asked for. A request is refused then, or it is done; what is told
//! afterwards is what is, and nothing is left over.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, binary_name, write_program};
use nix::sys::signal::Signal;
use testbed::sandbox::{Sandbox, until};

use crate::half_done::fifo;
use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(WithoutContainerd:
    a_pause_that_was_done_when_its_runtime_was_killed_is_done,
    a_pause_that_was_not_done_when_its_runtime_was_killed_is_refused,
    a_resume_that_was_done_when_its_runtime_was_killed_is_done,
    a_delete_whose_runtime_is_killed_is_done,
    of_a_create_whose_runtime_was_killed_nothing_is_left,
    a_client_of_a_create_that_is_undone_by_a_killed_daemon_reads_on,
    a_daemon_whose_question_for_the_state_is_killed_asks_again,
);

/// When the runtime is killed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    Before,
    After,
}

/// A runtime that is killed within one of its calls, once it is armed.
pub(crate) struct CutShort {
    pub(crate) program: PathBuf,
    armed: PathBuf,
    gone: PathBuf,
}

impl CutShort {
    /// `more` is a command of a shell that is run right before the end.
    pub(crate) fn new(
        sandbox: &Sandbox,
        call: &str,
        when: When,
        more: &str,
    ) -> anyhow::Result<Self> {
        let directory = sandbox.directory();
        let (armed, gone) = (directory.join("armed"), directory.join("gone"));
        let program = directory.join("cut-short-runc");
        let first = match when {
            When::Before => "",
            When::After => "runc \"$@\";",
        };
        let script = format!(
            "#!/bin/sh\n\
             for word in \"$@\"; do\n\
             if [ \"$word\" = {call} ] && rm {armed} 2>/dev/null; then\n\
             {first} {more}\n\
             touch {gone}\n\
             kill -KILL $$\n\
             fi\ndone\n\
             exec runc \"$@\"\n",
            armed = armed.display(),
            gone = gone.display(),
        );
        write_program(&program, &script)?;
        Ok(Self {
            program,
            armed,
            gone,
        })
    }

    pub(crate) fn arm(&self) -> anyhow::Result<()> {
        let _ = fs::remove_file(&self.gone);
        Ok(fs::write(&self.armed, "")?)
    }

    pub(crate) fn check_killed(&self) -> anyhow::Result<()> {
        ensure!(self.gone.exists(), "its runtime was not killed");
        Ok(())
    }
}

/// A container whose runtime will be killed.
pub(crate) struct Scene {
    pub(crate) sandbox: Sandbox,
    pub(crate) shim: Shim,
    pub(crate) runtime: CutShort,
    pub(crate) before: Footprint,
    pub(crate) bundle: Bundle,
}

impl Scene {
    pub(crate) fn set(stage: &Stage, call: &str, when: When) -> anyhow::Result<Self> {
        Self::set_with(stage, call, when, |_| String::new())
    }

    pub(crate) fn set_with(
        stage: &Stage,
        call: &str,
        when: When,
        more: impl FnOnce(&Sandbox) -> String,
    ) -> anyhow::Result<Self> {
        let sandbox = stage.bare_sandbox()?;
        sandbox.start_daemon()?;
        let shim = Shim::connect(&sandbox)?;
        let runtime = CutShort::new(&sandbox, call, when, &more(&sandbox))?;
        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        // The first container of a namespace makes the cgroup that all have in common.
        let first = Bundle::new(&sandbox, "first", &["true"])?;
        shim.create("first", first.path())?;
        shim.delete("first")?;
        let before = Footprint::of(&sandbox);
        Ok(Self {
            sandbox,
            shim,
            runtime,
            before,
            bundle,
        })
    }

    pub(crate) fn create(&self) -> ttrpc::Result<u32> {
        self.shim.create_with("c", self.bundle.path(), |request| {
            request.options = binary_name(&self.runtime.program);
        })
    }

    pub(crate) fn expect(&self, due: api::Status) -> anyhow::Result<()> {
        let told = self.shim.state("c")?.status.enum_value_or_default();
        ensure!(told == due, "State tells {told:?} instead of {due:?}");
        Ok(())
    }

    /// What the runtime itself says of it.
    pub(crate) fn runc_says(&self) -> anyhow::Result<String> {
        let root = Path::new("/run/containerd/runc").join(self.sandbox.namespace());
        let mut runc = Command::new("runc");
        let output = runc.arg("--root").arg(root).args(["state", "c"]).output()?;
        let state: serde_json::Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok(state["status"].as_str().context("no status")?.to_owned())
    }

    /// It runs, and the runtime knows that: one that is created has no checkpoint.
    pub(crate) fn runs_for_runc(&self) -> anyhow::Result<()> {
        self.expect(api::Status::RUNNING)?;
        let said = self.runc_says()?;
        ensure!(said == "running", "runc calls it {said}");
        Ok(())
    }

    pub(crate) fn pause(&self) -> ttrpc::Result<()> {
        let request = api::PauseRequest {
            id: "c".into(),
            ..api::PauseRequest::default()
        };
        let shim = &self.shim;
        shim.tasks.pause(shim.metadata(), &request).map(drop)
    }

    pub(crate) fn resume(&self) -> ttrpc::Result<()> {
        let request = api::ResumeRequest {
            id: "c".into(),
            ..api::ResumeRequest::default()
        };
        let shim = &self.shim;
        shim.tasks.resume(shim.metadata(), &request).map(drop)
    }

    pub(crate) fn end(&self) -> anyhow::Result<()> {
        self.shim.kill("c", Signal::SIGKILL)?;
        ensure!(self.shim.wait("c")? == 137, "not 137");
        ensure!(self.shim.delete("c")? == 137, "not 137");
        self.before.wait_for_return(&self.sandbox)
    }
}

pub(crate) fn refusal<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> anyhow::Result<String> {
    match answer {
        Ok(told) => anyhow::bail!("not refused: {told:?}"),
        Err(error) => Ok(error.to_string()),
    }
}

fn a_pause_that_was_done_when_its_runtime_was_killed_is_done(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "pause", When::After)?;
    scene.create()?;
    scene.shim.start("c")?;
    scene.runtime.arm()?;
    scene.pause()?;
    scene.runtime.check_killed()?;
    scene.expect(api::Status::PAUSED)?;
    scene.resume()?;
    scene.end()
}

fn a_pause_that_was_not_done_when_its_runtime_was_killed_is_refused(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "pause", When::Before)?;
    scene.create()?;
    scene.shim.start("c")?;
    scene.runtime.arm()?;
    let told = refusal(scene.pause())?;
    ensure!(told.contains("OCI runtime pause failed"), "{told}");
    scene.expect(api::Status::RUNNING)?;
    scene.sandbox.kill_daemon()?;
    scene.expect(api::Status::RUNNING)?;
    scene.pause()?;
    scene.expect(api::Status::PAUSED)?;
    scene.end()
}

fn a_resume_that_was_done_when_its_runtime_was_killed_is_done(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "resume", When::After)?;
    scene.create()?;
    scene.shim.start("c")?;
    scene.pause()?;
    scene.runtime.arm()?;
    scene.resume()?;
    scene.runtime.check_killed()?;
    scene.expect(api::Status::RUNNING)?;
    scene.end()
}

fn a_delete_whose_runtime_is_killed_is_done(stage: &Stage) -> anyhow::Result<()> {
    for when in [When::Before, When::After] {
        let scene = Scene::set(stage, "delete", when)?;
        scene.create()?;
        scene.runtime.arm()?;
        scene
            .shim
            .delete("c")
            .with_context(|| format!("killed {when:?} it is done"))?;
        scene.runtime.check_killed()?;
        scene.before.wait_for_return(&scene.sandbox)?;
    }
    Ok(())
}

/// As `runc` leaves it that is killed when it has made the cgroups and not yet noted that.
fn with_cgroups(sandbox: &Sandbox) -> String {
    let namespace = sandbox.namespace();
    format!(
        "if [ -e /sys/fs/cgroup/cgroup.procs ]; then mkdir /sys/fs/cgroup/{namespace}/c; \
         else for each in /sys/fs/cgroup/*/{namespace}; do mkdir $each/c; done; fi; \
         mkdir /run/containerd/runc/{namespace}/c; touch {}/.init.pid",
        sandbox.directory().join("bundles/c").display()
    )
}

fn of_a_create_whose_runtime_was_killed_nothing_is_left(stage: &Stage) -> anyhow::Result<()> {
    let early = Scene::set_with(stage, "create", When::Before, with_cgroups)?;
    let late = Scene::set(stage, "create", When::After)?;
    for scene in [early, late] {
        scene.runtime.arm()?;
        let told = refusal(scene.create())?;
        ensure!(told.contains("OCI runtime create failed"), "{told}");
        scene.runtime.check_killed()?;
        scene.before.wait_for_return(&scene.sandbox)?;
        scene.create()?;
        scene.shim.start("c")?;
        scene.end()?;
    }
    Ok(())
}

/// The next daemon creates it again, and its output goes to the client that it would have gone to.
fn a_client_of_a_create_that_is_undone_by_a_killed_daemon_reads_on(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let directory = sandbox.directory();
    let program = directory.join("cut-short-runc");
    let script = format!(
        "#!/bin/sh\ncd {}\n\
         for word in \"$@\"; do\n\
         [ \"$word\" = create ] && mkdir killed 2>/dev/null && kill -KILL $$\n\
         if [ \"$word\" = delete ] && mkdir once 2>/dev/null; then\n\
         touch going; while [ -e going ]; do sleep 0.02; done\n\
         fi\ndone\nexec runc \"$@\"\n",
        directory.display()
    );
    write_program(&program, &script)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "echo it runs; exit 7"])?;
    let stdout = fifo(&sandbox, "out")?;
    let output = Reader::of(stdout.clone());
    scope(|scope| {
        let request = scope.spawn(|| {
            shim.create_with("c", bundle.path(), |request| {
                request.stdout = stdout.to_string_lossy().into_owned();
                request.options = binary_name(&program);
            })
        });
        let going = directory.join("going");
        until("the creation is being undone", || Ok(going.exists()))?;
        sandbox.kill_daemon()?;
        fs::remove_file(&going)?;
        request.join().ok().context("a request panicked")
    })??;
    shim.start("c")?;
    output.wait_for("it runs")?;
    ensure!(shim.wait("c")? == 7 && shim.delete("c")? == 7, "not 7");
    Ok(())
}

/// It would take a container that it cannot ask for for what the record says.
fn a_daemon_whose_question_for_the_state_is_killed_asks_again(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "state", When::Before)?;
    scene.create()?;
    scene.shim.start("c")?;
    scene.pause()?;
    // The answer before it is noted as sent by then: the next daemon does not repeat the pause.
    scene.expect(api::Status::PAUSED)?;
    // Behind the daemon's back.
    let root = Path::new("/run/containerd/runc").join(scene.sandbox.namespace());
    let resumed = Command::new("runc")
        .arg("--root")
        .arg(root)
        .args(["resume", "c"])
        .status()?;
    ensure!(resumed.success(), "runc resume fails");
    scene.runtime.arm()?;
    scene.sandbox.kill_daemon()?;
    until("it is seen that it runs", || {
        Ok(scene.shim.state("c")?.status == api::Status::RUNNING.into())
    })
    .with_context(|| scene.sandbox.daemon_log())?;
    scene.runtime.check_killed()?;
    scene.end()
}
