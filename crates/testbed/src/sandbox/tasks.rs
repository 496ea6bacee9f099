//! What containerd says of a sandbox's tasks.

use anyhow::{Context, bail};

use super::{PATIENCE, Running, Sandbox, until};

/// One line of `ctr task ls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The init's pid.
    pub pid: i32,
    /// `RUNNING`, `STOPPED` ...
    pub status: String,
}

impl Sandbox {
    /// The task of a container, if it has one.
    pub fn find_task(&self, id: &str) -> anyhow::Result<Option<Task>> {
        let list = self.ctr_ok(&["task", "ls"])?;
        let Some(line) = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(id))
        else {
            return Ok(None);
        };
        let mut words = line.split_whitespace().skip(1);
        let pid = words
            .next()
            .and_then(|pid| pid.parse().ok())
            .with_context(|| format!("no pid in {line:?}"))?;
        Ok(Some(Task {
            pid,
            status: words.next().unwrap_or_default().into(),
        }))
    }

    /// The task that a container must have.
    pub fn task(&self, id: &str) -> anyhow::Result<Task> {
        self.find_task(id)?
            .with_context(|| format!("there is no task {id}"))
    }

    /// Waits until a task has this status.
    pub fn wait_for_status(&self, id: &str, status: &str) -> anyhow::Result<()> {
        until(&format!("{id} is {status}"), || {
            Ok(self
                .find_task(id)?
                .is_some_and(|task| task.status == status))
        })
    }

    /// Starts a container in the background and returns its pid.
    pub fn detached(&self, options: &[&str], id: &str, command: &[&str]) -> anyhow::Result<i32> {
        let options: Vec<&str> = ["--detach"].iter().chain(options).copied().collect();
        let finished = Running::capture(&mut self.run(&options, id, command))?.finish(PATIENCE)?;
        if finished.code != Some(0) {
            bail!("{id} does not start: {}", finished.stderr);
        }
        self.task(id).map(|task| task.pid)
    }

    /// Deletes a stopped task and returns the exit code that containerd tells of it.
    pub fn delete_task(&self, id: &str) -> anyhow::Result<i32> {
        let finished = Running::capture(&mut self.ctr(["task", "rm", id]))?.finish(PATIENCE)?;
        // ctr tells a code other than 0 by a warning: task ID exit with non-zero exit code N
        let told = finished
            .stderr
            .rsplit_once("non-zero exit code ")
            .map(|(_, rest)| rest.trim_end_matches(['"', '\n']));
        match (finished.code, told) {
            (Some(0), None) => Ok(0),
            (_, Some(code)) => code.parse().with_context(|| format!("{finished:?}")),
            _ => bail!("task {id} is not deleted: {}", finished.stderr),
        }
    }
}
