//! Which exit monitor runs here: asks each backend, lets the core choose, opens the chosen one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use embedshim_core::exit::{
    Availability, Backend, Choice, ExitMonitor, NoBackend, Survives, choose,
};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

use crate::config::Config;

/// What each backend could do here, cheapest first.
pub(crate) fn candidates(state_dir: &Path, config: &Config) -> Vec<Availability> {
    vec![
        monitor_pidfd::probe(),
        monitor_bpf::probe(&monitor_bpf::pin_dir_for(state_dir), &loading(config)),
        monitor_ptrace::probe(),
    ]
}

fn loading(config: &Config) -> Loading {
    Loading {
        loader: config.monitor.loader.loader(),
        btf: config.monitor.btf.clone(),
        ..Loading::default()
    }
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
        Backend::Bpf if choice.guarantees.survives == Survives::Everything => {
            let config = BpfConfig {
                pin_dir: monitor_bpf::pin_dir_for(state_dir),
                capacity,
                loading: loading(config),
            };
            Arc::new(BpfMonitor::open(&config, Arc::new(readiness()?))?)
        }
        // What probing has found cannot be pinned records for as long as we live.
        Backend::Bpf => Arc::new(BpfMonitor::open_unpinned(
            capacity,
            &loading(config),
            Arc::new(readiness()?),
        )?),
        Backend::Pidfd => Arc::new(readiness()?),
        Backend::Ptrace => Arc::new(PtraceMonitor::open(Arc::new(readiness()?))?),
        other => anyhow::bail!("the {other} exit monitor is not built in"),
    })
}
