//! `cargo xtask test-matrix`: the conformance suite and a smoke test of whole containers, on other
//! kernels, in QEMU guests. Owns the order of things and the report; kernels, guests and results
//! have modules of their own.

pub(crate) mod guest;
pub(crate) mod initramfs;
pub(crate) mod kernels;
mod report;

use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use testbed::machine;
use testbed::products::{self, Profile};

use kernels::Kernel;
use report::Outcome;

/// Guests at the same time: each has two processors, as emulated threads.
const AT_ONCE: usize = 2;

/// Options of `cargo xtask test-matrix`
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A kernel series of Debian's, such as 6.12, or the path of a bzImage; may be given several
    /// times [default: 5.10, 6.1, 6.12, 6.16 and the newest]
    #[arg(long = "kernel", value_name = "SERIES|PATH")]
    kernels: Vec<String>,
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Write the results as `JUnit` XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The longest that one guest may run, in seconds
    #[arg(long, value_name = "S", default_value_t = 1500)]
    limit: u64,
}

/// Runs the matrix.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "guests are x86_64 machines; this one is {}",
        std::env::consts::ARCH
    );
    machine::prepare_for_guests()?;
    let kernels = kernels::of(&options.kernels)?;
    println!("Building what runs in the guests");
    let binaries = products::build(Profile::Dev)?;
    let initramfs = initramfs::build(&binaries)?;
    let limit = Duration::from_secs(options.limit);
    // The newest first: a newer kernel takes longer, and the longest is not to be waited for alone
    // at the end.
    let waiting = Mutex::new(kernels.iter().enumerate().collect::<Vec<_>>());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((place, kernel)) =
                    waiting.lock().ok().and_then(|mut left| left.pop())
                {
                    let outcome = visit(kernel, &initramfs, options.filter.as_deref(), limit);
                    if let Ok(mut done) = done.lock() {
                        done.push((place, outcome));
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(place, _)| *place);
    let outcomes: Vec<Outcome> = done.into_iter().map(|(_, outcome)| outcome).collect();
    print!("\n{}", report::table(&outcomes));
    if let Some(path) = &options.junit {
        std::fs::write(path, report::junit(&outcomes))
            .with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &options.json {
        std::fs::write(path, report::json(&outcomes)?)
            .with_context(|| path.display().to_string())?;
    }
    if outcomes.len() != kernels.len() || !outcomes.iter().all(Outcome::is_good) {
        bail!("not every kernel passes");
    }
    Ok(())
}

/// Boots one kernel and runs everything there.
fn visit(
    kernel: &Kernel,
    initramfs: &std::path::Path,
    filter: Option<&str>,
    limit: Duration,
) -> Outcome {
    let begin = Instant::now();
    let arguments = format!("embedshim.filter={}", filter.unwrap_or_default());
    let console = guest::run(&kernel.image, initramfs, &arguments, limit, |_| ());
    let kept = initramfs.with_file_name(format!("console-{}.log", kernel.name));
    if let Err(error) = std::fs::write(&kept, &console.text) {
        eprintln!("{}: {error}", kept.display());
    }
    let outcome = Outcome::of(&kernel.name, console, begin.elapsed());
    println!("{}", outcome.line());
    outcome
}
