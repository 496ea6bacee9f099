//! [`PtraceMonitor`]: another monitor's word on *that* a process is dead, and the tracer's on
//! *how*, where that one has none or is less sure.

use std::collections::VecDeque;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use exit_monitor::process::{Process, ProcessIdentity, parse_stat_field};
use exit_monitor::{
    Adopted, Backend, Evidence, Exactness, ExitMonitor, ExitRecord, Guarantees, Known, Survives,
    WatchError, Watched,
};
use tracing::warn;

use crate::tracer::{Refusal, Tracer};

/// Learns of exits as the tracer of processes that are not our children.
#[derive(Debug)]
pub struct PtraceMonitor {
    readiness: Arc<dyn ExitMonitor>,
    tracer: Tracer,
    /// Exits that were taken from the readiness and not given away: who waits for them may stop
    /// waiting at any moment.
    taken: Mutex<VecDeque<ExitRecord>>,
}

impl PtraceMonitor {
    /// Starts the tracer thread. `readiness` tells that a process is dead, and how our own children
    /// died.
    pub fn open(readiness: Arc<dyn ExitMonitor>) -> Result<Self, WatchError> {
        let tracer = Tracer::start().map_err(|source| WatchError::Kernel {
            call: "starting the tracer",
            pid: 0,
            source,
        })?;
        Ok(Self {
            readiness,
            tracer,
            taken: Mutex::default(),
        })
    }

    async fn trace(&self, identity: ProcessIdentity) -> Result<(), String> {
        if is_our_child(identity) {
            return Ok(());
        }
        match self.tracer.watch(identity).await {
            Ok(()) | Err(Refusal::Ended) => Ok(()),
            Err(Refusal::No(why)) => Err(why),
        }
    }

    async fn improve(&self, mut record: ExitRecord) -> ExitRecord {
        // Those can have the main thread's code: see Evidence::Zombie and Evidence::PidfdInfo.
        let is_better = matches!(
            record.evidence,
            Evidence::Zombie | Evidence::PidfdInfo | Evidence::None
        );
        if is_better && let Some(status) = self.tracer.status(record.process).await {
            (record.status, record.evidence) = (status, Evidence::Ptrace);
        }
        record
    }
}

impl PtraceMonitor {
    fn taken(&self) -> MutexGuard<'_, VecDeque<ExitRecord>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By the parent's number in `/proc/PID/stat`; a wrong answer for a process that has just ended
/// does no harm.
fn is_our_child(identity: ProcessIdentity) -> bool {
    const PARENT: usize = 4;
    let stat = fs::read(format!("/proc/{}/stat", identity.pid)).unwrap_or_default();
    parse_stat_field(&stat, PARENT) == Some(u64::from(std::process::id()))
}

#[async_trait]
impl ExitMonitor for PtraceMonitor {
    fn backend(&self) -> Backend {
        Backend::Ptrace
    }

    fn guarantees(&self) -> Guarantees {
        GUARANTEES
    }

    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        let identity = process.identity();
        self.trace(identity)
            .await
            .map_err(|why| WatchError::Unsupported {
                backend: Backend::Ptrace,
                why,
            })?;
        match self.readiness.watch(process).await {
            Ok(Watched::Armed) => Ok(Watched::Armed),
            Ok(Watched::Ended(record)) => Ok(Watched::Ended(self.improve(record).await)),
            Err(error) => {
                self.tracer.unwatch(identity);
                Err(error)
            }
        }
    }

    async fn adopt(&self, known: Vec<Known>) -> Result<Vec<Adopted>, WatchError> {
        for known in &known {
            if let Err(why) = self.trace(known.identity).await {
                warn!(
                    pid = known.identity.pid,
                    why, "cannot trace a process: other sources report its exit"
                );
            }
        }
        let mut adopted = self.readiness.adopt(known).await?;
        for found in &mut adopted {
            if let Adopted::Ended(record) = found {
                *record = self.improve(*record).await;
            }
        }
        Ok(adopted)
    }

    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        let mut batch = Vec::new();
        if self.taken().is_empty() {
            self.readiness.next_exits(&mut batch).await?;
            self.taken().extend(batch);
        }
        loop {
            let Some(next) = self.taken().front().copied() else {
                return Ok(());
            };
            let improved = self.improve(next).await;
            self.taken().pop_front();
            into.push(improved);
        }
    }

    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.tracer.untrack(process);
        self.readiness.confirm(process).await
    }

    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.tracer.unwatch(process);
        self.readiness.unwatch(process).await
    }
}

/// Nothing is known of an exit while no tracer runs.
pub(crate) const GUARANTEES: Guarantees = Guarantees {
    survives: Survives::Nothing,
    others: Exactness::Always,
    exact_time: false,
};
