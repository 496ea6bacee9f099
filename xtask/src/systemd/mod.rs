//! `cargo xtask test-systemd`: our package in a Debian guest with systemd as pid 1, upgraded,
//! killed and restarted under running containers. Owns the order of things and the verdict; what is
//! checked is in `tests/systemd`.

mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use testbed::architecture::Architecture;
use testbed::products::{self, Profile, workspace};
use testbed::{image, machine};

use crate::deb::{self, Packing};
use crate::dist;
use crate::matrix::guest::Machine;
use crate::matrix::{guest, initramfs, kernels};
use crate::programs::Programs;

/// Options of `cargo xtask test-systemd`
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The guest's release of Debian
    #[arg(long, value_enum, default_value_t = Release::Bookworm)]
    suite: Release,
    /// Test the binaries that are shipped, instead of those that the other tests use and have built
    /// already
    #[arg(long)]
    release: bool,
    /// Test the binaries in this directory instead of building any
    #[arg(long, value_name = "DIR", conflicts_with = "release")]
    binaries: Option<PathBuf>,
    /// Run only checks whose name matches this regular expression, and the installation; some take
    /// so long that they run no other way
    filter: Option<String>,
    /// The longest that the guest may run, in seconds
    #[arg(long, value_name = "S", default_value_t = 2100)]
    limit: u64,
}

/// A release of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Release {
    /// Debian 12: systemd 252, which closes a stopped unit's descriptors; containerd 1.6
    Bookworm,
    /// Debian 13: systemd 257, which keeps them; containerd 1.7
    Trixie,
}

impl Release {
    fn suite(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Self::Bookworm => "6.1",
            Self::Trixie => "6.12",
        }
    }
}

/// Runs the checks.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the guest is an x86_64 machine; this one is {}",
        std::env::consts::ARCH
    );
    machine::prepare_for_debian_guests()?;
    let kernel = options.suite.kernel().to_owned();
    let kernels = kernels::of(&[kernel], Architecture::X86_64)?;
    let kernel = kernels.first().context("no kernel")?;
    println!("Building the package");
    let binaries = match &options.binaries {
        Some(directory) => directory.clone(),
        None if options.release => products::build(Profile::Release)?,
        None => products::build(Profile::Dev)?,
    };
    let directory = workspace()
        .join("target/systemd")
        .join(options.suite.suite());
    fs::create_dir_all(&directory)?;
    let root = root::archive(options.suite.suite(), &directory)?;
    let ours = add_ours(&directory, &binaries)?;
    let whole = directory.join("initramfs");
    // The kernel unpacks one after the other.
    concatenate(&[&ours, &root], &whole)?;
    println!(
        "Booting Debian {} with Linux {}",
        options.suite.suite(),
        kernel.name
    );
    let begin = Instant::now();
    let arguments = format!(
        "systemd.show_status=no embedshim.filter={}",
        options.filter.as_deref().unwrap_or_default()
    );
    let limit = Duration::from_secs(options.limit);
    let machine = Machine::of(Architecture::X86_64);
    let console = guest::run(machine, &kernel.image, &whole, &arguments, limit, show);
    fs::write(directory.join("console.log"), &console.text)?;
    let counts = Counts::of(&console.text);
    println!(
        "\n{} passed, {} failed, {} skipped in {} s",
        counts.passed,
        counts.failed,
        counts.skipped,
        begin.elapsed().as_secs()
    );
    console.end.with_context(|| {
        format!(
            "the guest; its console is in {}",
            directory.join("console.log").display()
        )
    })?;
    counts.verdict()
}

/// What only this run has: the package in two versions, the archive, the image, the checks, and the
/// first program.
fn add_ours(directory: &Path, binaries: &Path) -> anyhow::Result<PathBuf> {
    let ours = directory.join("ours");
    let _ = fs::remove_dir_all(&ours);
    let checks = ours.join("checks");
    fs::create_dir_all(&checks)?;
    for file in fs::read_dir(workspace().join("tests/systemd"))? {
        let file = file?;
        // Modes are copied, too.
        fs::copy(file.path(), checks.join(file.file_name()))?;
    }
    fs::rename(checks.join("init"), ours.join("init"))?;
    products::strip(
        &products::build_test_program("crowd")?,
        &checks.join("crowd"),
    )?;
    image::compile_echo_runtime(&checks.join("echo_runtime"))?;
    let version = deb::version()?;
    let programs = Programs::of_this_machine(binaries);
    for (name, version) in [("old", format!("{version}~before")), ("new", version)] {
        let package = deb::build(&programs, &version, Packing::Quick, &directory.join("deb"))?;
        fs::rename(package, checks.join(format!("{name}.deb")))?;
    }
    dist::make_tree(&programs, &checks.join("archive"))?;
    let scratch = tempfile::tempdir()?;
    fs::copy(image::build(scratch.path())?, checks.join("image.tar"))?;
    initramfs::pack(&ours, &directory.join("ours.cpio"))
}

fn concatenate(parts: &[&Path], whole: &Path) -> anyhow::Result<()> {
    let mut file = fs::File::create(whole)?;
    for part in parts {
        let mut part = fs::File::open(part).with_context(|| part.display().to_string())?;
        std::io::copy(&mut part, &mut file)?;
    }
    Ok(())
}

/// Results, and what a failed check has to say.
fn show(line: &str) {
    if line.starts_with("test ") || line.starts_with("  ") || line.starts_with("=== ") {
        println!("{line}");
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Counts {
    fn of(console: &str) -> Self {
        let mut counts = Self::default();
        for line in console.lines().filter(|line| line.starts_with("test ")) {
            match line.rsplit("... ").next().unwrap_or_default() {
                "ok" => counts.passed += 1,
                "FAILED" => counts.failed += 1,
                _ if line.contains("... ignored") => counts.skipped += 1,
                // One that the guest died in.
                _ => counts.failed += 1,
            }
        }
        counts
    }

    fn verdict(self) -> anyhow::Result<()> {
        if self.failed > 0 {
            bail!("checks failed");
        }
        if self.passed == 0 {
            bail!("no check was run");
        }
        if self.skipped > 0 && std::env::var_os("CI").is_some() {
            bail!("checks were skipped, which CI does not accept");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let console = "Booting\ntest a_check ... ok\n  its log\ntest another ... FAILED\n\
                       test a_third ... ignored: systemd 252\ntest the_last ... Kernel panic";
        assert_eq!(
            Counts::of(console),
            Counts {
                passed: 1,
                failed: 2,
                skipped: 1
            }
        );
    }
}
