//! What this machine can do, as a table, and how a program chooses and opens the best exit monitor.
//!
//! ```console
//! # cargo run --quiet --package embedshim-core --example probe
//! # cargo run --quiet --package embedshim-core --example probe -- pidfd
//! ```
//!
//! The core ranks the backends but does not know them, so each program writes `report` and `open`
//! for those it links.

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use embedshim_core::exit::{Backend, Choice, Durability, ExitMonitor, Policy, Report, Survives};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use monitor_ptrace::PtraceMonitor;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let policy = match std::env::args().nth(1).as_deref() {
        None => Policy::Auto,
        Some("bpf") => Policy::Only(Backend::Bpf),
        Some("pidfd") => Policy::Only(Backend::Pidfd),
        Some("ptrace") => Policy::Only(Backend::Ptrace),
        Some(other) => bail!("there is no backend {other:?}; usage: probe [bpf|pidfd|ptrace]"),
    };
    let bpf = BpfConfig {
        pin_dir: monitor_bpf::pin_dir_for(Path::new("/run/embedshim-example-probe")),
        capacity: 1024,
        loading: Loading::default(),
    };

    let report = report(&bpf, policy);
    print!("{report}");

    // The error names every backend with its reason.
    let choice = report.choice()?;
    if report.durability != Durability::Always {
        println!("\nA program that must not lose an exit would refuse to start here.");
    }
    let monitor = open(choice, &bpf)?;
    println!("\nopened {}: {}", monitor.backend(), monitor.guarantees());

    if monitor.guarantees().survives == Survives::Everything {
        // What it has pinned would go on recording without us.
        drop(monitor);
        monitor_bpf::remove_pins(&bpf.pin_dir)?;
    }
    Ok(())
}

/// Tries everything. Among backends that promise the same, the first is taken: the cheapest is to
/// be listed first.
fn report(bpf: &BpfConfig, policy: Policy) -> Report {
    let pidfd = monitor_pidfd::probe();
    let readiness = pidfd.survives();
    let backends = vec![
        pidfd,
        monitor_bpf::probe(bpf, readiness),
        monitor_ptrace::probe(),
    ];
    Report::new(backends, policy)
}

/// Opens the chosen one. The others are decorators: pidfds tell them that a process is dead.
fn open(choice: Choice, bpf: &BpfConfig) -> anyhow::Result<Arc<dyn ExitMonitor>> {
    let pidfd = Arc::new(PidfdMonitor::new()?);
    Ok(match choice.backend {
        Backend::Bpf => Arc::new(BpfMonitor::open_chosen(choice, bpf, pidfd)?),
        Backend::Ptrace => Arc::new(PtraceMonitor::open(pidfd)?),
        Backend::Pidfd => pidfd,
        other => bail!("this program has no {other} backend"),
    })
}
