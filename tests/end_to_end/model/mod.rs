//! Random walks through the state machine of a task, compared with a model of runc-v2's
//! (`docs/shim-contract.md`, "Task states"): every answer, and afterwards the order of the events
//! ("Order of exits"). A failing walk is shrunk to its shortest form and printed.

mod machine;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use anyhow::{bail, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Heard, Listener, Shim, Stage, Test};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use shim_api::bundle::BundleNote;
use testbed::sandbox::{Sandbox, until};

use crate::tests;
use machine::{Model, Phase, Step, step};

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    every_walk_gets_runc_v2s_answers_and_events_in_order,
    requests_at_the_same_time_leave_one_consistent_story,
);

/// Walks per run; each has about 20 steps, and runc is called in most of them.
const WALKS: u32 = 30;

/// One container under test.
struct Subject<'a> {
    shim: Shim,
    sandbox: &'a Sandbox,
    listener: &'a Listener,
    id: String,
    /// How often it was created, and so is to be deleted.
    creations: AtomicUsize,
}

impl<'a> Subject<'a> {
    fn new(sandbox: &'a Sandbox, listener: &'a Listener) -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("c{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Ok(Self {
            shim: Shim::connect(sandbox)?,
            sandbox,
            listener,
            id,
            creations: AtomicUsize::new(0),
        })
    }

    fn exec_id(exec: u8) -> String {
        format!("e{exec}")
    }

    fn create(&self) -> ttrpc::Result<()> {
        let failed = |error: anyhow::Error| ttrpc::Error::Others(format!("{error:#}"));
        let bundle = Bundle::new(self.sandbox, &self.id, &["sleep", "1000"]).map_err(failed)?;
        let note = BundleNote {
            events: self.listener.path().display().to_string(),
            ..BundleNote::default()
        };
        note.write(bundle.path())
            .map_err(|error| failed(error.into()))?;
        self.shim.create(&self.id, bundle.path())?;
        self.creations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn kill(&self, exec: &str) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal: 9,
            ..api::KillRequest::default()
        };
        self.shim
            .tasks
            .kill(self.shim.metadata(), &request)
            .map(drop)
    }

    fn delete(&self, exec: &str) -> ttrpc::Result<()> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::DeleteRequest::default()
        };
        self.shim
            .tasks
            .delete(self.shim.metadata(), &request)
            .map(drop)
    }

    fn wait(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::WaitRequest::default()
        };
        self.shim
            .tasks
            .wait(self.shim.metadata(), &request)
            .map(|response| response.exit_status)
    }

    fn start(&self, exec: &str) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::StartRequest::default()
        };
        self.shim
            .tasks
            .start(self.shim.metadata(), &request)
            .map(drop)
    }

    fn add_exec(&self, exec: &str) -> ttrpc::Result<()> {
        let process = r#"{"args":["sleep","1000"],"cwd":"/","env":["PATH=/bin"]}"#;
        let spec = protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.into(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            spec: protobuf::MessageField::some(spec),
            ..api::ExecProcessRequest::default()
        };
        self.shim
            .tasks
            .exec(self.shim.metadata(), &request)
            .map(drop)
    }

    fn perform(&self, step: Step) -> ttrpc::Result<()> {
        let (id, metadata) = (self.id.clone(), self.shim.metadata());
        let tasks = &self.shim.tasks;
        match step {
            Step::Create => self.create(),
            Step::Start => self.start(""),
            Step::Kill => self.kill(""),
            Step::Pause => tasks
                .pause(
                    metadata,
                    &api::PauseRequest {
                        id,
                        ..Default::default()
                    },
                )
                .map(drop),
            Step::Resume => tasks
                .resume(
                    metadata,
                    &api::ResumeRequest {
                        id,
                        ..Default::default()
                    },
                )
                .map(drop),
            Step::Delete => self.delete(""),
            Step::State => self.shim.state(&id).map(drop),
            Step::Stats => tasks
                .stats(
                    metadata,
                    &api::StatsRequest {
                        id,
                        ..Default::default()
                    },
                )
                .map(drop),
            Step::Pids => match tasks.pids(
                metadata,
                &api::PidsRequest {
                    id,
                    ..Default::default()
                },
            ) {
                Ok(list) if list.processes.is_empty() => {
                    Err(ttrpc::Error::Others("no pids".into()))
                }
                answer => answer.map(drop),
            },
            Step::AddExec(exec) => self.add_exec(&Self::exec_id(exec)),
            Step::StartExec(exec) => self.start(&Self::exec_id(exec)),
            Step::KillExec(exec) => self.kill(&Self::exec_id(exec)),
            Step::DeleteExec(exec) => self.delete(&Self::exec_id(exec)),
        }
    }

    /// Ends what is left, whatever state it is in.
    fn remove(&self) -> anyhow::Result<()> {
        let _ = self.perform(Step::Resume);
        // Who is told that it has finished may be told so before its end is settled: containerd's
        // clients wait then, too.
        let finished = |error: &ttrpc::Error| error.to_string().contains("already finished");
        match self.kill("") {
            Err(error) if !finished(&error) => {}
            _ => drop(self.wait("")?),
        }
        match self.delete("") {
            Err(error) if !error.to_string().contains("container not created") => {
                bail!("{} stays: {error}", self.id)
            }
            _ => Ok(()),
        }
    }
}

