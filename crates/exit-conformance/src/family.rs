//! [`Family`]: processes that end as they are told, and their parent, whose verdict counts. The
//! parent is not the test program: what a monitor knows of its own children proves nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use exit_monitor::process::{Process, ProcessIdentity};
use exit_monitor::{BootTime, Evidence, Exactness, ExitRecord, ExitStatus, Guarantees};

use crate::answers::Answers;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// How long a parent may take to answer: a process that does not end, since a monitor holds it up,
/// fails its check.
const ANSWER: Duration = Duration::from_mins(1);

/// Thousands of pidfds are open at once.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer, the crowds fail and say why.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// The C program whose processes end as they are told; `src/shapes.c` lists what it can do.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let given = std::env::var_os("EXIT_CONFORMANCE_PROGRAM");
        given.map_or_else(|| concat!(env!("OUT_DIR"), "/shapes").into(), PathBuf::from)
    })
}

/// Processes that end as they are told, and their parent, which is not this program. Dropped, it
/// kills all of them.
pub struct Family {
    parent: Child,
    orders: ChildStdin,
    answers: Answers<ChildStdout>,
    /// The processes, in the order in which the parent started them.
    pub members: Vec<Arc<Process>>,
    pub(crate) shape: String,
}

impl Family {
    /// One process, which ends in this shape: a name of `src/shapes.c`, and its argument.
    pub fn of_one(shape: &[&str]) -> Self {
        Self::new("parent", 1, shape)
    }

    /// Several processes of one shape; `"#"` as its argument is the number of the process.
    ///
    /// `role` is `"parent"`, or `"nested"` for processes in a pid namespace of their own each.
    pub fn new(role: &str, size: usize, shape: &[&str]) -> Self {
        let mut parent = Command::new(program())
            .args([role, &size.to_string()])
            .args(shape)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = parent.stdin.take().unwrap();
        let answers = Answers::new(parent.stdout.take().unwrap());
        let mut family = Self {
            parent,
            orders,
            answers,
            members: Vec::new(),
            shape: shape[0].to_owned(),
        };
        for _ in 0..size {
            let pid = family.answer();
            family.members.push(Arc::new(Process::open(pid).unwrap()));
        }
        family
    }

    /// The first process.
    pub fn first(&self) -> &Arc<Process> {
        &self.members[0]
    }

    /// The first process's identity.
    pub fn identity(&self) -> ProcessIdentity {
        self.first().identity()
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn answer(&mut self) -> i32 {
        let line = self.answers.next_within(ANSWER);
        let line = line.unwrap_or_else(|error| panic!("{}: no answer: {error}", self.shape));
        line.trim().parse().expect("the parent's answer")
    }

    /// Lets all of them end.
    pub fn let_go(&mut self) {
        self.order("g");
    }

    /// Lets the parent send all of them a signal.
    pub fn signal(&mut self, signal: i32) {
        self.order(&format!("k {signal}"));
    }

    /// Lets the parent wait for all of them: how each ended.
    pub fn verdicts(&mut self) -> Vec<ExitStatus> {
        self.order("w");
        (0..self.members.len())
            .map(|_| ExitStatus::from_wait_status(self.answer()))
            .collect()
    }

    /// Lets the only process end, waits for that, and tells how and when it ended.
    pub fn end(&mut self, signal: Option<i32>) -> Verdict {
        let earliest = BootTime::now();
        self.let_go();
        if let Some(signal) = signal {
            self.signal(signal);
        }
        let status = self.verdicts()[0];
        Verdict {
            process: self.identity(),
            shape: self.shape.clone(),
            status,
            earliest,
            latest: BootTime::now(),
        }
    }

    /// Another process with the pid of the first, which has ended and is reaped. None where pids
    /// cannot be chosen (before Linux 5.5, or without the right to).
    pub fn reuse(&mut self, code: u8) -> Option<Arc<Process>> {
        self.order(&format!("r {code}"));
        let pid = self.answer();
        (pid > 0).then(|| Arc::new(Process::open(pid).unwrap()))
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        let _ = self.parent.kill();
        for member in &self.members {
            let _ = member.signal(9);
        }
        let _ = self.parent.wait();
    }
}

/// How and when a process ended, by its own parent.
#[derive(Clone, Debug)]
pub struct Verdict {
    shape: String,
    /// Which process.
    pub process: ProcessIdentity,
    /// The status that the parent's `waitpid` returned.
    pub status: ExitStatus,
    earliest: BootTime,
    latest: BootTime,
}

impl Verdict {
    /// Panics, naming `what`, if the record is wrong: it has to agree with the parent, except where
    /// the monitor never promised to know.
    pub fn check(&self, record: &ExitRecord, promised: Guarantees, what: &str) {
        assert_eq!(record.process, self.process, "{what}");
        check_status(record, self.status, promised, &self.shape);
        assert!(record.at >= self.earliest, "{what}: before its end");
        if promised.exact_time {
            assert!(record.at <= self.latest, "{what}: not the time of the end");
        }
    }
}

/// Panics if the record's status is neither the parent's nor one that `promised` excuses: unknown,
/// or the main thread's own.
pub fn check_status(record: &ExitRecord, verdict: ExitStatus, promised: Guarantees, shape: &str) {
    let is_excused = match promised.others {
        Exactness::Always => false,
        Exactness::UnlessThreadsRace => {
            record.evidence == Evidence::PidfdInfo && Some(record.status) == main_threads_own(shape)
        }
        // Before 5.17 a zombie shows the main thread's code, and the kernel has no better one.
        Exactness::UntilReaped => {
            !record.status.is_known()
                || record.evidence == Evidence::Zombie
                    && is_before_5_17()
                    && Some(record.status) == main_threads_own(shape)
        }
    };
    if !is_excused {
        assert_eq!(record.status, verdict, "{shape}: {record:?}");
    }
}

fn is_before_5_17() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (5, 17)
}

/// How the main thread of a shape ends, where that is not how the process does.
fn main_threads_own(shape: &str) -> Option<ExitStatus> {
    match shape {
        "leader-first"
        | "leader-first-others-return"
        | "leader-gone-thread-exec"
        | "leader-gone-then-signal"
        | "reboot"
        | "reboot-beside-threads"
        | "leader-gone-thread-reboots" => Some(ExitStatus::Exited(0)),
        "leader-exits-5-others-live" => Some(ExitStatus::Exited(5)),
        "all-at-once" => Some(ExitStatus::Exited(12)),
        "thread-reboots" | "child-reboots" => Some(ExitStatus::Signaled {
            signal: 9,
            core_dumped: false,
        }),
        _ => None,
    }
}
