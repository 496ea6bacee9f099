//! `cargo xtask test`: builds the products, runs every test of the workspace and of
//! `tests/outside`, and counts. What is skipped says why, and in CI (environment variable `CI`)
//! counts as failed.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use clap::{Args, ValueEnum};
use testbed::engines::Engine;
use testbed::machine;
use testbed::products::{self, Profile};
use testbed::releases::{self, Release};
use testbed::sandbox::EMBEDSHIM;

use crate::results::Results;
use crate::{package, rpm, shipped};

/// What `--clients` runs.
const CLIENTS: &str = "docker::";
/// The same, in full: for the end-to-end suite.
const IN_FULL: [(&str, &str); 2] = [
    ("EMBEDSHIM_TEST_CLIENTS", "1"),
    ("EMBEDSHIM_TEST_DOCKER_RUNS", "200"),
];

/// The conformance suite needs it: the libbpf-rs loader goes through it, too. What is shipped does
/// not have it, nor do the other tests: all of them would be compiled twice.
pub(crate) const LIBBPF: &str = "embedshim-tests/libbpf";

/// Options of `cargo xtask test`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Run the end-to-end suite only, against this runtime, such as io.containerd.runc.v2
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// Run the end-to-end suite only, with this containerd; those of other releases are fetched
    #[arg(long, value_enum)]
    containerd: Option<Containerd>,
    /// Run the end-to-end suite only, with the containerd, ctr and shim for runc that are in this
    /// directory: any other release, or one of your own
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["containerd", "clients"])]
    containerd_in: Option<PathBuf>,
    /// Run the end-to-end suite only, with runc of Debian's development release (1.3 or later)
    #[arg(long)]
    newer_runc: bool,
    /// Run the tests with Docker only, in full (200 runs while the daemon is killed, checkpoints),
    /// with Docker 20.10, 26.1 and 28.5, each with its release's containerd; --containerd takes one
    #[arg(long)]
    clients: bool,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Containerd {
    /// The one that is installed (1.6 on Debian 12); the default
    Installed,
    /// 1.7, from Debian 13
    Trixie,
    /// 2.1 or later, from Debian's development release
    Sid,
    /// One after the other, with a table at the end
    All,
}

impl Containerd {
    fn releases(self) -> &'static [Release] {
        match self {
            Self::Installed => &[Release::Installed],
            Self::Trixie => &[Release::Trixie],
            Self::Sid => &[Release::Sid],
            Self::All => &Release::ALL,
        }
    }
}

/// `cargo xtask setup`: what tests need, also what they can do without.
pub(crate) fn set_up() -> anyhow::Result<()> {
    machine::prepare()?;
    fetch_docker(Release::Installed);
    if let Err(error) = releases::prometheus() {
        println!("Tests with Prometheus are skipped, because {error:#}");
    }
    Ok(())
}

/// Docker of a release. Where it cannot be fetched, its tests are skipped.
fn fetch_docker(release: Release) -> Option<Engine> {
    Engine::fetch(release)
        .inspect_err(|error| println!("Tests with Docker are skipped, because {error:#}"))
        .ok()
}

/// Runs the tests.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    machine::prepare()?;
    let binaries = products::build(Profile::Dev)?;
    products::build_examples()?;
    let command = |arguments: &[&str]| {
        let mut cargo = products::cargo();
        cargo.args(["test", "--no-fail-fast"]).args(arguments);
        cargo
            .env("EMBEDSHIM_TEST_BINARIES", &binaries)
            .stdout(Stdio::piped());
        cargo
    };
    if options.is_whole() {
        fetch_docker(Release::Installed);
        let mut cargo = command(&products::DEV_SELECTION);
        let mut results = run_tests(cargo.args(["--all-targets", "--"]).args(&options.filter))?;
        let mut cargo = command(&products::DEV_SELECTION);
        cargo.args(["--features", LIBBPF, "--test", "conformance", "--"]);
        results.append(run_tests(cargo.args(&options.filter))?);
        // Which "all targets" are not.
        let mut cargo = command(&["--workspace", "--doc"]);
        results.append(run_tests(cargo.arg("--").args(&options.filter))?);
        results.append(run_tests(outside().arg("--").args(&options.filter))?);
        check_own(&binaries, options.filter.as_deref(), &mut results);
        return results.conclude();
    }
    let runtime = options.runtime.as_deref().unwrap_or(EMBEDSHIM);
    let clients = options.clients.then(|| CLIENTS.to_owned());
    let filter = options.filter.clone().or(clients);
    let mut table = Vec::new();
    let mut all = Results::default();
    for subject in options.subjects()? {
        let mut cargo = command(&products::DEV_SELECTION);
        cargo.args(["--test", "end_to_end"]);
        cargo.env("EMBEDSHIM_TEST_RUNTIME", runtime);
        if options.newer_runc {
            cargo.env("PATH", with_newer_runc()?);
        }
        if options.clients {
            cargo.envs(IN_FULL);
        }
        println!("\ncontainerd {}, {runtime}", subject.version);
        subject.give(&mut cargo)?;
        let results = run_tests(cargo.arg("--").args(&filter))?;
        table.push((subject.version, results.counts));
        all.append(results);
    }
    println!(
        "\n{:12} {:>7} {:>7} {:>7}   {runtime}",
        "containerd", "passed", "failed", "skipped"
    );
    for (version, counts) in table {
        println!(
            "{version:12} {:7} {:7} {:7}",
            counts.passed, counts.failed, counts.skipped
        );
    }
    all.conclude()
}

