//! `cargo xtask test-matrix`: the conformance suite and a smoke test of whole containers, on other
//! kernels, in QEMU guests. Owns the order of things and the report; kernels, guests and results
//! have modules of their own.

mod conditions;
pub(crate) mod guest;
pub(crate) mod initramfs;
pub(crate) mod kernels;
mod libraries;
mod report;

use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use testbed::architecture::Architecture;
use testbed::cross::Toolchain;
use testbed::machine;
use testbed::products::{self, Profile};

use conditions::Condition;
use guest::Machine;
use kernels::Kernel;
use report::Outcome;

/// Guests at the same time: each has two processors, as emulated threads.
const AT_ONCE: usize = 2;

/// The longest that a guest may run.
const LIMIT: Duration = Duration::from_mins(25);
/// The same of another architecture, whose emulation is slower and whose machine may be busy.
const LIMIT_OF_OTHERS: Duration = Duration::from_hours(1);

/// Options of `cargo xtask test-matrix`
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The architecture of kernels, guests and what runs in them [default: this machine's]
    #[arg(long, value_enum, value_name = "ARCH")]
    arch: Option<Architecture>,
    /// A kernel series of Debian's, such as 6.12, or the path of a kernel's image; may be given
    /// several times [default: 5.10, 6.1, 6.12, 6.16 and the newest; of another architecture 6.1,
    /// 6.12 and the newest]
    #[arg(long = "kernel", value_name = "SERIES|PATH")]
    kernels: Vec<String>,
    /// What else is different in the guests; may be given several times, and each kernel runs in
    /// each [default: plain; of all kernels also those conditions in which one means most]
    #[arg(long = "condition", value_enum, value_name = "CONDITION")]
    conditions: Vec<Condition>,
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Write the results as `JUnit` XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The longest that one guest may run, in seconds [default: 1500; of another architecture 3600]
    #[arg(long, value_name = "S")]
    limit: Option<u64>,
}

/// Runs the matrix.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let native = Architecture::native();
    let architecture = options.arch.or(native);
    let architecture = architecture.with_context(|| {
        let own = std::env::consts::ARCH;
        format!("there are no guests of {own}; --arch takes another architecture")
    })?;
    machine::prepare_for_guests(architecture)?;
    let toolchain = Toolchain::of(architecture)?;
    let visits = visits(options, architecture)?;
    println!("Building what runs in the guests");
    let binaries = match &toolchain {
        None => products::build(Profile::Dev)?,
        Some(other) => other.build(Profile::Dev)?,
    };
    let initramfs = initramfs::build(&binaries, toolchain.as_ref())?;
    let default = if toolchain.is_none() {
        LIMIT
    } else {
        LIMIT_OF_OTHERS
    };
    let guest = Guest {
        architecture,
        initramfs,
        filter: options.filter.as_deref(),
        limit: options.limit.map_or(default, Duration::from_secs),
    };
    // The newest first: a newer kernel takes longer, and the longest is not to be waited for alone
    // at the end.
    let waiting = Mutex::new(visits.iter().enumerate().collect::<Vec<_>>());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((place, (kernel, condition))) =
                    waiting.lock().ok().and_then(|mut left| left.pop())
                {
                    let outcome = guest.visit(kernel, *condition);
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
    if outcomes.len() != visits.len() || !outcomes.iter().all(Outcome::is_good) {
        bail!("not every kernel passes");
    }
    Ok(())
}

/// Each kernel with what else is different in its guest.
fn visits(
    options: &Options,
    architecture: Architecture,
) -> anyhow::Result<Vec<(Kernel, Condition)>> {
    let conditions = match options.conditions.as_slice() {
        [] => &[Condition::Plain],
        asked => asked,
    };
    let mut visits = Vec::new();
    for condition in conditions {
        let kernels = kernels::of(&options.kernels, architecture)?;
        visits.extend(kernels.into_iter().map(|kernel| (kernel, *condition)));
    }
    let is_all = options.kernels.is_empty() && options.conditions.is_empty();
    if is_all && Architecture::native() == Some(architecture) {
        for (series, condition) in conditions::OF_SERIES {
            let kernels = kernels::of(&[series.to_owned()], architecture)?;
            visits.extend(kernels.into_iter().map(|kernel| (kernel, condition)));
        }
    }
    Ok(visits)
}

/// What is the same for each kernel.
struct Guest<'a> {
    architecture: Architecture,
    initramfs: PathBuf,
    filter: Option<&'a str>,
    limit: Duration,
}

impl Guest<'_> {
    /// Boots one kernel and runs everything there.
    fn visit(&self, kernel: &Kernel, condition: Condition) -> Outcome {
        let begin = Instant::now();
        let arguments = format!(
            "embedshim.filter={} {}",
            self.filter.unwrap_or_default(),
            condition.arguments()
        );
        let console = guest::run(
            Machine::of(self.architecture),
            &kernel.image,
            &self.initramfs,
            &arguments,
            self.limit,
            |_| (),
        );
        let guest = condition.of(&kernel.name);
        let name = format!("console-{}.log", guest.replace(", ", "-"));
        let kept = self.initramfs.with_file_name(name);
        if let Err(error) = std::fs::write(&kept, &console.text) {
            eprintln!("{}: {error}", kept.display());
        }
        let duration = begin.elapsed();
        let outcome = Outcome::of(&guest, self.architecture.name(), console, duration);
        println!("{}", outcome.line());
        outcome
    }
}
