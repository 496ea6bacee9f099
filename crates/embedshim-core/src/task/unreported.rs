//! The process of an exec that the OCI runtime has started and not reported: the runtime was killed
//! before it wrote the pid file. Owns how it is recognised among the processes of its container;
//! never starts or ends one.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use crate::blocking::blocking;
use crate::cgroup::Cgroup;
use crate::process::Process;
use crate::stdio::{self, PipeInodes};
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// How long a process may be on its way from the runtime's own code to the exec's program.
const SETTLING: Duration = Duration::from_secs(5);
/// The time between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);

/// Finds the living process of this exec, if there is one. Of one that cannot be told from another
/// nothing is said.
pub(in crate::task) async fn find(task: &Arc<Task>, process: &Arc<TaskProcess>) -> Option<Process> {
    let deadline = tokio::time::Instant::now() + SETTLING;
    loop {
        // Each time: other execs are started meanwhile.
        let search = Search::of(task, process)?;
        let is_late = tokio::time::Instant::now() > deadline;
        match blocking(move || search.look()).await.ok()? {
            Sight::Nothing => return None,
            Sight::One(process, Executes::Exec) => return Some(process),
            Sight::One(process, Executes::Runtime) if is_late => return Some(process),
            Sight::Several if is_late => return None,
            // A runtime's own process ends when it finds that the one that began it is gone, or
            // goes on to become the exec.
            Sight::One(..) | Sight::Several => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Which processes there are that could be it.
enum Sight {
    Nothing,
    One(Process, Executes),
    /// Some of them execute the runtime's code, or have the exec's pipes as it has: the runtime has
    /// several on its way.
    Several,
}

/// Whose code a process executes.
enum Executes {
    Runtime,
    Exec,
}

/// What is known of the process.
struct Search {
    cgroup: Cgroup,
    /// Those are other processes.
    known: Vec<i32>,
    /// No other exec of the container is being started.
    is_only: bool,
    has_own_pid_namespace: bool,
    /// The start time, in ticks, that it cannot have begun before.
    not_before: u64,
    pipes: PipeInodes,
    /// The file name of the runtime's program.
    runtime: OsString,
}

impl Search {
    fn of(task: &Task, process: &TaskProcess) -> Option<Self> {
        let (known, starting) = task.known_pids();
        // Those of a start that has failed are closed already.
        let kept = stdio::pipe_inodes(&process.fds);
        let pipes = if kept.is_empty() {
            process.pipes().0
        } else {
            kept
        };
        Some(Self {
            cgroup: task.cgroup()?,
            known,
            is_only: starting <= 1,
            has_own_pid_namespace: task.has_own_pid_namespace,
            not_before: process.start_mark()?.ticks,
            pipes,
            runtime: task.runtime.program_name(),
        })
    }

    /// Blocks on the cgroup file system and procfs.
    fn look(&self) -> Sight {
        let Ok(members) = self.cgroup.pids() else {
            return Sight::Nothing;
        };
        let is_new = |pid: &&i32| !self.known.contains(pid);
        let began_outside = |process: &Process| {
            let parent = process.parent();
            process.identity().start_ticks >= self.not_before
                && parent.is_some_and(|parent| !members.contains(&parent))
        };
        // What comes into a container has its parent outside; orphans of its processes have its
        // init, if it has a pid namespace of its own.
        let candidates: Vec<Process> = members
            .iter()
            .filter(is_new)
            .filter_map(|&pid| Process::open(pid).ok())
            .filter(began_outside)
            .collect();
        let with_pipes = |process: &Process| self.pipes.are_open_in(process.identity().pid);
        let (mut its, mut others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(with_pipes);
        let process = match (its.len(), others.len()) {
            (1, _) if self.has_own_pid_namespace || self.is_only => its.pop(),
            // It has no pipes, or has closed them.
            (0, 1) if self.has_own_pid_namespace && self.is_only => others.pop(),
            _ => None,
        };
        let is_runtime = |process: &Process| self.is_runtime(process.identity().pid);
        match process {
            Some(process) if is_runtime(&process) => Sight::One(process, Executes::Runtime),
            Some(process) => Sight::One(process, Executes::Exec),
            // A wrapper of the runtime, such as a shell, has the exec's pipes as well.
            None if its.len() > 1 || its.iter().chain(&others).any(is_runtime) => Sight::Several,
            None => Sight::Nothing,
        }
    }

    /// Whether this process executes the runtime, or its copy in memory (runc makes one against
    /// CVE-2019-5736).
    fn is_runtime(&self, pid: i32) -> bool {
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let is_copy = program.to_string_lossy().starts_with("/memfd:");
        is_copy || program.file_name() == Some(&self.runtime)
    }
}
