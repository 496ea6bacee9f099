//! Watches a process that is not a child of this program, and says how and when it ended, and how
//! that is known.
//!
//! ```console
//! # sleep 5 & cargo run --quiet --package embedshim-core --example watch -- $!
//! ```
//!
//! As root it uses BPF, which knows the status of every process; otherwise pidfds, which know it
//! since Linux 6.15.

use std::sync::Arc;

use anyhow::Context;
use embedshim_core::exit::{ExitMonitor, ExitRecord, Watched};
use embedshim_core::process::Process;
use monitor_bpf::{BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let argument = std::env::args().nth(1).context("usage: watch PID")?;
    let pid: i32 = argument
        .parse()
        .with_context(|| format!("{argument:?} is not a process number"))?;

    let monitor = monitor()?;
    eprintln!("{}: {}", monitor.backend(), monitor.guarantees());

    // From here on this very process is meant, even if its number is given to another one.
    let process = Arc::new(Process::open(pid)?);
    let record = match monitor.watch(process).await? {
        Watched::Ended(record) => record,
        Watched::Armed => {
            eprintln!("waiting for the end of process {pid}");
            next_exit(&*monitor).await?
        }
    };
    println!("process {pid}: {}", record.status);
    let at = record.at.to_wall();
    let at = at.duration_since(std::time::UNIX_EPOCH)?;
    println!("at: {}.{:09}", at.as_secs(), at.subsec_nanos());
    println!("evidence: {:?}", record.evidence);
    Ok(())
}

/// BPF around pidfds if we may, else pidfds alone. Nothing is pinned: this watch is not to outlive
/// the program.
fn monitor() -> anyhow::Result<Arc<dyn ExitMonitor>> {
    let pidfd = Arc::new(PidfdMonitor::new().context("cannot set up the pidfd exit monitor")?);
    match BpfMonitor::open_unpinned(16, &Loading::default(), pidfd.clone()) {
        Ok(bpf) => Ok(Arc::new(bpf)),
        Err(why) => {
            eprintln!("without BPF: {why}");
            Ok(pidfd)
        }
    }
}

/// Exits come in batches; only one process is watched.
async fn next_exit(monitor: &dyn ExitMonitor) -> anyhow::Result<ExitRecord> {
    let mut exits = Vec::new();
    loop {
        monitor.next_exits(&mut exits).await?;
        if let Some(record) = exits.pop() {
            return Ok(record);
        }
    }
}
