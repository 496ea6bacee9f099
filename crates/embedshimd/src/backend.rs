//! Which exit monitor runs here: asks each backend, lets the core choose, opens the chosen one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use embedshim_core::exit::{Backend, Choice, ExitMonitor, Report};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

use crate::config::Config;

/// What each backend can do here, and which one the configuration and this machine come to.
pub(crate) fn probe(state_dir: &Path, config: &Config) -> Report {
    let pidfd = monitor_pidfd::probe();
    let readiness = pidfd.survives();
    let wanted = bpf(state_dir, config);
    let backends = vec![
        pidfd,
        monitor_bpf::probe(&wanted, readiness),
        monitor_ptrace::probe(),
    ];
    Report::new(backends, config.monitor.backend.policy())
}

fn bpf(state_dir: &Path, config: &Config) -> BpfConfig {
    BpfConfig {
        pin_dir: monitor_bpf::pin_dir_for(state_dir),
        capacity: config.monitor.capacity,
        loading: Loading {
            loader: config.monitor.loader.loader(),
            btf: config.monitor.btf.clone(),
            ..Loading::default()
        },
    }
}

/// Opens the chosen backend.
pub(crate) fn open(
    choice: Choice,
    config: &Config,
    state_dir: &Path,
) -> anyhow::Result<Arc<dyn ExitMonitor>> {
    let pidfd = PidfdMonitor::new().context("cannot set up the pidfd exit monitor")?;
    let pidfd = Arc::new(pidfd);
    Ok(match choice.backend {
        Backend::Bpf => Arc::new(BpfMonitor::open_chosen(
            choice,
            &bpf(state_dir, config),
            pidfd,
        )?),
        Backend::Pidfd => pidfd,
        Backend::Ptrace => Arc::new(PtraceMonitor::open(pidfd)?),
        other => anyhow::bail!("the {other} exit monitor is not built in"),
    })
}
