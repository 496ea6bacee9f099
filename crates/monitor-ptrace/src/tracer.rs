//! [`Tracer`]: the one thread that all ptrace calls come from, as the kernel demands. Owns the
//! tracees and their last words.
//!
//! Every thread of a process is traced, not only the first: another thread's execve(2) takes the
//! first one's place, and the tracer of the old one would hear nothing of the new (`de_thread` in
//! fs/exec.c).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use exit_monitor::ExitStatus;
use exit_monitor::process::{Process, ProcessIdentity};
use nix::errno::Errno;
use tokio::sync::{Notify, oneshot};
use tracing::{debug, warn};

use crate::sys::{self, Bell, EVENT_STOP, Waited};

/// How long the tracer may take to see the end of a process that is known to be dead.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a process is not traced.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is nothing left to trace.
    Ended,
    /// The reason, in words.
    No(String),
}

#[derive(Debug)]
enum Command {
    Watch(ProcessIdentity, oneshot::Sender<Result<(), Refusal>>),
    Unwatch(ProcessIdentity),
    /// It has ended, and how is known.
    Untrack(ProcessIdentity),
    Stop,
}

/// What the thread and its users share.
#[derive(Debug, Default)]
struct Shared {
    bell: Bell,
    /// Traced processes; with a status once they have ended.
    processes: Mutex<HashMap<ProcessIdentity, Option<ExitStatus>>>,
    changed: Notify,
}

impl Shared {
    fn processes(&self) -> MutexGuard<'_, HashMap<ProcessIdentity, Option<ExitStatus>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tracer thread's handle. When it is dropped, the kernel detaches every tracee, and those go
/// on as they were.
#[derive(Debug)]
pub(crate) struct Tracer {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Tracer {
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (commands, received) = channel();
        let (tell, told) = channel();
        let work = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("tracer".into())
            .spawn(move || {
                let hung = work.bell.hang();
                let is_hung = hung.is_ok();
                // The caller waits for the answer.
                let _ = tell.send(hung);
                if is_hung {
                    Work::new(work, received).run();
                }
            })?;
        told.recv().map_err(io::Error::other)??;
        Ok(Self {
            shared,
            commands,
            thread: Some(thread),
        })
    }

