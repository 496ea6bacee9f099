//! [`BpfMonitor`]: the kernel's records, around a monitor that tells when a process is dead. Owns
//! the bookkeeping of who is tracked; the order of authority between the two is here and nowhere
//! else.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use aya::maps::MapError;
use exit_monitor::process::{Process, ProcessIdentity};
use exit_monitor::{
    Adopted, Backend, Choice, Evidence, Exactness, ExitMonitor, ExitRecord, ExitStatus, Guarantees,
    Known, Survives, WatchError, Watched,
};
use tracing::warn;

use crate::maps::{Maps, Recorded, number};
use crate::pins::Pins;
use crate::program::{Loading, OpenError, Program};

/// How to open a [`BpfMonitor`].
#[derive(Clone, Debug)]
pub struct BpfConfig {
    /// Where on bpffs the program is pinned, see [`pin_dir_for`](crate::pin_dir_for).
    pub pin_dir: PathBuf,
    /// How many processes can be watched at once; about 160 bytes of kernel memory each.
    pub capacity: u32,
    /// How the program is loaded.
    pub loading: Loading,
}

/// Learns of exits from the kernel's own records.
///
/// It decorates another monitor, which tells *when* a process is dead, and whose word on *how*
/// counts more if it comes from `waitid` or from the kernel's pidfd information. The time is always
/// the program's: that of the exit itself.
#[derive(Debug)]
pub struct BpfMonitor {
    readiness: Arc<dyn ExitMonitor>,
    state: Mutex<State>,
    survives: Survives,
}

#[derive(Debug)]
struct State {
    program: Program,
    /// Who is tracked under which number.
    tracked: HashMap<u32, ProcessIdentity>,
    /// Records of processes whose number another one has got before they were confirmed.
    replaced: HashMap<ProcessIdentity, Recorded>,
}

impl BpfMonitor {
    /// Takes over the program pinned by a predecessor, or loads and pins it.
    ///
    /// A directory of pins has one monitor at a time, in whatever process: what it does not
    /// [adopt](ExitMonitor::adopt), it forgets.
    pub fn open(config: &BpfConfig, readiness: Arc<dyn ExitMonitor>) -> Result<Self, OpenError> {
        let program = Program::open(
            &Pins::new(&config.pin_dir),
            config.capacity,
            &config.loading,
        )?;
        Ok(Self::with(program, readiness, Survives::Everything))
    }

    /// Takes over the program pinned by a predecessor of the same version; `None` if there is none.
    /// That it records is shown by the exit of a child; there is nothing else to probe for, which
    /// would take a new daemon longer than everything else it does.
    pub fn resume(config: &BpfConfig, readiness: Arc<dyn ExitMonitor>) -> Option<Self> {
        let program = Program::resume(&Pins::new(&config.pin_dir), config.capacity)?;
        Some(Self::with(program, readiness, Survives::Everything))
    }

    /// Opens what [probing](crate::probe) has found: [pinned](Self::open) if `choice` promises that
    /// records survive us, else [unpinned](Self::open_unpinned).
    pub fn open_chosen(
        choice: Choice,
        config: &BpfConfig,
        readiness: Arc<dyn ExitMonitor>,
    ) -> Result<Self, OpenError> {
        if choice.guarantees.survives == Survives::Everything {
            Self::open(config, readiness)
        } else {
            Self::open_unpinned(config.capacity, &config.loading, readiness)
        }
    }

    /// Records for as long as this value lives, where there is no bpffs.
    pub fn open_unpinned(
        capacity: u32,
        loading: &Loading,
        readiness: Arc<dyn ExitMonitor>,
    ) -> Result<Self, OpenError> {
        let program = Program::open_unpinned(capacity, loading)?;
        let survives = readiness.guarantees().survives;
        Ok(Self::with(program, readiness, survives))
    }

    fn with(program: Program, readiness: Arc<dyn ExitMonitor>, survives: Survives) -> Self {
        let state = State {
            program,
            tracked: HashMap::new(),
            replaced: HashMap::new(),
        };
        Self {
            readiness,
            state: Mutex::new(state),
            survives,
        }
    }

    /// How many processes can be watched at once.
    pub fn capacity(&self) -> u32 {
        self.state().program.maps.capacity()
    }

