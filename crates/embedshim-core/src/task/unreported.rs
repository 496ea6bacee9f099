//! The process of an exec that the OCI runtime has started and not reported: the runtime was killed
//! before it wrote the pid file. Owns how it is recognised among the processes of its container;
//! never starts or ends one.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

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
/// So many processes of its container are in the log.
const SHOWN: usize = 64;
/// Nothing must have been seen for so long. A single look can miss it: neither the list of a
/// cgroup's processes nor what procfs says of each is of one instant.
const ABSENCE: Duration = Duration::from_millis(50);

/// Finds the living process of this exec, if there is one. Of one that cannot be told from another
/// nothing is said.
pub(in crate::task) async fn find(task: &Arc<Task>, process: &Arc<TaskProcess>) -> Option<Process> {
    let mut looks = Looks::begin(Instant::now());
    loop {
        // Each time: other execs are started meanwhile.
        let search = Search::of(task, process)?;
        let (sight, seen) = blocking(move || search.look()).await.ok()?;
        let id = task.id();
        debug!(
            id,
            ?sight,
            ?seen,
            "looking for an exec that the runtime has not reported"
        );
        if let ControlFlow::Break(found) = looks.judge(sight, Instant::now()) {
            return found;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What is made of the looks so far.
struct Looks {
    deadline: Instant,
    last_seen: Instant,
}

impl Looks {
    fn begin(now: Instant) -> Self {
        Self {
            deadline: now + SETTLING,
            last_seen: now,
        }
    }

    /// Whether what was seen now is the end of it.
    fn judge(&mut self, sight: Sight, now: Instant) -> ControlFlow<Option<Process>> {
        let is_late = now > self.deadline;
        match sight {
            Sight::Nothing if now - self.last_seen >= ABSENCE => ControlFlow::Break(None),
            Sight::Nothing => ControlFlow::Continue(()),
            Sight::One(process, Executes::Exec) => ControlFlow::Break(Some(process)),
            Sight::One(process, Executes::Runtime) if is_late => ControlFlow::Break(Some(process)),
            Sight::Several if is_late => ControlFlow::Break(None),
            // A runtime's own process ends when it finds that the one that began it is gone, or
            // goes on to become the exec.
            Sight::One(..) | Sight::Several => {
                self.last_seen = now;
                ControlFlow::Continue(())
            }
        }
    }
}

/// Which processes there are that could be it.
#[derive(Debug)]
enum Sight {
    Nothing,
    One(Process, Executes),
    /// Some of them execute the runtime's code, or have the exec's pipes as it has: the runtime has
    /// several on its way.
    Several,
}

/// Whose code a process executes.
#[derive(Debug)]
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
        // If the descriptor store was lost, the record knows them.
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
            has_own_pid_namespace: task.traits.own_pid_namespace,
            not_before: process.start_mark()?.ticks,
            pipes,
            runtime: task.runtime.program_name(),
        })
    }

    /// Blocks on the cgroup file system and procfs. With what it makes of it come the first
    /// processes of the container, for the log: it may have thousands.
    fn look(&self) -> (Sight, Vec<i32>) {
        let mut members = self.cgroup.pids().unwrap_or_default();
        let sight = self.judge(&members);
        members.truncate(SHOWN);
        (sight, members)
    }

    fn judge(&self, members: &[i32]) -> Sight {
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

    fn is_runtime(&self, pid: i32) -> bool {
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        program.is_ok_and(|program| is_of(&program, &self.runtime))
    }
}

/// Whether a process that executes `program` executes the runtime, or what runc makes of itself
/// against CVE-2019-5736: a copy in memory, or a mount of its file that is detached, whose path is
/// its root.
fn is_of(program: &Path, runtime: &OsStr) -> bool {
    program.to_string_lossy().starts_with("/memfd:")
        || program == Path::new("/")
        || program.file_name() == Some(runtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found by looks that see this, one after the other, and nothing after that.
    fn found(sights: Vec<Sight>) -> Option<i32> {
        let mut now = Instant::now();
        let mut looks = Looks::begin(now);
        let mut sights = sights.into_iter();
        loop {
            let sight = sights.next().unwrap_or(Sight::Nothing);
            if let ControlFlow::Break(found) = looks.judge(sight, now) {
                return found.map(|process| process.identity().pid);
            }
            now += PAUSE;
        }
    }

    fn this(executes: Executes) -> Sight {
        let process = Process::open(std::process::id().cast_signed()).unwrap();
        Sight::One(process, executes)
    }

    #[test]
    fn what_runc_makes_of_itself_is_the_runtime() {
        let is_runc = |program: &str| is_of(Path::new(program), OsStr::new("runc"));
        assert!(is_runc("/usr/sbin/runc"));
        assert!(is_runc("/memfd:runc_cloned:/proc/self/exe (deleted)"));
        // As seen with runc 1.1.
        assert!(is_runc("/"));
        assert!(!is_runc("/bin/sh"));
    }

    #[test]
    fn an_exec_that_a_look_misses_is_found_by_the_next() {
        let pid = Some(std::process::id().cast_signed());
        let missed_first = vec![Sight::Nothing, this(Executes::Exec)];
        assert_eq!(found(missed_first), pid);
        let missed_between = vec![
            this(Executes::Runtime),
            Sight::Nothing,
            Sight::Several,
            Sight::Nothing,
            this(Executes::Exec),
        ];
        assert_eq!(found(missed_between), pid);
    }

    #[test]
    fn a_runtime_that_gives_up_leaves_nothing_to_be_found() {
        assert_eq!(found(Vec::new()), None);
        assert_eq!(found(vec![this(Executes::Runtime), Sight::Several]), None);
    }
}
