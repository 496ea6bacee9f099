//! The choice of the exit monitor: probes each backend, lets the core choose, opens the chosen one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use embedshim_core::exit::{Backend, Choice, Durability, ExitMonitor, Report};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;
use tracing::warn;

use crate::config::{BackendChoice, Config};
use crate::outcome::{Code, Failure};

/// Probes what each backend can do here, and which one the configuration allows.
pub(crate) fn probe(state_dir: &Path, config: &Config) -> Report {
    let pidfd = monitor_pidfd::probe();
    let readiness = pidfd.survives();
    let bpf = bpf_config(state_dir, config);
    let backends = vec![
        pidfd,
        monitor_bpf::probe(&bpf, readiness),
        monitor_ptrace::probe(),
    ];
    Report::new(backends, config.monitor.backend.policy())
}

fn bpf_config(state_dir: &Path, config: &Config) -> BpfConfig {
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

/// Opens the best exit monitor that the configuration allows: the BPF programs that a predecessor
/// has left attached, or what probing recommends.
pub(crate) fn open(config: &Config, state_dir: &Path) -> Result<Arc<dyn ExitMonitor>, Failure> {
    let pidfd = PidfdMonitor::new().context("cannot set up the pidfd exit monitor")?;
    let pidfd = Arc::new(pidfd);
    let allows_bpf = matches!(
        config.monitor.backend,
        BackendChoice::Auto | BackendChoice::Bpf
    );
    if allows_bpf
        && let Some(monitor) = BpfMonitor::resume(&bpf_config(state_dir, config), pidfd.clone())
    {
        note_state_dir(state_dir);
        return Ok(Arc::new(monitor));
    }
    let report = probe(state_dir, config);
    let choice = report
        .choice()
        .map_err(|none| Failure::new(Code::Unsupported, none))?;
    if report.durability != Durability::Always {
        warn!(backend = %choice.backend, "exits can be lost while the daemon is down");
        for remedy in &report.remedies {
            warn!("to improve: {remedy}");
        }
    }
    let opened = open_chosen(choice, config, state_dir, pidfd);
    let opened =
        opened.with_context(|| format!("cannot start the {} exit monitor", choice.backend))?;
    if choice.backend == Backend::Bpf {
        note_state_dir(state_dir);
    }
    Ok(opened)
}

/// So that `embedshimd pins` can tell whether the state directory is gone.
fn note_state_dir(state_dir: &Path) {
    let pin_dir = monitor_bpf::pin_dir_for(state_dir);
    if let Err(error) = monitor_bpf::note_state_dir(&pin_dir, state_dir) {
        warn!(%error, pins = %pin_dir.display(), "cannot note whose pins these are");
    }
}

fn open_chosen(
    choice: Choice,
    config: &Config,
    state_dir: &Path,
    pidfd: Arc<PidfdMonitor>,
) -> anyhow::Result<Arc<dyn ExitMonitor>> {
    Ok(match choice.backend {
        Backend::Bpf => Arc::new(BpfMonitor::open_chosen(
            choice,
            &bpf_config(state_dir, config),
            pidfd,
        )?),
        Backend::Pidfd => pidfd,
        Backend::Ptrace => Arc::new(PtraceMonitor::open(pidfd)?),
        other => anyhow::bail!("the {other} exit monitor is not built in"),
    })
}
