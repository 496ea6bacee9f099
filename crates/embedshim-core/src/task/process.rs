//! One process of a task: its published state, its descriptors and the exit that must not come too early.
//! Owns what a process *is* at any moment; never calls the runtime and never emits an event.

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
use crate::task::context::{Errand, RequestId};
use crate::task::lifecycle::Phase;
use crate::task::store::{ProcessRecord, StartMark};

/// A process of a task.
#[derive(Debug)]
pub(crate) struct TaskProcess {
    pub(crate) exec: Option<ExecId>,
    pub(crate) stdio: StdioPaths,
    /// The request that made it; an init's is its task's.
    pub(crate) made_by: Option<RequestId>,
    /// Its descriptors that outlive this daemon.
    pub(crate) fds: ProcessFds,
    /// The queue of mutations: one at a time, first come, first served. Reads and exits don't take it.
    turn: Arc<Semaphore>,
    published: watch::Sender<Published>,
    live: Mutex<Live>,
}

/// What everybody may see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Published {
    pub(crate) phase: Phase,
    pub(crate) pid: u32,
    pub(crate) exit: Option<Exit>,
    /// The start of this exec failed: its waiters are let go though it never ran.
    pub(crate) start_failed: bool,
}

#[derive(Debug, Default)]
struct Live {
    process: Option<Arc<Process>>,
    identity: Option<ProcessIdentity>,
    streams: Option<Arc<Streams>>,
    pipes: PipeInodes,
    stdin_closed: bool,
    logger: Option<ProcessIdentity>,
    spec: Option<String>,
    start: Option<StartMark>,
    /// Whether this exec has run is not known, nor will be.
    may_have_run: bool,
    /// An operation is between its effect and its event: an exit has to wait behind it.
    starting: bool,
    early_exit: Option<ExitRecord>,
    /// How it ended, known before it is durable and published.
    ended: Option<Exit>,
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

    /// A process as it was remembered. It has no descriptors yet.
    pub(crate) fn restored(exec: Option<ExecId>, record: ProcessRecord, fds: ProcessFds) -> Self {
        let published = Published {
            phase: record.phase,
            pid: record.identity.map_or(0, |identity| positive(identity.pid)),
            exit: record.exit,
            start_failed: record.start_failed,
        };
        let live = Live {
            identity: record.identity,
            spec: record.spec,
            stdin_closed: record.stdin_closed,
            pipes: record.pipes,
            logger: record.logger,
            ended: record.exit,
            start: record.start,
            may_have_run: record.may_have_run,
            ..Live::default()
        };
        Self {
            exec,
            stdio: record.stdio,
            made_by: record.made_by,
            fds,
            turn: Arc::new(Semaphore::new(1)),
            published: watch::Sender::new(published),
            live: Mutex::new(live),
        }
    }

    /// Waits for this process's turn.
    pub(crate) async fn turn(&self) -> Result<OwnedSemaphorePermit, Error> {
        Arc::clone(&self.turn)
            .acquire_owned()
            .await
            .map_err(|closed| Error::Internal(closed.to_string()))
    }