    /// Traces this process.
    pub(crate) async fn watch(&self, identity: ProcessIdentity) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Watch(identity, reply));
        answer
            .await
            .unwrap_or_else(|_| Err(Refusal::No("the tracer thread has ended".into())))
    }

    /// Lets this process go.
    pub(crate) fn unwatch(&self, identity: ProcessIdentity) {
        if self.shared.processes().contains_key(&identity) {
            self.command(Command::Unwatch(identity));
        }
    }

    /// How a dead process ended, if it was traced.
    pub(crate) async fn status(&self, identity: ProcessIdentity) -> Option<ExitStatus> {
        let known = async {
            loop {
                let changed = self.shared.changed.notified();
                match self.shared.processes().get(&identity) {
                    None => return None,
                    Some(Some(status)) => return Some(*status),
                    Some(None) => {}
                }
                changed.await;
            }
        };
        tokio::time::timeout(LAST_WORDS, known)
            .await
            .unwrap_or_default()
    }

    /// Ends the tracking of a process that has ended. Its end may have been seen by `waitid` of
    /// another thread, which finds tracees like children.
    pub(crate) fn untrack(&self, identity: ProcessIdentity) {
        if self.shared.processes().remove(&identity).is_some() {
            // There is time until the thread wakes for something else.
            let _ = self.commands.send(Command::Untrack(identity));
        }
    }

    fn command(&self, command: Command) {
        // Without its thread there is nothing to command, and `watch` says so.
        let _ = self.commands.send(command);
        self.shared.bell.ring();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A traced process, by its number.
#[derive(Debug)]
struct Group {
    identity: ProcessIdentity,
    /// Its threads are detached when they stop next.
    is_leaving: bool,
}

/// The thread's side.
struct Work {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    groups: HashMap<i32, Group>,
    /// Which process each traced thread belongs to.
    threads: HashMap<i32, i32>,
}

impl Work {
    fn new(shared: Arc<Shared>, commands: Receiver<Command>) -> Self {
        Self {
            shared,
            commands,
            groups: HashMap::new(),
            threads: HashMap::new(),
        }
    }

    fn run(mut self) {
        loop {
            match sys::wait() {
                Ok(Waited::Stopped { pid, .. }) if pid == self.shared.bell.pid() => {
                    self.shared.bell.reset();
                }
                Ok(Waited::Ended { pid, .. }) if pid == self.shared.bell.pid() => {
                    warn!("the process that wakes the tracer was killed: starting another");
                    if let Err(error) = self.shared.bell.hang() {
                        warn!(%error, "cannot wake the tracer");
                    }
                }
                Ok(Waited::Stopped { pid, signal, event }) => self.stopped(pid, signal, event),
                Ok(Waited::Ended { pid, status }) => self.ended(pid, status),
                Err(error) => {
                    warn!(%error, "cannot wait for tracees: the tracer thread ends");
                    return;
                }
            }
            // After the bell is reset: what is commanded from here on rings again.
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Watch(identity, reply)) => {
                        // A caller that has gone does not want to know.
                        let _ = reply.send(self.watch(identity));
                    }
                    Ok(Command::Unwatch(identity)) => self.let_go(identity.pid),
                    Ok(Command::Untrack(identity)) => self.untrack(identity),
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => {
                        return self.shared.bell.take_down();
                    }
                    Err(TryRecvError::Empty) => break,
                }
            }
        }
    }

    fn watch(&mut self, identity: ProcessIdentity) -> Result<(), Refusal> {
        let pid = identity.pid;
        // Held until it is seized: the number is its own, and no other's that is traced by it.
        let Ok(process) = Process::reopen(identity) else {
            return Err(Refusal::Ended);
        };
        match self.groups.get_mut(&pid) {
            // One that is leaving may be detached at any moment: it is seized again below, once it
            // has left.
            Some(group) if group.identity == identity && !group.is_leaving => return Ok(()),
            Some(group) => {
                let old = group.identity;
                self.untrack(old);
            }
            None => {}
        }
        self.groups.insert(
            pid,
            Group {
                identity,
                is_leaving: false,
            },
        );
        // New threads of traced ones are traced from the start; those of untraced ones need another
        // look.
        while self.seize_new_threads(pid) > 0 {}
        if self.threads.contains_key(&pid) {
            self.shared.processes().insert(identity, None);
            return Ok(());
        }
        let why = Self::why_not(&process);
        self.let_go(pid);
        if !self.threads.values().any(|&group| group == pid) {
            self.groups.remove(&pid);
        }
        Err(why)
    }

    /// Seizes what is not traced yet; how many that were.
    fn seize_new_threads(&mut self, pid: i32) -> usize {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        let numbers = tasks.filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok());
        let mut seized = 0;
        for tid in numbers.collect::<Vec<_>>() {
            if !self.threads.contains_key(&tid) && sys::seize(tid).is_ok() {
                self.threads.insert(tid, pid);
                seized += 1;
            }
        }
        seized
    }

    /// Why the main thread cannot be seized.
    fn why_not(process: &Process) -> Refusal {
        let pid = process.identity().pid;
        if process.has_ended().unwrap_or(true) {
            return Refusal::Ended;
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let tracer = field("TracerPid:");
        if !tracer.is_empty() && tracer != "0" {
            return Refusal::No(format!("process {pid} is already traced by {tracer}"));
        }
        if field("State:").starts_with('Z') {
            return Refusal::No(format!(
                "the main thread of process {pid} has ended: a tracer is not told of the others' end"
            ));
        }
        let error = sys::seize(pid).err().unwrap_or(Errno::ESRCH.into());
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
        let why = match scope.trim() {
            "3" => "kernel.yama.ptrace_scope is 3".to_owned(),
            _ => "CAP_SYS_PTRACE is needed".to_owned(),
        };
        Refusal::No(format!("PTRACE_SEIZE of process {pid}: {error}; {why}"))
    }

    fn untrack(&mut self, identity: ProcessIdentity) {
        let pid = identity.pid;
        if self
            .groups
            .get(&pid)
            .is_some_and(|group| group.identity == identity)
        {
            self.groups.remove(&pid);
            self.threads.retain(|_, group| *group != pid);
        }
    }

    /// Detaches all threads of a process, each at its next stop.
    fn let_go(&mut self, pid: i32) {
        let Some(group) = self.groups.get_mut(&pid) else {
            return;
        };
        group.is_leaving = true;
        self.shared.processes().remove(&group.identity);
        let threads = self.threads.iter().filter(|(_, group)| **group == pid);
        for (&tid, _) in threads {
            tolerate("PTRACE_INTERRUPT", tid, sys::interrupt(tid));
        }
    }

    fn stopped(&mut self, tid: i32, signal: i32, event: i32) {
        // A new thread's own first stop can come before its creator's report of it.
        let pid = *self.threads.entry(tid).or_insert_with(|| group_of(tid));
        let forwarded = if event == 0 { signal } else { 0 };
        if self.groups.get(&pid).is_none_or(|group| group.is_leaving) {
            tolerate("PTRACE_DETACH", tid, sys::detach(tid, forwarded));
            self.threads.remove(&tid);
            if !self.threads.values().any(|&group| group == pid) {
                self.groups.remove(&pid);
            }
            return;
        }
        let is_group_stop = event == EVENT_STOP
            && matches!(
                signal,
                libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU
            );
        let result = if is_group_stop {
            sys::listen(tid)
        } else {
            sys::go_on(tid, forwarded)
        };
        tolerate("continuing", tid, result);
    }

    /// The main thread's end is reported when it is that of the whole process.
    fn ended(&mut self, tid: i32, status: i32) {
        self.threads.remove(&tid);
        let Some(group) = self.groups.remove(&tid) else {
            return;
        };
        self.threads.retain(|_, pid| *pid != tid);
        let status = ExitStatus::from_wait_status(status);
        if let Some(known) = self.shared.processes().get_mut(&group.identity) {
            *known = Some(status);
        }
        self.shared.changed.notify_waiters();
    }
}

fn group_of(tid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|number| number.trim().parse().ok())
        .unwrap_or(tid)
}

/// A tracee can be killed at any moment, and then no call finds it (ptrace(2), "Death under
/// ptrace").
fn tolerate(call: &str, tid: i32, result: io::Result<()>) {
    if let Err(error) = result {
        debug!(call, tid, %error, "the tracee is gone");
    }
}