    /// The readiness' record, improved by the kernel's.
    fn improve(&self, mut record: ExitRecord) -> ExitRecord {
        let Some(Recorded { status, at }) = self.state().recorded(record.process) else {
            return record;
        };
        record.at = at;
        if record.evidence != Evidence::Wait {
            (record.status, record.evidence) = (status, Evidence::Bpf);
        } else if without_core_bit(record.status) != without_core_bit(status) {
            warn!(
                pid = record.process.pid,
                kernel = %status,
                told = %record.status,
                evidence = ?record.evidence,
                "two sources disagree on how a process ended: reporting the second"
            );
        }
        record
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `waitid` by pidfd tells of a core dump that a limit or handler then prevented; the program reads
/// what was meant.
fn without_core_bit(status: ExitStatus) -> ExitStatus {
    match status {
        ExitStatus::Signaled { signal, .. } => ExitStatus::Signaled {
            signal,
            core_dumped: false,
        },
        other => other,
    }
}

impl State {
    fn maps(&mut self) -> &mut Maps {
        &mut self.program.maps
    }

    /// Tracks the process, and nothing else under its number.
    fn track(&mut self, identity: ProcessIdentity) -> Result<(), WatchError> {
        let number = number(identity);
        match self.tracked.get(&number).copied() {
            Some(same) if same == identity => return Ok(()),
            Some(old) => {
                if let Some(record) = self.maps().record(old) {
                    self.replaced.insert(old, record);
                }
                self.maps().remove(number);
                self.tracked.remove(&number);
            }
            None => {}
        }
        let capacity = self.maps().capacity();
        // As many entries in `tracked` as `exited` has room for: then recording can't fail.
        if self.tracked.len() >= usize::try_from(capacity).unwrap_or(usize::MAX) {
            return Err(WatchError::TableFull { capacity });
        }
        self.maps()
            .track(identity)
            .map_err(|error| kernel(identity, error))?;
        self.tracked.insert(number, identity);
        Ok(())
    }

    fn recorded(&self, identity: ProcessIdentity) -> Option<Recorded> {
        self.replaced
            .get(&identity)
            .copied()
            .or_else(|| self.program.maps.record(identity))
    }

    fn untrack(&mut self, identity: ProcessIdentity) {
        self.replaced.remove(&identity);
        let number = number(identity);
        if self.tracked.get(&number) == Some(&identity) {
            self.tracked.remove(&number);
            self.maps().remove(number);
        }
    }
}

fn kernel(identity: ProcessIdentity, error: MapError) -> WatchError {
    let source = std::io::Error::other(error);
    WatchError::Kernel {
        call: "BPF_MAP_UPDATE_ELEM",
        pid: identity.pid,
        source,
    }
}

#[async_trait]
impl ExitMonitor for BpfMonitor {
    fn backend(&self) -> Backend {
        Backend::Bpf
    }

    fn guarantees(&self) -> Guarantees {
        Guarantees {
            survives: self.survives,
            others: Exactness::Always,
            exact_time: true,
        }
    }

    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        let identity = process.identity();
        self.state().track(identity)?;
        match self.readiness.watch(process).await {
            Ok(Watched::Armed) => Ok(Watched::Armed),
            Ok(Watched::Ended(record)) => Ok(Watched::Ended(self.improve(record))),
            Err(error) => {
                self.state().untrack(identity);
                Err(error)
            }
        }
    }

    async fn adopt(&self, known: Vec<Known>) -> Result<Vec<Adopted>, WatchError> {
        {
            let mut state = self.state();
            let numbers: HashSet<u32> = known.iter().map(|known| number(known.identity)).collect();
            let present = state
                .maps()
                .tracked()
                .into_iter()
                .chain(state.maps().recorded());
            for number in present.collect::<HashSet<_>>().difference(&numbers) {
                state.maps().remove(*number);
            }
            // Of several with one number only the youngest can live, and it may be recorded over
            // the others.
            let mut youngest = HashMap::new();
            for identity in known.iter().map(|known| known.identity) {
                let found = youngest.entry(number(identity)).or_insert(identity);
                let older = if identity.start_ticks > found.start_ticks {
                    std::mem::replace(found, identity)
                } else {
                    identity
                };
                if older != *found
                    && let Some(record) = state.maps().record(older)
                {
                    state.replaced.insert(older, record);
                }
            }
            for identity in youngest.into_values() {
                // Where the pins were lost it is tracked only from here on; where not, this writes
                // what is there.
                if let Err(error) = state.track(identity) {
                    warn!(pid = identity.pid, %error, "cannot record the exit of a process: other sources report it");
                }
            }
        }
        let adopted = self.readiness.adopt(known).await?;
        let improved = adopted.into_iter().map(|found| match found {
            Adopted::Ended(record) => Adopted::Ended(self.improve(record)),
            armed @ Adopted::Armed(_) => armed,
        });
        Ok(improved.collect())
    }

    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        let before = into.len();
        self.readiness.next_exits(into).await?;
        for record in into.iter_mut().skip(before) {
            *record = self.improve(*record);
        }
        Ok(())
    }

    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.state().untrack(process);
        self.readiness.confirm(process).await
    }

    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.state().untrack(process);
        self.readiness.unwatch(process).await
    }
}
