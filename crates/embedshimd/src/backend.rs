//! Which exit monitor runs here: asks each backend, lets the core choose, opens the chosen one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use embedshim_core::exit::{Availability, Backend, Choice, ExitMonitor, NoBackend, choose};
use monitor_bpf::{BpfConfig, BpfMonitor};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

use crate::config::Config;

/// What each backend could do here, cheapest first.
pub(crate) fn candidates(state_dir: &Path) -> Vec<Availability> {
    vec![
        monitor_pidfd::probe(),
        monitor_bpf::probe(&monitor_bpf::pin_dir_for(state_dir)),
        monitor_ptrace::probe(),
    ]
}

/// The choice among `candidates` that the configuration allows.
pub(crate) fn select(candidates: &[Availability], config: &Config) -> Result<Choice, NoBackend> {
    choose(candidates, config.monitor.backend.policy())
}

/// Opens the chosen backend.
pub(crate) fn open(
    choice: &Choice,
    config: &Config,
    state_dir: &Path,
) -> anyhow::Result<Arc<dyn ExitMonitor>> {
    let capacity = config.monitor.capacity;
    let readiness = || PidfdMonitor::new().context("cannot set up the pidfd exit monitor");
    Ok(match choice.backend {
        Backend::Bpf => {
            let pin_dir = monitor_bpf::pin_dir_for(state_dir);
            Arc::new(BpfMonitor::open(
                &BpfConfig { pin_dir, capacity },
                Arc::new(readiness()?),
            )?)
        }
        Backend::Pidfd => Arc::new(readiness()?),
        Backend::Ptrace => Arc::new(PtraceMonitor::open(Arc::new(readiness()?))?),
        other => anyhow::bail!("the {other} exit monitor is not built in"),
    })
}