/// Takes the steps one after the other and compares each answer.
fn walk(subject: &Subject<'_>, steps: &[Step]) -> anyhow::Result<()> {
    let mut model = Model::default();
    for (number, &step) in steps.iter().enumerate() {
        // A killed exec in a frozen container ends only later; the model has no word for that.
        if matches!(step, Step::KillExec(_)) && model.init == Some(Phase::Paused) {
            continue;
        }
        let expected = model.expects(step);
        match (subject.perform(step), expected) {
            (Ok(()), None) => {}
            (Err(error), Some(words)) if error.to_string().contains(words) => continue,
            (answer, expected) => {
                bail!("step {number}, {step:?} in {model:?}: {answer:?}, expected {expected:?}")
            }
        }
        // Ends are asynchronous: the model goes on when they are known.
        let killed = match step {
            Step::Kill => Some(String::new()),
            Step::KillExec(exec) => Some(Subject::exec_id(exec)),
            _ => None,
        };
        if let Some(process) = killed {
            let code = subject.wait(&process)?;
            ensure!(code == 137, "step {number}, {step:?}: code {code}");
        }
        if step == Step::Kill {
            for (exec, _) in model
                .execs
                .iter()
                .filter(|(_, phase)| **phase == Phase::Running)
            {
                subject.wait(&Subject::exec_id(*exec))?;
            }
        }
        model.take(step);
    }
    Ok(())
}

/// The guarantees of `docs/shim-contract.md`, "Order of exits", for each life of one container.
fn check_events(heard: &[Heard]) -> anyhow::Result<()> {
    for life in heard.split_inclusive(|event| event.topic == "delete") {
        let place = |topic: &str, exec: Option<&str>| -> anyhow::Result<Option<usize>> {
            let mut found = life
                .iter()
                .enumerate()
                .filter(|(_, event)| event.topic == topic && event.exec.as_deref() == exec);
            let first = found.next().map(|(place, _)| place);
            // An exec's id may be used again once it was deleted, which has no event of its own.
            ensure!(
                found.next().is_none() || exec.is_some(),
                "{topic} twice: {life:?}"
            );
            Ok(first)
        };
        let topics = ["create", "start", "exit", "delete"].map(|topic| place(topic, None));
        let mut last = None;
        for found in topics {
            let found = found?;
            ensure!(found.is_none() || found > last, "out of order: {life:?}");
            last = found.or(last);
        }
        if let Some(end) = place("exit", None)? {
            // Declaring an exec may overlap with the end, as in runc-v2: it never runs.
            let harmless = ["delete", "exec-added"];
            ensure!(
                life.iter()
                    .skip(end + 1)
                    .all(|event| harmless.contains(&event.topic.as_str())),
                "after the init's exit: {life:?}"
            );
        }
        let mut started = BTreeMap::new();
        for event in life {
            let Some(exec) = &event.exec else { continue };
            let phase = started.entry(exec.clone()).or_insert("gone");
            *phase = match (event.topic.as_str(), *phase) {
                ("exec-added", "gone" | "ended" | "added") => "added",
                ("exec-started", "added") => "started",
                ("exit", "started") => "ended",
                other => bail!("{exec}: {other:?} in {life:?}"),
            };
        }
    }
    Ok(())
}

/// Waits until everything sent was heard: a container's last event, or none if it never was.
fn settled(subject: &Subject<'_>) -> anyhow::Result<Vec<Heard>> {
    let of_it = || -> Vec<Heard> {
        subject
            .listener
            .heard()
            .into_iter()
            .filter(|event| event.container == subject.id)
            .collect()
    };
    until("all events are told", || {
        let told = of_it();
        let deleted = told.iter().filter(|event| event.topic == "delete");
        Ok(deleted.count() == subject.creations.load(Ordering::Relaxed)
            && told.last().is_none_or(|last| last.topic == "delete"))
    })?;
    Ok(of_it())
}

fn with_daemon(stage: &Stage) -> anyhow::Result<(Sandbox, Listener)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let listener = Listener::listen(sandbox.directory())?;
    Ok((sandbox, listener))
}

fn every_walk_gets_runc_v2s_answers_and_events_in_order(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, listener) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let config = Config {
        cases: WALKS,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let walks = proptest::collection::vec(step(), 8..28);
    let result = runner.run(&walks, |steps| {
        let one = || -> anyhow::Result<()> {
            let subject = Subject::new(&sandbox, &listener)?;
            let walked = walk(&subject, &steps);
            subject.remove()?;
            walked?;
            check_events(&settled(&subject)?)?;
            let _ = fs::remove_dir_all(sandbox.directory().join("bundles"));
            Ok(())
        };
        one().map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    result.map_err(|failure| anyhow::anyhow!("{failure}"))?;
    before.wait_for_return(&sandbox)
}

fn requests_at_the_same_time_leave_one_consistent_story(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, listener) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let mut runner = TestRunner::deterministic();
    for _ in 0..8 {
        let subject = Subject::new(&sandbox, &listener)?;
        let walks: Vec<Vec<Step>> = (0..4)
            .map(|_| {
                proptest::collection::vec(step(), 12)
                    .new_tree(&mut runner)
                    .map(|tree| tree.current())
            })
            .collect::<Result<_, _>>()
            .map_err(|reason| anyhow::anyhow!("{reason}"))?;
        subject.create()?;
        std::thread::scope(|scope| {
            for walk in &walks {
                let subject = &subject;
                // Whatever the answers are, there must be one.
                scope.spawn(move || {
                    walk.iter()
                        .filter(|step| **step != Step::Create)
                        .for_each(|step| drop(subject.perform(*step)));
                });
            }
        });
        subject.remove()?;
        let heard = settled(&subject)?;
        check_events(&heard)?;
        let exits = heard
            .iter()
            .filter(|event| event.topic == "exit" && event.exec.is_none())
            .count();
        ensure!(
            exits == 1,
            "{exits} exits: {heard:?}\n{walks:?}\n{}",
            sandbox.daemon_log()
        );
    }
    fs::remove_dir_all(sandbox.directory().join("bundles"))?;
    before.wait_for_return(&sandbox)
}
