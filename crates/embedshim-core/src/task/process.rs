//! [`TaskProcess`]: one process of a task, its place in its [`Lifecycle`], its descriptors and what
//! is known of it. Never calls the runtime, writes a record or emits an event.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::clock::BootTime;
use crate::error::Error;
use crate::exit::ExitRecord;
use crate::fdstore::{FdRole, ProcessFds};
use crate::id::ExecId;
use crate::process::{Process, ProcessIdentity};
use crate::stdio::{self, Of, PipeInodes, StdioPaths, Streams};
use crate::task::api::Exit;
use crate::task::context::{RequestContext, RequestId};
use crate::task::lifecycle::{Effect, Lifecycle, Operation, Phase, Refusal, Transition};
use crate::task::record::{FailedStart, ProcessRecord, StartMark};
use crate::task::store::Saved;

/// A process of a task.
#[derive(Debug)]
pub(crate) struct TaskProcess {
    pub(crate) exec: Option<ExecId>,
    pub(crate) stdio: StdioPaths,
    /// The request that made it; an init's is its task's.
    pub(crate) made_by: Option<RequestId>,
    /// Its descriptors that outlive this daemon.
    pub(crate) fds: ProcessFds,
    /// The queue of mutations: one at a time, first come, first served (invariant 7). Reads and
    /// exits do not take it.
    mutations: Arc<Semaphore>,
    state: watch::Sender<State>,
    facts: Mutex<Facts>,
}

/// Where it is in its life, as all readers find it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) lifecycle: Lifecycle,
    /// 0 as long as there is no process.
    pub(crate) pid: u32,
}

impl State {
    pub(crate) fn phase(self) -> Phase {
        self.lifecycle.phase()
    }

    pub(crate) fn exit(self) -> Option<Exit> {
        self.lifecycle.exit()
    }
}

/// What is known of it, none of which decides what may happen to it next.
#[derive(Debug, Default)]
struct Facts {
    process: Option<Arc<Process>>,
    identity: Option<ProcessIdentity>,
    streams: Option<Arc<Streams>>,
    pipes: PipeInodes,
    stdin_closed: bool,
    logger: Option<ProcessIdentity>,
    spec: Option<String>,
    /// The request for which the runtime was called to start it. It stays, so that
    /// the same request is recognised when it comes again.
    start: Option<StartMark>,
    failed_start: Option<FailedStart>,
}

impl TaskProcess {
    /// A process that does not exist yet.
    pub(crate) fn new(
        exec: Option<ExecId>,
        stdio: StdioPaths,
        spec: Option<String>,
        made_by: Option<RequestId>,
        fds: ProcessFds,
    ) -> Self {
        let record = ProcessRecord {
            stdio,
            spec,
            made_by,
            ..ProcessRecord::default()
        };
        Self::restored(exec, record, fds)
    }

    /// A process as it was recorded. It has no descriptors yet.
    pub(crate) fn restored(exec: Option<ExecId>, record: ProcessRecord, fds: ProcessFds) -> Self {
        let state = State {
            lifecycle: Lifecycle::recorded(
                record.phase,
                record.exit,
                record.start_failed,
                record.may_have_run,
            ),
            pid: record.identity.map_or(0, |identity| positive(identity.pid)),
        };
        let facts = Facts {
            identity: record.identity,
            spec: record.spec,
            stdin_closed: record.stdin_closed,
            pipes: record.pipes,
            logger: record.logger,
            start: record.start,
            failed_start: record.failed_start,
            ..Facts::default()
        };
        Self {
            exec,
            stdio: record.stdio,
            made_by: record.made_by,
            fds,
            mutations: Arc::new(Semaphore::new(1)),
            state: watch::Sender::new(state),
            facts: Mutex::new(facts),
        }
    }

    /// Waits until no other mutation of this process is in flight, and keeps others out while the
    /// permit lives.
    pub(crate) async fn lock_mutations(&self) -> Result<OwnedSemaphorePermit, Error> {
        Arc::clone(&self.mutations)
            .acquire_owned()
            .await
            .map_err(|closed| Error::Internal(closed.to_string()))
    }

