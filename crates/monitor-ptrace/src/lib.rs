//! The ptrace fallback: not built yet. It says so through the types of the trait, so that probing and selection already
//! know its place: the last resort, for kernels where neither BPF nor pidfds tell an exit status.

use std::sync::Arc;

use async_trait::async_trait;
use embedshim_core::exit::{
    Adopted, Availability, Backend, ExitMonitor, ExitRecord, Guarantees, Survives, WatchError,
    Watched,
};
use embedshim_core::process::{Process, ProcessIdentity};

const WHY: &str = "it is not supported yet; use bpf or pidfd";

/// Would learn of exits as a tracer. It cannot be made: [`open`](Self::open) always refuses.
#[derive(Debug)]
pub struct PtraceMonitor {
    never: std::convert::Infallible,
}

/// What this backend can do here: nothing yet.
pub fn probe() -> Availability {
    Availability {
        backend: Backend::Ptrace,
        features: Vec::new(),
        verdict: Err(WHY.into()),
        remedies: Vec::new(),
    }
}

impl PtraceMonitor {
    /// Always [`WatchError::Unsupported`].
    pub fn open() -> Result<Self, WatchError> {
        Err(WatchError::Unsupported {
            backend: Backend::Ptrace,
            why: WHY.into(),
        })
    }
}

#[async_trait]
impl ExitMonitor for PtraceMonitor {
    fn backend(&self) -> Backend {
        Backend::Ptrace
    }

    fn guarantees(&self) -> Guarantees {
        Guarantees {
            survives: Survives::Nothing,
            exact_for_others: true,
            exact_time: false,
        }
    }

    async fn watch(&self, _process: Arc<Process>) -> Result<Watched, WatchError> {
        match self.never {}
    }

    async fn adopt(&self, _known: &[ProcessIdentity]) -> Result<Vec<Adopted>, WatchError> {
        match self.never {}
    }

    async fn next_exits(&self, _into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        match self.never {}
    }

    async fn confirm(&self, _process: ProcessIdentity) -> Result<(), WatchError> {
        match self.never {}
    }

    async fn unwatch(&self, _process: ProcessIdentity) -> Result<(), WatchError> {
        match self.never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_refuses_in_words() {
        let refused = PtraceMonitor::open().unwrap_err().to_string();
        assert_eq!(
            refused,
            "the ptrace exit monitor cannot run here: it is not supported yet; use bpf or pidfd"
        );
        assert!(probe().verdict.is_err());
    }
}
