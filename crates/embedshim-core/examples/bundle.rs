//! Runs a container from an OCI bundle, ends, and another process reports its exit status
//! afterwards: none of them runs while the container does, nor when it ends. Needs root, runc,
//! bpffs and the static busybox in `/bin/busybox` (for `make`).
//!
//! ```console
//! # cargo build --package embedshim-core --example bundle && cd target/debug/examples
//! # ./bundle make /tmp/b 'echo hello; sleep 3; exit 7'    # or a bundle of your own
//! # ./bundle start /tmp/b                                 # returns at once
//! # sleep 4                                               # it ends while no node runs
//! # ./bundle wait /tmp/b                                  # exit 7
//! # cat /tmp/b/output                                     # hello
//! ```
//!
//! What survives is in two places: the state directory (here `state` in the bundle, better one on a
//! tmpfs), and the pins of the BPF program, whose name follows from the state directory's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use embedshim_core::exit::{ExitMonitor, Survives};
use embedshim_core::id::{ProcessKey, TaskKey};
use embedshim_core::stdio::StdioPaths;
use embedshim_core::task::{CreateTask, Node, NodeConfig, RuntimeOptions};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *words.as_slice() {
        ["make", directory, script] => make(Path::new(directory), script),
        ["start", directory] => start(&fs::canonicalize(directory).context("no bundle")?).await,
        ["wait", directory] => wait(&fs::canonicalize(directory).context("no bundle")?).await,
        _ => bail!("usage: bundle make DIR SCRIPT | bundle start DIR | bundle wait DIR"),
    }
}

/// Creates and starts the container, and leaves.
async fn start(bundle: &Path) -> anyhow::Result<()> {
    let init = init(bundle)?;
    let (monitor, _) = open_monitor(bundle)?;
    if monitor.guarantees().survives != Survives::Everything {
        println!(
            "The {} backend does not survive this program: if the container ends and is reaped before `wait` runs, its status is unknown.",
            monitor.backend()
        );
    }
    let node = open_node(bundle, monitor).await?;
    let request = CreateTask {
        key: init.task.clone(),
        bundle: bundle.to_owned(),
        rootfs: Vec::new(), // it is in the bundle, ready to be used
        stdio: StdioPaths {
            stdout: format!("file://{}", bundle.join("output").display()),
            ..StdioPaths::default()
        },
        runtime: RuntimeOptions {
            root: state_dir(bundle).join("runc").display().to_string(),
            ..RuntimeOptions::default()
        },
        checkpoint: None,
        owner: String::new(),
        sandbox: None,
    };
    node.create(request).await?;
    let pid = node.start(&init).await?;
    println!("the container runs as process {pid}");
    Ok(())
}

/// Takes over what `start` has left, waits for the end if that is still to come, and removes
/// everything but the bundle.
async fn wait(bundle: &Path) -> anyhow::Result<()> {
    ensure!(state_dir(bundle).exists(), "it was not started");
    let init = init(bundle)?;
    let (monitor, pin_dir) = open_monitor(bundle)?;
    let node = open_node(bundle, monitor).await?;
    let exit = node.wait(&init).await?;
    match exit.status {
        Some(status) => println!("{status}"),
        None => println!("exit {}", exit.code),
    }
    node.delete(&init).await?;
    drop(node);
    fs::remove_dir_all(state_dir(bundle))?;
    // The program in the kernel lives as long as its pins.
    Ok(monitor_bpf::remove_pins(&pin_dir)?)
}

/// BPF with pins, or pidfds with less to promise; and where the pins are.
fn open_monitor(bundle: &Path) -> anyhow::Result<(Arc<dyn ExitMonitor>, PathBuf)> {
    let pidfd = Arc::new(PidfdMonitor::new().context("cannot set up the pidfd exit monitor")?);
    let config = BpfConfig {
        pin_dir: monitor_bpf::pin_dir_for(&state_dir(bundle)),
        capacity: 16,
        loading: Loading::default(),
    };
    let monitor: Arc<dyn ExitMonitor> = match BpfMonitor::open(&config, pidfd.clone()) {
        Ok(bpf) => Arc::new(bpf),
        Err(why) => {
            eprintln!("without BPF: {why}");
            pidfd
        }
    };
    Ok((monitor, config.pin_dir))
}

async fn open_node(bundle: &Path, monitor: Arc<dyn ExitMonitor>) -> anyhow::Result<Node> {
    let config = NodeConfig::new(state_dir(bundle));
    Ok(Node::open(config, monitor).await?)
}

fn state_dir(bundle: &Path) -> PathBuf {
    bundle.join("state")
}

/// The first process of the container, which is called as its bundle's directory is.
fn init(bundle: &Path) -> anyhow::Result<ProcessKey> {
    let name = bundle.file_name().unwrap_or_default().to_string_lossy();
    let task = TaskKey {
        namespace: "example".parse()?,
        id: name.parse()?,
    };
    Ok(ProcessKey { task, exec: None })
}

/// A bundle by runc's own template, with a shell and little else.
fn make(bundle: &Path, script: &str) -> anyhow::Result<()> {
    let bin = bundle.join("rootfs/bin");
    fs::create_dir_all(&bin)?;
    for name in ["sh", "sleep"] {
        fs::copy("/bin/busybox", bin.join(name)).context("cannot copy /bin/busybox")?;
    }
    let made = Command::new("runc")
        .args(["spec", "--bundle"])
        .arg(bundle)
        .status()
        .context("cannot run runc")?;
    ensure!(made.success(), "runc spec has failed");
    let config = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config)?)?;
    if let Some(process) = spec.pointer_mut("/process") {
        *process = json!({
            "args": ["sh", "-c", script],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
        });
    }
    Ok(fs::write(config, spec.to_string())?)
}