    /// Its turn, if it is free: before anybody knows of the process it is.
    pub(crate) fn turn_now(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.turn).try_acquire_owned().ok()
    }

    /// What everybody may see now.
    pub(crate) fn now(&self) -> Published {
        *self.published.borrow()
    }

    /// Waits for the end, or for a start that failed: then with Go's zero time, as runc-v2 answers.
    pub(crate) async fn ended(&self) -> Result<Exit, Error> {
        let mut published = self.published.subscribe();
        let over = published
            .wait_for(|now| now.exit.is_some() || now.start_failed)
            .await;
        over.map(|now| now.exit.unwrap_or_else(never_ran))
            .map_err(|closed| Error::Internal(closed.to_string()))
    }

    /// Goes from one phase to another, unless it is in neither (because the process ended meanwhile).
    pub(crate) fn advance(&self, from: Phase, to: Phase) -> bool {
        self.published.send_if_modified(|now| {
            let fits = now.phase == from;
            if fits {
                now.phase = to;
            }
            fits
        })
    }

    /// The runtime is about to start it: what is found of it after a restart is this request's work.
    pub(crate) fn mark_start(&self, request: Option<RequestId>) {
        let ticks = BootTime::now().ticks();
        self.live().start = Some(StartMark { request, ticks });
    }

    /// It was not started after all.
    pub(crate) fn unmark_start(&self) {
        self.live().start = None;
    }

    /// Who began to start it, if anybody did.
    pub(crate) fn start_mark(&self) -> Option<StartMark> {
        self.live().start
    }

    /// Whether this errand is the one that started it, in an earlier life.
    pub(crate) fn was_started_by(&self, errand: &Errand) -> bool {
        self.start_mark()
            .is_some_and(|mark| errand.left(mark.request))
            && (self.now().phase != Phase::Created)
    }

    /// From here until [`started`](Self::started) an exit is kept back.
    pub(crate) fn starting(&self) {
        self.live().starting = true;
    }

    /// The events of the operation are out; gives the exit that came meanwhile.
    pub(crate) fn started(&self) -> Option<ExitRecord> {
        let mut live = self.live();
        live.starting = false;
        live.early_exit.take()
    }

    /// The start came to nothing: waiters are let go, an exit that was kept back is moot.
    pub(crate) fn start_failed(&self) {
        let mut live = self.live();
        live.starting = false;
        live.early_exit = None;
        live.streams = None;
        live.start = None;
        drop(live);
        self.fds.forget_all();
        self.published.send_modify(|now| now.start_failed = true);
    }

    /// Nothing tells whether this exec has run: it is not to be started again.
    pub(crate) fn may_have_run(&self) {
        self.live().may_have_run = true;
        self.start_failed();
    }

    /// Refuses the start of an exec of which that is not known.
    pub(crate) fn admit_first_start(&self) -> Result<(), Error> {
        match &self.exec {
            Some(exec) if self.live().may_have_run => Err(Error::MayHaveRun {
                id: exec.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// It was made and is undone: the task is again one whose init does not exist. The client's ends stay, for another attempt.
    pub(crate) fn unmake(&self) {
        let mut live = self.live();
        live.process = None;
        live.identity = None;
        live.streams = None;
        live.early_exit = None;
        drop(live);
        stdio::discard_pipes(&self.fds);
        self.fds.forget(&[FdRole::Pidfd]);
        self.published.send_modify(|now| now.pid = 0);
    }

    /// Keeps the exit back if an operation is under way; gives it back if not.
    pub(crate) fn hold(&self, record: ExitRecord) -> Option<ExitRecord> {
        let mut live = self.live();
        if live.starting {
            live.early_exit = Some(record);
            return None;
        }
        Some(record)
    }

    /// It has a pid now.
    pub(crate) fn runs_as(&self, process: Arc<Process>) {
        let identity = process.identity();
        let mut live = self.live();
        live.identity = Some(identity);
        live.process = Some(process);
        drop(live);
        self.published
            .send_modify(|now| now.pid = positive(identity.pid));
    }

    /// It had this pid, and is gone.
    pub(crate) fn ran_as(&self, identity: ProcessIdentity) {
        self.live().identity = Some(identity);
        self.published
            .send_modify(|now| now.pid = positive(identity.pid));
    }

    /// Keeps its streams.
    pub(crate) fn connect(&self, streams: Streams) {
        let mut live = self.live();
        if live.stdin_closed {
            streams.close_stdin();
        }
        // It may have ended before its streams were taken up.
        if live.ended.is_some() {
            streams.end_of_process();
        }
        if self.now().exit.is_some() {
            streams.exit_is_told();
        }
        live.streams = Some(Arc::new(streams));
    }

    /// Its streams, if it has any now.
    pub(crate) fn streams(&self) -> Option<Arc<Streams>> {
        self.live().streams.clone()
    }

    /// Lets go of its streams, for good.
    pub(crate) fn disconnect(&self) {
        self.live().streams = None;
        self.fds.forget_all();
    }

    /// Closes our end of its input, now or as soon as there is one.
    pub(crate) fn close_stdin(&self) {
        let mut live = self.live();
        live.stdin_closed = true;
        if let Some(streams) = &live.streams {
            streams.close_stdin();
        }
    }

    /// Decides whether its input outlives its client, before it may read. To be durable before [`begin_input`](Self::begin_input).
    pub(crate) fn decide_stdin(&self) {
        stdio::decide_input(&self.fds);
    }

    /// It may read its input from now on, which is kept open if that was decided. Idempotent.
    pub(crate) fn begin_input(&self) {
        let live = self.live();
        if let Some(streams) = &live.streams {
            streams.begin_input(live.stdin_closed);
        }
    }

    /// Which pipes it was given.
    pub(crate) fn note_pipes(&self) {
        let pipes = stdio::pipe_inodes(&self.fds);
        self.live().pipes = pipes;
    }

    /// Which pipes it was given, and whether the writer of its input was given up.
    pub(crate) fn pipes(&self) -> (PipeInodes, bool) {
        let live = self.live();
        (live.pipes, live.stdin_closed)
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
        self.live().logger = Some(logger);
    }

    /// The program that reads its output.
    pub(crate) fn logger(&self) -> Option<ProcessIdentity> {
        self.live().logger
    }

    /// The program that reads its output, to be ended by the caller.
    pub(crate) fn take_logger(&self) -> Option<ProcessIdentity> {
        self.live().logger.take()
    }

    /// The living process, if it lives.
    pub(crate) fn process(&self) -> Option<Arc<Process>> {
        self.live().process.clone()
    }

    /// Who it is or was.
    pub(crate) fn identity(&self) -> Option<ProcessIdentity> {
        self.live().identity
    }

    /// The OCI `Process` of an exec that was not started.
    pub(crate) fn spec(&self) -> Option<String> {
        self.live().spec.clone()
    }

    /// Started: the document is of no use any more.
    pub(crate) fn forget_spec(&self) {
        self.live().spec = None;
    }

    /// Notes how it ended, to be saved before it is [published](Self::publish_end). False if that was known already.
    pub(crate) fn end(&self, exit: Exit) -> bool {
        let mut live = self.live();
        let first = live.ended.is_none();
        live.ended.get_or_insert(exit);
        live.process = None;
        first
    }

    /// Lets everybody see its end.
    pub(crate) fn publish_end(&self) {
        let exit = self.live().ended;
        self.published.send_modify(|now| {
            now.phase = Phase::Stopped;
            now.exit = exit;
        });
    }

    /// What there is to remember.
    pub(crate) fn record(&self) -> ProcessRecord {
        let live = self.live();
        let phase = if live.ended.is_some() {
            Phase::Stopped
        } else {
            self.now().phase
        };
        ProcessRecord {
            stdin_closed: live.stdin_closed,
            pipes: live.pipes,
            logger: live.logger,
            phase,
            stdio: self.stdio.clone(),
            identity: live.identity,
            exit: live.ended,
            spec: live.spec.clone(),
            number: self.fds.number(),
            made_by: self.made_by,
            start: live.start,
            start_failed: self.now().start_failed,
            may_have_run: live.may_have_run,
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds from Go's zero time (year 1) to the epoch: what containerd's shims answer for "never".
#[expect(
    clippy::duration_suboptimal_units,
    reason = "containerd's constant is in seconds"
)]
const GO_ZERO_BEFORE_EPOCH: Duration = Duration::from_secs(62_135_596_800);

/// The answer to waiters of an exec whose start failed: Go's zero time stands for "never" in containerd's API.
fn never_ran() -> Exit {
    Exit {
        code: 0,
        at: UNIX_EPOCH
            .checked_sub(GO_ZERO_BEFORE_EPOCH)
            .unwrap_or(UNIX_EPOCH),
        status: None,
    }
}

/// Pids are positive; containerd counts them unsigned.
fn positive(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}