    /// The same without waiting; `None` if a mutation is in flight.
    pub(crate) fn try_lock_mutations(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.mutations).try_acquire_owned().ok()
    }

    /// Where it is in its life.
    pub(crate) fn now(&self) -> State {
        *self.state.borrow()
    }

    /// Changes where it is in its life, or refuses and changes nothing.
    fn apply(&self, transition: Transition) -> Result<Effect, Refusal> {
        let mut answer = Ok(Effect::None);
        self.state.send_if_modified(|state| {
            let before = state.lifecycle;
            answer = state.lifecycle.apply(transition);
            state.lifecycle != before
        });
        answer
    }

    /// Changes where it is in its life; false if that is not possible from where it is, because it
    /// has ended meanwhile.
    pub(crate) fn advance(&self, transition: Transition) -> bool {
        self.apply(transition).is_ok()
    }

    /// Waits for the end, or for a start that failed: then with Go's zero time, as runc-v2 answers.
    pub(crate) async fn ended(&self) -> Result<Exit, Error> {
        let mut state = self.state.subscribe();
        let over = state
            .wait_for(|now| {
                matches!(
                    now.lifecycle,
                    Lifecycle::Stopped { .. } | Lifecycle::StartFailed { .. }
                )
            })
            .await;
        over.map(|now| now.exit().unwrap_or_else(never_ran))
            .map_err(|closed| Error::Internal(closed.to_string()))
    }

    /// The runtime is about to start it: what is found of it after a restart is this request's
    /// work.
    pub(crate) fn mark_start(&self, request: Option<RequestId>) {
        let mut facts = self.facts();
        facts.failed_start = None;
        facts.start = Some(StartMark {
            request,
            ticks: BootTime::now().ticks(),
            program: facts.process.as_ref().and_then(|process| process.program()),
        });
    }

    /// It was not started after all.
    pub(crate) fn unmark_start(&self) {
        self.facts().start = None;
    }

    /// The request for which the runtime was called to start it, if it was.
    pub(crate) fn start_mark(&self) -> Option<StartMark> {
        self.facts().start.clone()
    }

    /// Whether this request is the one that started it, before a restart.
    pub(crate) fn was_started_by(&self, context: &RequestContext) -> bool {
        self.start_mark()
            .is_some_and(|mark| context.is_retry_of(mark.request))
            && (self.now().phase() != Phase::Created)
    }

    /// Its start has failed. To be saved before [`fail_start`](Self::fail_start) lets waiters see
    /// it: they are told that it never ran, so the request must not start it after a restart.
    pub(crate) fn note_failed_start(&self, failed: FailedStart) {
        let mut facts = self.facts();
        facts.start = None;
        facts.failed_start = Some(failed);
    }

    /// What this request was refused with, before a restart.
    pub(crate) fn refusal_of(&self, context: &RequestContext) -> Option<Error> {
        let failed = self.facts().failed_start.clone()?;
        context.is_retry_of(failed.request).then(|| failed.error())
    }

    /// An operation begins that makes, starts or examines it: an exit waits until
    /// [`release`](Self::release). Refused in runc-v2's words if it has ended meanwhile.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        if self.apply(Transition::Begin).is_ok() {
            return Ok(());
        }
        self.admit_first_start()?;
        self.now().lifecycle.admit(Operation::Start)?;
        // It ended just now, and that is not visible yet.
        Err(Error::WrongState("cannot start a stopped process"))
    }

    /// The operation is over, its event emitted; gives the exit that waited for that.
    pub(crate) fn release(&self) -> Option<ExitRecord> {
        match self.apply(Transition::Release) {
            Ok(Effect::Settle(record)) => Some(record),
            // It ended or failed, and the operation with it.
            Ok(Effect::None) | Err(_) => None,
        }
    }

    /// A monitor reports its exit. Gives it back if it is to be concluded now: not if it waits for
    /// an operation, nor if the process has ended already.
    pub(crate) fn report(&self, record: ExitRecord) -> Option<ExitRecord> {
        match self.apply(Transition::Report(record)) {
            Ok(Effect::Settle(record)) => Some(record),
            Ok(Effect::None) | Err(_) => None,
        }
    }

    /// The exit that waits for an operation, if it has come.
    pub(crate) fn early_exit(&self) -> Option<ExitRecord> {
        match self.now().lifecycle {
            Lifecycle::Starting { early } | Lifecycle::Started { early } => early,
            _ => None,
        }
    }

    /// Its start came to nothing: waiters get their answer, an exit that waits is of no interest.
    pub(crate) fn fail_start(&self) {
        self.fail(Transition::Fail {
            may_have_run: false,
        });
    }

    /// Nothing tells whether this exec has run: it is never started again (invariant 20).
    pub(crate) fn fail_as_maybe_run(&self) {
        self.fail(Transition::Fail { may_have_run: true });
    }

    fn fail(&self, how: Transition) {
        let mut facts = self.facts();
        facts.streams = None;
        facts.start = None;
        drop(facts);
        self.fds.remove_all();
        // A process that has ended stays ended.
        let _ = self.apply(how);
    }

    /// Refuses the start of an exec that may have run.
    pub(crate) fn admit_first_start(&self) -> Result<(), Error> {
        match (&self.exec, self.now().lifecycle) {
            (Some(exec), Lifecycle::StartFailed { may_have_run: true }) => Err(Error::MayHaveRun {
                id: exec.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// What was made of it is undone: the task is again one whose init does not exist. The client's
    /// ends stay, for another attempt.
    pub(crate) fn unmake(&self) {
        let mut facts = self.facts();
        facts.process = None;
        facts.identity = None;
        facts.streams = None;
        drop(facts);
        stdio::discard_pipes(&self.fds);
        self.fds.remove(&[FdRole::Pidfd]);
        let _ = self.apply(Transition::Unmake);
        self.state.send_modify(|state| state.pid = 0);
    }

    /// It has a pid now.
    pub(crate) fn set_process(&self, process: Arc<Process>) {
        let identity = process.identity();
        self.facts().process = Some(process);
        self.set_identity(identity);
    }

    /// It had this pid.
    pub(crate) fn set_identity(&self, identity: ProcessIdentity) {
        self.facts().identity = Some(identity);
        self.state
            .send_modify(|state| state.pid = positive(identity.pid));
    }

    /// Keeps its streams.
    pub(crate) fn connect(&self, streams: Streams) {
        let mut facts = self.facts();
        if facts.stdin_closed {
            streams.close_stdin();
        }
        // It may have ended before its streams were taken up.
        let lifecycle = self.now().lifecycle;
        if lifecycle.known_exit().is_some() {
            streams.end_of_process();
        }
        if lifecycle.exit().is_some() {
            streams.exit_is_published();
        }
        facts.streams = Some(Arc::new(streams));
    }

    /// Its streams, if it has any now.
    pub(crate) fn streams(&self) -> Option<Arc<Streams>> {
        self.facts().streams.clone()
    }

    /// Lets go of its streams, for good.
    pub(crate) fn disconnect(&self) {
        self.facts().streams = None;
        self.fds.remove_all();
    }

    /// Closes our end of its input, now or as soon as there is one.
    pub(crate) fn close_stdin(&self) {
        let mut facts = self.facts();
        facts.stdin_closed = true;
        if let Some(streams) = &facts.streams {
            streams.close_stdin();
        }
    }

    /// Decides whether its input outlives its client, before it may read. To be durable before
    /// [`begin_input`](Self::begin_input).
    pub(crate) fn decide_stdin(&self) {
        stdio::decide_input(&self.fds);
    }

    /// It may read its input from now on, which is kept open if that was decided. Idempotent.
    pub(crate) fn begin_input(&self) {
        let facts = self.facts();
        if let Some(streams) = &facts.streams {
            streams.begin_input(facts.stdin_closed);
        }
    }

    /// Which pipes it was given.
    pub(crate) fn note_pipes(&self) {
        let pipes = stdio::pipe_inodes(&self.fds);
        self.facts().pipes = pipes;
    }

    /// Which pipes it was given, and whether the writer of its input was given up.
    pub(crate) fn pipes(&self) -> (PipeInodes, bool) {
        let facts = self.facts();
        (facts.pipes, facts.stdin_closed)
    }

    /// What kind of process it is.
    pub(crate) fn kind(&self) -> Of {
        match self.exec {
            None => Of::Init,
            Some(_) => Of::Exec,
        }
    }

    /// This program reads its output.
    pub(crate) fn logs_by(&self, logger: ProcessIdentity) {
        self.facts().logger = Some(logger);
    }

    /// The program that reads its output.
    pub(crate) fn logger(&self) -> Option<ProcessIdentity> {
        self.facts().logger
    }

    /// The program that reads its output, to be ended by the caller.
    pub(crate) fn take_logger(&self) -> Option<ProcessIdentity> {
        self.facts().logger.take()
    }

    /// The living process, if it lives.
    pub(crate) fn process(&self) -> Option<Arc<Process>> {
        self.facts().process.clone()
    }

    /// Who it is or was.
    pub(crate) fn identity(&self) -> Option<ProcessIdentity> {
        self.facts().identity
    }

    /// The OCI `Process` of an exec that was not started.
    pub(crate) fn spec(&self) -> Option<String> {
        self.facts().spec.clone()
    }

    /// Started: the document is of no use any more.
    pub(crate) fn forget_spec(&self) {
        self.facts().spec = None;
    }

    /// Notes how it ended, to be saved before it is [published](Self::publish_end). False if that
    /// was known already.
    pub(crate) fn end(&self, exit: Exit) -> bool {
        let is_first = self.apply(Transition::End(exit)).is_ok();
        self.facts().process = None;
        is_first
    }

    /// Lets clients see its end, which was saved or could not be (invariant 3).
    pub(crate) fn publish_end(&self, _: &Result<Saved, Error>) {
        let _ = self.apply(Transition::Publish);
    }

    /// What there is to record.
    pub(crate) fn record(&self) -> ProcessRecord {
        let facts = self.facts();
        let lifecycle = self.now().lifecycle;
        let failed = match lifecycle {
            Lifecycle::StartFailed { may_have_run } => Some(may_have_run),
            _ => None,
        };
        ProcessRecord {
            stdin_closed: facts.stdin_closed,
            pipes: facts.pipes,
            logger: facts.logger,
            phase: lifecycle.phase_to_record(),
            stdio: self.stdio.clone(),
            identity: facts.identity,
            exit: lifecycle.known_exit(),
            spec: facts.spec.clone(),
            number: self.fds.number(),
            made_by: self.made_by,
            start: facts.start.clone(),
            start_failed: failed.is_some() || facts.failed_start.is_some(),
            failed_start: facts.failed_start.clone(),
            may_have_run: failed.unwrap_or(false),
        }
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds from Go's zero time (year 1) to the epoch: what containerd's shims answer for "never".
#[expect(
    clippy::duration_suboptimal_units,
    reason = "containerd's constant is in seconds"
)]
const GO_ZERO_BEFORE_EPOCH: Duration = Duration::from_secs(62_135_596_800);

/// The answer to waiters of an exec whose start failed: Go's zero time stands for "never" in
/// containerd's API.
fn never_ran() -> Exit {
    Exit {
        code: 0,
        at: UNIX_EPOCH
            .checked_sub(GO_ZERO_BEFORE_EPOCH)
            .unwrap_or(UNIX_EPOCH),
        status: None,
        evidence: None,
    }
}

/// Pids are positive; containerd counts them unsigned.
fn positive(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}
