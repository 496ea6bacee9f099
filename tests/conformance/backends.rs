//! The backends under test, each opened as a daemon would, in a place of its own.

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::exit::{
    Adopted, Availability, Backend, Evidence, Exactness, ExitMonitor, ExitRecord, ExitStatus,
    Guarantees, Known, Survives, UnknownReason, WatchError, Watched,
};
use embedshim_core::process::{Process, ProcessIdentity};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

/// More than any check takes on an emulated machine.
pub(crate) const LIMIT: Duration = Duration::from_mins(2);
/// Enough for every check but those about a full table.
pub(crate) const CAPACITY: u32 = 8192;

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

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pidfd => "pidfd",
            Self::Bpf => "bpf",
            Self::BpfAlone => "bpf-alone",
            Self::BpfUnpinned => "bpf-unpinned",
            Self::BpfOldClock => "bpf-old-clock",
            #[cfg(feature = "libbpf")]
            Self::LibbpfAlone => "libbpf-alone",
            Self::Ptrace => "ptrace",
        })
    }
}

impl Kind {
    pub(crate) const ALL: &[Self] = &[
        Self::Pidfd,
        Self::Bpf,
        Self::BpfAlone,
        Self::BpfUnpinned,
        Self::BpfOldClock,
        #[cfg(feature = "libbpf")]
        Self::LibbpfAlone,
        Self::Ptrace,
    ];

    /// Why this backend cannot run here, if it cannot.
    pub(crate) fn why_not(self) -> Option<String> {
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

    pub(crate) fn is_bpf(self) -> bool {
        !matches!(self, Self::Pidfd | Self::Ptrace)
    }
}

/// Where one test's daemons pin; gone with the test.
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let name = format!("/test/{}/{number}", std::process::id());
        Self(monitor_bpf::pin_dir_for(Path::new(&name)))
    }

    pub(crate) fn pin_dir(&self) -> &Path {
        &self.0
    }

    pub(crate) fn open(&self, kind: Kind) -> Arc<dyn ExitMonitor> {
        self.open_with(kind, CAPACITY)
    }

    /// A monitor with what its predecessor in this place has left.
    pub(crate) fn open_with(&self, kind: Kind, capacity: u32) -> Arc<dyn ExitMonitor> {
        let pidfd = || Arc::new(PidfdMonitor::new().expect("a pidfd monitor"));
        let ignorant = || Arc::new(Ignorant(PidfdMonitor::new().expect("a pidfd monitor")));
        match kind {
            Kind::Pidfd => pidfd(),
            Kind::Bpf => self.bpf(kind, capacity, pidfd()),
            Kind::BpfUnpinned => {
                let loading = kind.loading();
                Arc::new(BpfMonitor::open_unpinned(capacity, &loading, ignorant()).unwrap())
            }
            Kind::Ptrace => Arc::new(PtraceMonitor::open(pidfd()).unwrap()),
            _ => self.bpf(kind, capacity, ignorant()),
        }
    }

    fn bpf(
        &self,
        kind: Kind,
        capacity: u32,
        readiness: Arc<dyn ExitMonitor>,
    ) -> Arc<dyn ExitMonitor> {
        let config = BpfConfig {
            pin_dir: self.0.clone(),
            capacity,
            loading: kind.loading(),
        };
        Arc::new(BpfMonitor::open(&config, readiness).unwrap_or_else(|error| panic!("{error:?}")))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = monitor_bpf::remove_pins(&self.0);
    }
}

/// Runs a check to its end.
pub(crate) fn block_on(check: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(check);
}

/// The next `count` exits.
pub(crate) async fn next(monitor: &Arc<dyn ExitMonitor>, count: usize) -> Vec<ExitRecord> {
    let mut records = Vec::new();
    while records.len() < count {
        let got = tokio::time::timeout(LIMIT, monitor.next_exits(&mut records)).await;
        got.unwrap_or_else(|_| panic!("{} of {count} exits were told", records.len()))
            .unwrap();
    }
    records
}

/// Tells that a process is dead, but never how: whatever is known then is known by the backend around it.
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