impl Options {
    /// Whether it is about everything, not about the end-to-end suite in other circumstances.
    fn is_whole(&self) -> bool {
        let is_usual = self.containerd.is_none() && self.containerd_in.is_none();
        is_usual && self.runtime.is_none() && !self.clients && !self.newer_runc
    }

    /// What the end-to-end suite runs with.
    fn subjects(&self) -> anyhow::Result<Vec<Subject>> {
        if let Some(directory) = &self.containerd_in {
            return Ok(vec![Subject::own(directory)?]);
        }
        let default = if self.clients {
            Containerd::All
        } else {
            Containerd::Installed
        };
        let chosen = self.containerd.unwrap_or(default);
        let releases = chosen.releases().iter().copied();
        releases.map(Subject::of).collect()
    }
}

/// A containerd to run the end-to-end suite with.
struct Subject {
    version: String,
    /// Where its programs are, unless they are installed.
    programs: Option<PathBuf>,
    /// Whose Docker goes with it.
    release: Option<Release>,
}

impl Subject {
    /// That of a release of Debian.
    fn of(release: Release) -> anyhow::Result<Self> {
        Ok(Self {
            version: release.version()?,
            programs: release.programs()?,
            release: Some(release),
        })
    }

    /// One that the caller has.
    fn own(directory: &Path) -> anyhow::Result<Self> {
        let directory = directory
            .canonicalize()
            .with_context(|| format!("no containerd in {}", directory.display()))?;
        Ok(Self {
            version: releases::version_of(&directory.join("containerd"))?,
            programs: Some(directory),
            release: None,
        })
    }

    /// Tells the suite of it.
    fn give(&self, suite: &mut Command) -> anyhow::Result<()> {
        suite.env("EMBEDSHIM_TEST_CONTAINERD", &self.version);
        if let Some(programs) = &self.programs {
            suite.env("EMBEDSHIM_TEST_PROGRAMS", programs);
        }
        // Never that of another release instead.
        let docker = self.release.and_then(fetch_docker);
        if let Some(engine) = &docker {
            println!("Docker {}", engine.version()?);
        }
        let root = docker.as_ref().map(Engine::root);
        suite.env("EMBEDSHIM_TEST_DOCKER", root.unwrap_or(Path::new("")));
        Ok(())
    }
}

/// The programs as ever, but for runc.
fn with_newer_runc() -> anyhow::Result<OsString> {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let newer = std::iter::once(releases::runc()?);
    Ok(std::env::join_paths(
        newer.chain(std::env::split_paths(&usual)),
    )?)
}

/// The tests of the monitor that is written outside of the workspace, as a crate of others would
/// be.
fn outside() -> Command {
    let mut cargo = products::cargo();
    cargo.args(["test", "--no-fail-fast", "--locked"]);
    cargo.args(["--manifest-path", "tests/outside/Cargo.toml"]);
    cargo.args(["--target-dir", "target/outside"]);
    cargo.stdout(Stdio::piped());
    cargo
}

/// What is checked by this program itself: each counts as a test.
fn check_own(binaries: &Path, filter: Option<&str>, results: &mut Results) {
    let packages = || package::run(package::Options::default());
    let shipped = || shipped::check(binaries);
    let rpm = || rpm::check(binaries);
    let checks: [(&str, &dyn Fn() -> anyhow::Result<()>); 3] = [
        ("the_libraries_can_be_packaged", &packages),
        (
            "scripts_and_debian_package_have_no_fault_that_debian_knows",
            &shipped,
        ),
        (
            "the_rpm_is_installed_verified_and_removed_and_its_scripts_stop_no_container",
            &rpm,
        ),
    ];
    for (name, check) in checks {
        if filter.is_none_or(|filter| name.contains(filter)) {
            results.add(name, check());
        }
    }
}

/// Runs one `cargo test`, shows what it prints, and reads that.
fn run_tests(cargo: &mut Command) -> anyhow::Result<Results> {
    let mut child = cargo.spawn().context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("no output of cargo test")?;
    let mut results = Results::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        results.read(&line);
    }
    if !child.wait()?.success() && results.counts.failed == 0 {
        // A test program that did not compile or did not come to its end.
        results.counts.failed = 1;
    }
    Ok(results)
}
