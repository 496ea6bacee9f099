//! Lives through containerd, by `ctr`. A command may fail if containerd was killed or stopped
//! meanwhile, or a runtime of its container: then the truth is asked for afterwards. What was known
//! to run before must still be there, and what a `ctr` that was not interrupted has printed must be
//! whole.

use std::ffi::OsStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testbed::image;
use testbed::sandbox::{EMBEDSHIM, Finished, Running, Task, until};

use crate::ground::Ground;
use crate::ledger::DEADLINE;
use crate::program::KILLED;
use crate::random::Random;
use crate::sequence::{Due, lines};

/// What an exec prints.
const EXEC_LINES: u64 = 300;
/// A task that containerd does not have for so long will not come any more.
const ABSENT: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(100);

/// What is done to a container that was started in the background.
#[derive(Clone, Copy, Debug)]
enum Step {
    Exec { code: u32 },
    ExecBackground,
    Pause,
    Metrics,
    Look,
}

/// One container.
#[derive(Clone, Debug)]
enum Life {
    /// `ctr run --rm` in the foreground, which prints so many lines.
    Foreground {
        code: u32,
        after_ms: u64,
        lines: u64,
    },
    /// In the background, until SIGTERM or SIGKILL.
    Background { code: Option<u32>, steps: Vec<Step> },
}

impl Life {
    fn of(random: &mut Random) -> Self {
        let code = random.code();
        if random.chance(40) {
            return Self::Foreground {
                code,
                after_ms: random.millis(500),
                lines: 1 + random.below(20_000),
            };
        }
        let code = random.chance(50).then_some(code);
        let count = random.below(5);
        let steps = (0..count).map(|_| Step::of(random)).collect();
        Self::Background { code, steps }
    }
}

impl Step {
    fn of(random: &mut Random) -> Self {
        match random.below(8) {
            0..=2 => Self::Exec {
                code: random.code(),
            },
            3 => Self::ExecBackground,
            4 => Self::Metrics,
            5 => Self::Look,
            _ => Self::Pause,
        }
    }
}

/// What became of a command.
#[derive(Clone, Debug)]
enum Outcome {
    Done(Finished),
    /// containerd went away under it, or the runtime.
    Interrupted,
}

/// containerd 1.6 that was killed between the making of a snapshot's directory and its database's
/// transaction makes no snapshot until it has collected that garbage (seed 6015741).
fn is_behind_its_death(finished: &Finished) -> bool {
    let words = ["failed to rename", "snapshots/", "file exists"];
    words.iter().all(|word| finished.stderr.contains(word))
}

/// Lives one life. An error is a failure.
pub(crate) fn live(ground: &Ground, id: &str, random: &mut Random) {
    let life = Life::of(random);
    ground.ledger.note(&format!("{id} {life:?}"));
    let container = Container { ground, id };
    let lived = match &life {
        Life::Foreground {
            code,
            after_ms,
            lines,
        } => container.foreground(*code, *after_ms, *lines),
        Life::Background { code, steps } => container.background(*code, steps),
    };
    if let Err(error) = lived {
        ground.ledger.failure(&format!("{id}: {error:#}; {life:?}"));
    }
    ground.ledger.count(|counts| counts.lives += 1);
}

struct Container<'a> {
    ground: &'a Ground,
    id: &'a str,
}

