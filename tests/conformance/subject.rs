//! [`Family`]: processes that end as they are told, and their parent, whose verdict counts. The
//! parent is not us: what a backend knows of our own children proves nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use embedshim_core::clock::BootTime;
use embedshim_core::exit::{Evidence, Exactness, ExitRecord, ExitStatus, Guarantees};
use embedshim_core::process::{Process, ProcessIdentity};
use embedshim_tests::Answers;
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

/// The helper program: compiled once, or brought along into a guest.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(given) = std::env::var_os("EMBEDSHIM_TEST_SHAPES") {
            return given.into();
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let program = directory.join(format!("shapes-{}", std::process::id()));
        testbed::image::compile_shapes(&program).unwrap();
        program
    })
}

/// Processes and their parent.
pub(crate) struct Family {
    parent: Child,
    orders: ChildStdin,
    answers: Answers<ChildStdout>,
    pub(crate) members: Vec<Arc<Process>>,
    pub(crate) shape: String,
}

impl Family {
    /// One process.
    pub(crate) fn of_one(shape: &[&str]) -> Self {
        Self::new("parent", 1, shape)
    }

    /// Several, each in the same shape; `"#"` as its code is the number of the process.
    pub(crate) fn new(role: &str, size: usize, shape: &[&str]) -> Self {
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

    pub(crate) fn first(&self) -> &Arc<Process> {
        &self.members[0]
    }

    pub(crate) fn identity(&self) -> ProcessIdentity {
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

    /// Lets them end.
    pub(crate) fn let_go(&mut self) {
        self.order("g");
    }

    /// Sends all of them a signal.
    pub(crate) fn signal(&mut self, signal: i32) {
        self.order(&format!("k {signal}"));
    }

    /// The parent waits for them: how each ended.
    pub(crate) fn verdicts(&mut self) -> Vec<ExitStatus> {
        self.order("w");
        (0..self.members.len())
            .map(|_| ExitStatus::from_wait_status(self.answer()))
            .collect()
    }

    /// Lets the only one end, and tells how and when it did.
    pub(crate) fn end(&mut self, signal: Option<i32>) -> Verdict {
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

    /// Another process with the number of the first, which has ended. None where nobody may choose numbers (Linux 5.5).
    pub(crate) fn reuse(&mut self, code: u8) -> Option<Arc<Process>> {
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

/// What the parent says.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    shape: String,
    pub(crate) process: ProcessIdentity,
    pub(crate) status: ExitStatus,
    earliest: BootTime,
    latest: BootTime,
}

impl Verdict {
    /// A record is right if it agrees with the parent, or says that it does not know where the backend never promised to.
    pub(crate) fn check(&self, record: &ExitRecord, promised: Guarantees, what: &str) {
        assert_eq!(record.process, self.process, "{what}");
        check_status(record, self.status, promised, &self.shape);
        assert!(record.at >= self.earliest, "{what}: before its end");
        if promised.exact_time {
            assert!(record.at <= self.latest, "{what}: not the time of the end");
        }
    }
}

/// A status is the parent's, or unknown or the main thread's where the backend has said so.
pub(crate) fn check_status(
    record: &ExitRecord,
    verdict: ExitStatus,
    promised: Guarantees,
    shape: &str,
) {
    let is_excused = match promised.others {
        Exactness::Always => false,
        Exactness::UnlessThreadsRace => {
            record.evidence == Evidence::PidfdInfo && Some(record.status) == main_threads_own(shape)
        }
        // Zombies that show the main thread's code are those of kernels before 5.17, which have no better.
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
