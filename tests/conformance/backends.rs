//! The backends under test, each opened as a daemon would, in a place of its own.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use exit_conformance::{CAPACITY, Subject};
use exit_monitor::process::{Process, ProcessIdentity};
use exit_monitor::{
    Adopted, Availability, Backend, Evidence, Exactness, ExitMonitor, ExitRecord, ExitStatus,
    Guarantees, Known, Survives, UnknownReason, WatchError, Watched,
};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

/// A way to learn of exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Pidfd,
    /// As the daemon uses it: BPF's record, and what pidfds tell.
    Bpf,
    /// BPF's record and nothing else: the program has to be right by itself.
    BpfAlone,
    /// Without pins.
    BpfUnpinned,
    /// The same as before Linux 5.8, without a boot clock.
    BpfOldClock,
    /// Loaded by libbpf.
    #[cfg(feature = "libbpf")]
    LibbpfAlone,
    Ptrace,
}

impl Kind {
    const ALL: &[Self] = &[
        Self::Pidfd,
        Self::Bpf,
        Self::BpfAlone,
        Self::BpfUnpinned,
        Self::BpfOldClock,
        #[cfg(feature = "libbpf")]
        Self::LibbpfAlone,
        Self::Ptrace,
    ];

    /// All of them, for the suite.
    pub(crate) fn subjects() -> Vec<Arc<dyn Subject>> {
        let all = Self::ALL.iter();
        all.map(|kind| Arc::new(*kind) as Arc<dyn Subject>)
            .collect()
    }

    /// The backends of which this is true.
    pub(crate) fn all_that(is_wanted: fn(Self) -> bool) -> impl Iterator<Item = Self> {
        Self::ALL
            .iter()
            .copied()
            .filter(move |&kind| is_wanted(kind))
    }

    /// Why this backend cannot run here, if it cannot.
    fn why_not(self) -> Option<String> {
        let pinned = |found: Availability| match found.verdict {
            Ok(_) => found
                .features
                .into_iter()
                .find(|feature| feature.name == "pinned link" && !feature.is_present())
                .map(|feature| format!("{:?}", feature.state)),
            Err(why) => Some(why),
        };
        let bpf = || {
            let wanted = BpfConfig {
                pin_dir: monitor_bpf::pin_dir_for(Path::new("/test")),
                capacity: CAPACITY,
                loading: self.loading(),
            };
            monitor_bpf::probe(&wanted, Survives::Nothing)
        };
        match self {
            Self::Pidfd => monitor_pidfd::probe().verdict.err(),
            Self::BpfUnpinned => bpf().verdict.err(),
            _ if self.is_bpf() => pinned(bpf()),
            _ => monitor_ptrace::probe().verdict.err(),
        }
    }

    /// How its program is loaded.
    pub(crate) fn loading(self) -> Loading {
        Loading {
            #[cfg(feature = "libbpf")]
            loader: if self == Self::LibbpfAlone {
                monitor_bpf::Loader::Libbpf
            } else {
                monitor_bpf::Loader::Aya
            },
            without_boot_clock: self == Self::BpfOldClock,
            ..Loading::default()
        }
    }

    /// Its records outlive the process that has it.
    pub(crate) fn is_pinned(self) -> bool {
        self.is_bpf() && self != Self::BpfUnpinned
    }

    fn is_bpf(self) -> bool {
        !matches!(self, Self::Pidfd | Self::Ptrace)
    }

    fn bpf(
        self,
        state: &Path,
        capacity: u32,
        readiness: Arc<dyn ExitMonitor>,
    ) -> Result<Arc<dyn ExitMonitor>, Box<dyn Error + Send + Sync>> {
        let config = BpfConfig {
            pin_dir: monitor_bpf::pin_dir_for(state),
            capacity,
            loading: self.loading(),
        };
        Ok(Arc::new(BpfMonitor::open(&config, readiness)?))
    }
}

impl Subject for Kind {
    fn name(&self) -> &str {
        match self {
            Self::Pidfd => "pidfd",
            Self::Bpf => "bpf",
            Self::BpfAlone => "bpf-alone",
            Self::BpfUnpinned => "bpf-unpinned",
            Self::BpfOldClock => "bpf-old-clock",
            #[cfg(feature = "libbpf")]
            Self::LibbpfAlone => "libbpf-alone",
            Self::Ptrace => "ptrace",
        }
    }

    fn open(
        &self,
        state: &Path,
        capacity: u32,
    ) -> Result<Arc<dyn ExitMonitor>, Box<dyn Error + Send + Sync>> {
        let pidfd = PidfdMonitor::new()?;
        match self {
            Self::Pidfd => Ok(Arc::new(pidfd)),
            Self::Bpf => self.bpf(state, capacity, Arc::new(pidfd)),
            Self::BpfUnpinned => {
                let readiness = Arc::new(Ignorant(pidfd));
                let loading = self.loading();
                let monitor = BpfMonitor::open_unpinned(capacity, &loading, readiness)?;
                Ok(Arc::new(monitor))
            }
            Self::Ptrace => Ok(Arc::new(PtraceMonitor::open(Arc::new(pidfd))?)),
            _ => self.bpf(state, capacity, Arc::new(Ignorant(pidfd))),
        }
    }

    fn missing(&self) -> Option<String> {
        self.why_not()
    }

    fn is_bounded(&self) -> bool {
        self.is_bpf()
    }

    fn keeps_records(&self) -> bool {
        self.is_pinned()
    }

    fn refuses_shared(&self) -> Option<&str> {
        (*self == Self::Ptrace).then_some("already traced by")
    }

    fn clean_up(&self, state: &Path) {
        let _ = monitor_bpf::remove_pins(&monitor_bpf::pin_dir_for(state));
    }
}

/// Reports that a process is dead, but never how it ended: what a test learns then is the word of
/// the backend around this monitor.
#[derive(Debug)]
struct Ignorant(PidfdMonitor);

fn ignore(mut record: ExitRecord) -> ExitRecord {
    record.status = ExitStatus::Unknown {
        reason: UnknownReason::NotOurChild,
    };
    record.evidence = Evidence::None;
    record
}

#[async_trait]
impl ExitMonitor for Ignorant {
    fn backend(&self) -> Backend {
        self.0.backend()
    }
    fn guarantees(&self) -> Guarantees {
        Guarantees {
            survives: Survives::Nothing,
            others: Exactness::UntilReaped,
            exact_time: false,
        }
    }
    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        Ok(match self.0.watch(process).await? {
            Watched::Ended(record) => Watched::Ended(ignore(record)),
            armed @ Watched::Armed => armed,
        })
    }
    async fn adopt(&self, known: Vec<Known>) -> Result<Vec<Adopted>, WatchError> {
        let adopted = self.0.adopt(known).await?.into_iter();
        Ok(adopted
            .map(|found| match found {
                Adopted::Ended(record) => Adopted::Ended(ignore(record)),
                armed @ Adopted::Armed(_) => armed,
            })
            .collect())
    }
    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        let before = into.len();
        self.0.next_exits(into).await?;
        for record in into.iter_mut().skip(before) {
            *record = ignore(*record);
        }
        Ok(())
    }
    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.0.confirm(process).await
    }
    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.0.unwatch(process).await
    }
}