impl Container<'_> {
    /// Runs `ctr`; one that does not end is a request that was not answered.
    fn ctr<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Outcome> {
        let (epoch, mut command) = {
            let sandbox = self.ground.sandbox();
            (self.ground.epoch(), sandbox.ctr(arguments))
        };
        self.run(epoch, &mut command)
    }

    fn run(&self, epoch: u64, command: &mut std::process::Command) -> anyhow::Result<Outcome> {
        let since = Instant::now();
        let words: Vec<_> = command
            .get_args()
            .skip(4)
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let what = format!("{} ctr {}", self.id, words.join(" "));
        self.ground.ledger.note(&format!("{what} ..."));
        let killed = self.runtimes_killed();
        let finished = Running::capture(command)?.finish(DEADLINE);
        let is_without_containerd = self.ground.epoch() != epoch;
        let is_without_runtime = self.runtimes_killed() != killed;
        let is_behind = finished.as_ref().is_ok_and(is_behind_its_death);
        let is_interrupted = is_without_containerd || is_without_runtime || is_behind;
        let answer = match &finished {
            Ok(finished) => format!("{:?} {}", finished.code, finished.stderr.trim()),
            Err(error) => error.to_string(),
        };
        self.ground.ledger.answered(&what, &answer, since.elapsed());
        match finished {
            // A command that has succeeded has, whatever happened beside it.
            Ok(finished) if finished.code == Some(0) || !is_interrupted => {
                Ok(Outcome::Done(finished))
            }
            Err(error) if !is_interrupted => Err(error.context("request not answered")),
            // Whatever was killed, it is answered.
            Err(error) if !is_without_containerd => Err(error.context("request not answered")),
            _ => {
                if is_without_containerd || is_behind {
                    self.ground.ledger.interrupted(self.id);
                } else {
                    self.ground.ledger.count(|counts| counts.refused += 1);
                }
                Ok(Outcome::Interrupted)
            }
        }
    }

    fn runtimes_killed(&self) -> u64 {
        self.ground.ledger.all_runtimes_killed(self.id)
    }

    fn start(&self, options: &[&str], command: &[&str]) -> anyhow::Result<Outcome> {
        let (epoch, mut command) = {
            let sandbox = self.ground.sandbox();
            (self.ground.epoch(), sandbox.run(options, self.id, command))
        };
        self.run(epoch, &mut command)
    }

    /// The task, as containerd sees it when it is there.
    fn task(&self) -> anyhow::Result<Option<Task>> {
        let mut task = None;
        until("containerd tells of its tasks", || {
            let (epoch, found) = {
                let sandbox = self.ground.sandbox();
                (self.ground.epoch(), sandbox.find_task(self.id))
            };
            match found {
                // containerd asks for at most 2 s, and a daemon may be away for longer.
                Ok(Some(found)) if found.status == "UNKNOWN" => Ok(false),
                Ok(found) => {
                    task = found;
                    Ok(true)
                }
                Err(_) if self.ground.epoch() != epoch => Ok(false),
                Err(error) => Err(error),
            }
        })?;
        Ok(task)
    }

    fn foreground(&self, code: u32, after_ms: u64, lines: u64) -> anyhow::Result<()> {
        let script = format!(
            "seq 1 {lines}; sleep {}.{:03}; exit {code}",
            after_ms / 1000,
            after_ms % 1000
        );
        match self.start(&["--rm"], &["sh", "-c", &script])? {
            Outcome::Done(finished) => {
                self.told("ctr run", finished.code, code)
                    .with_context(|| finished.stderr)?;
                self.compare("ctr run", &finished.stdout, lines)?;
                let left = self.task()?;
                ensure!(left.is_none(), "the task is still there: {left:?}");
                Ok(())
            }
            Outcome::Interrupted => self.settle(&[code, KILLED], false),
        }
    }

    fn background(&self, code: Option<u32>, steps: &[Step]) -> anyhow::Result<()> {
        let term = code.map(|code| code.to_string());
        let command: Vec<&str> = match &term {
            Some(code) => vec!["guest", "until-term", code],
            None => vec!["sleep", "100000"],
        };
        match self.start(&["--detach"], &command)? {
            Outcome::Interrupted => return self.settle(&[KILLED], false),
            Outcome::Done(finished) if finished.code == Some(0) => {}
            Outcome::Done(finished) => bail!("it does not start: {}", finished.stderr),
        }
        let task = self
            .task()?
            .context("it runs, and containerd has no task")?;
        ensure!(task.status == "RUNNING", "{task:?}");
        for (number, &step) in steps.iter().enumerate() {
            self.take(number, step)
                .with_context(|| format!("{step:?}"))?;
        }
        if let Some(code) = code {
            crate::direct::handles_term(task.pid.unsigned_abs())?;
            return self.end("TERM", code);
        }
        self.end("KILL", KILLED)
    }

    fn take(&self, number: usize, step: Step) -> anyhow::Result<()> {
        match step {
            Step::Exec { code } => {
                self.ground.ledger.count(|counts| counts.execs += 1);
                let script = format!("seq 1 {EXEC_LINES}; exit {code}");
                let name = format!("e{number}");
                let exec = ["task", "exec", "--exec-id", &name, self.id];
                let exec = exec.into_iter().chain(["sh", "-c", &script]);
                match self.ctr(exec)? {
                    Outcome::Done(finished) => {
                        self.told("ctr task exec", finished.code, code)
                            .with_context(|| finished.stderr)?;
                        self.compare(&name, &finished.stdout, EXEC_LINES)?;
                    }
                    Outcome::Interrupted => {}
                }
            }
            Step::ExecBackground => {
                self.ground.ledger.count(|counts| counts.execs += 1);
                let name = format!("e{number}");
                let exec = ["task", "exec", "--detach", "--exec-id", &name, self.id];
                self.succeeds(&self.ctr(exec.into_iter().chain(["sleep", "100000"]))?)?;
            }
            Step::Pause => {
                self.succeeds(&self.ctr(["task", "pause", self.id])?)?;
                self.thaw()?;
            }
            Step::Metrics => self.succeeds(&self.ctr(["task", "metrics", self.id])?)?,
            Step::Look => {}
        }
        // Whatever was interrupted: who runs is never lost.
        let task = self.task()?.context("the container is lost")?;
        ensure!(task.status == "RUNNING", "{task:?}");
        Ok(())
    }

    /// Resumes until it runs: of a request that was interrupted it is unknown whether it arrived.
    fn thaw(&self) -> anyhow::Result<()> {
        until("it is resumed", || {
            let task = self.task()?.context("the container is lost")?;
            if task.status == "RUNNING" {
                return Ok(true);
            }
            if let Outcome::Done(finished) = self.ctr(["task", "resume", self.id])? {
                ensure!(finished.code == Some(0), "{}", finished.stderr);
            }
            Ok(false)
        })
    }

    fn succeeds(&self, outcome: &Outcome) -> anyhow::Result<()> {
        match outcome {
            Outcome::Done(finished) if finished.code != Some(0) => {
                bail!("{}: {}", self.id, finished.stderr)
            }
            _ => Ok(()),
        }
    }

    fn end(&self, signal: &str, code: u32) -> anyhow::Result<()> {
        match self.ctr(["task", "kill", "--signal", signal, self.id])? {
            Outcome::Done(finished) => ensure!(finished.code == Some(0), "{}", finished.stderr),
            // Perhaps it was sent: then a second one may find no process.
            Outcome::Interrupted => {
                let _ = self.ctr(["task", "kill", "--signal", signal, self.id])?;
            }
        }
        self.settle(&[code], true)
    }

    /// Brings a container to its end that ends by itself, was killed, or of which it is unknown how
    /// far its start had come.
    fn settle(&self, due: &[u32], is_known: bool) -> anyhow::Result<()> {
        let mut absent_since = None;
        until("the container has ended", || match self.task()? {
            None if is_known => bail!("the container is lost"),
            // The daemon finishes what a containerd that is gone has asked for: it may be there a
            // moment later.
            None => {
                let since = *absent_since.get_or_insert_with(Instant::now);
                sleep(LOOK);
                Ok(since.elapsed() > ABSENT)
            }
            Some(task) if task.status == "STOPPED" => Ok(true),
            Some(_) => {
                absent_since = None;
                if !is_known {
                    self.kill_whatever_it_is()?;
                }
                Ok(false)
            }
        })?;
        self.delete(due, is_known)?;
        // `--rm` may have done it; and containerd may have come between.
        let _ = self.ctr(["container", "rm", self.id])?;
        Ok(())
    }

    /// Kills a task. `ctr run --rm` that was interrupted may have removed the container of a task
    /// that containerd finds when it is back, and `ctr` asks for a task by its container.
    fn kill_whatever_it_is(&self) -> anyhow::Result<()> {
        let killed = self.ctr(["task", "kill", "--signal", "KILL", self.id])?;
        if let Outcome::Done(finished) = killed
            && finished.stderr.contains("ctr: container")
            && finished.stderr.contains("not found")
        {
            let create = ["container", "create", "--runtime", EMBEDSHIM];
            let _ = self.ctr(create.into_iter().chain([image::NAME, self.id, "true"]))?;
        }
        Ok(())
    }

    /// Deletes a stopped task. One of which it is unknown how far its start had come may be gone
    /// when containerd asks for it: the launcher cleans up what containerd has given up.
    fn delete(&self, due: &[u32], is_known: bool) -> anyhow::Result<()> {
        while let Some(task) = self.task()? {
            ensure!(task.status == "STOPPED", "{task:?}");
            let killed = self.runtimes_killed();
            let (epoch, told) = {
                let sandbox = self.ground.sandbox();
                (self.ground.epoch(), sandbox.delete_task(self.id))
            };
            match told {
                Ok(told) => {
                    let told = u32::try_from(told)?;
                    self.ground.ledger.code(self.id, "ctr task rm", told, due);
                    return Ok(());
                }
                Err(_) if self.ground.epoch() != epoch || self.runtimes_killed() != killed => {}
                Err(error) if !is_known && error.to_string().contains("not found") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What `ctr` printed is what the process did.
    fn compare(&self, source: &str, came: &str, count: u64) -> anyhow::Result<()> {
        let all = lines(1, count);
        let due = Due {
            at_least: all.len(),
            all,
        };
        let name = format!("{} {source}", self.id);
        if let Err(why) = due.check(came.as_bytes()) {
            self.ground.keep_evidence(&name, came.as_bytes());
            bail!("{name}: {why}");
        }
        self.ground.ledger.stream(&name, came.len(), 0);
        Ok(())
    }

    fn told(&self, source: &str, told: Option<i32>, due: u32) -> anyhow::Result<()> {
        let told = told.context("ctr was killed")?;
        let told = u32::try_from(told)?;
        self.ground.ledger.code(self.id, source, told, &[due]);
        ensure!(told == due, "{source} tells {told} instead of {due}");
        Ok(())
    }
}
