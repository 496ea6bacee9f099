//! The end-to-end tests: a real containerd, a real runc, real cgroups, signals and BPF; each test
//! in a sandbox of its own, so that they run side by side. `cargo xtask test` runs them; the same
//! suite runs against another shim with `--runtime`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod at_most_once;
mod bootstrap;
mod broken_parts;
mod checkpoint;
mod containers;
mod control;
mod creations;
mod cut_short;
mod cut_short_checkpoints;
mod cut_short_execs;
mod cut_short_starts;
mod deploys;
mod docker;
mod embedding;
mod events;
mod events_shown;
mod exits;
mod failures;
mod guardians;
mod half_done;
mod held_up;
mod hostile;
mod hung;
mod inheritance;
mod installs;
mod kubernetes;
mod last_words;
mod late_execs;
mod log_files;
mod metrics;
mod model;
mod modes;
mod mounts;
mod operators;
mod pipes;
mod pods;
mod pods_like_others;
mod pods_processes;
mod pods_shown;
mod pods_survival;
mod regressions;
mod removed_state;
mod replacement;
mod runtime_words;
mod runtimes;
mod shortcuts;
mod smoke;
mod store;
mod strangers;
mod streams;
mod succession;
mod survival;
mod terminals;
mod tools;
mod traces;
mod two_containerds;
mod user_namespaces;

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use embedshim_tests::{Scope, Stage, Test};
use libtest_mimic::{Arguments, Failed, Trial};
use testbed::sandbox::{EMBEDSHIM, clean_up_all, clean_up_on_signals};

/// Lists tests by their functions: the name of a test is the name of its function.
#[macro_export]
macro_rules! tests {
    ($scope:ident: $($name:ident),+ $(,)?) => {
        [$(embedshim_tests::Test {
            name: concat!(module_path!(), "::", stringify!($name)),
            scope: embedshim_tests::Scope::$scope,
            run: $name,
        }),+]
    };
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or_else(usual_threads);
    if let Err(error) = clean_up_on_signals() {
        eprintln!("cannot take signals: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = std::env::var("EMBEDSHIM_TEST_RUNTIME").unwrap_or_else(|_| EMBEDSHIM.into());
    let is_other = std::env::var_os("EMBEDSHIM_TEST_PROGRAMS").is_some();
    let has_controllers = major_of_containerd().is_some_and(|major| major >= 2);
    let is_unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let fits = |test: &Test| match test.scope {
        Scope::AnyRuntime => true,
        Scope::EmbedshimOnly => runtime == EMBEDSHIM,
        // Asked for by name it runs with every release's runc.
        Scope::WithoutContainerd => {
            (!is_other || arguments.filter.is_some()) && runtime == EMBEDSHIM
        }
        Scope::OtherContainerd => is_other && runtime == EMBEDSHIM,
        Scope::ContainerdTwo => has_controllers && runtime == EMBEDSHIM,
        Scope::UnifiedCgroups => is_unified && runtime == EMBEDSHIM,
    };
    let no_root = (!nix::unistd::geteuid().is_root()).then_some("containers need root");
    let no_docker = embedshim_tests::docker()
        .is_none()
        .then_some("Docker is not fetched (cargo xtask setup)");
    let stage: Arc<OnceLock<Result<Stage, String>>> = Arc::default();
    let all = without_docker().into_iter().filter(fits);
    let all = all.map(|test| trial(test, &stage, no_root));
    let docker = with_docker().into_iter().filter(fits);
    let docker = docker.map(|test| trial(test, &stage, no_root.or(no_docker)));
    let monitored = metrics::WITH_PROMETHEUS.into_iter().filter(fits);
    let monitored = monitored.map(|test| trial(test, &stage, no_root.or(no_prometheus())));
    let trials = all.chain(docker).chain(monitored).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    clean_up_all();
    conclusion.exit_code()
}

/// Two tests a processor: they wait for most of their time.
fn usual_threads() -> Option<usize> {
    let processors = std::thread::available_parallelism().ok()?;
    Some(processors.get().saturating_mul(2))
}

/// Why tests with Prometheus cannot run. In CI they run and fail.
fn no_prometheus() -> Option<&'static str> {
    let is_missing = testbed::releases::fetched_prometheus().is_none();
    let is_ci = std::env::var_os("CI").is_some();
    (is_missing && !is_ci).then_some("Prometheus is not fetched (cargo xtask setup)")
}

/// The tests that need neither Docker nor Prometheus.
fn without_docker() -> Vec<Test> {
    [
        containers::TESTS.as_slice(),
        // The longest of all: first.
        &pods_survival::TESTS,
        &control::TESTS,
        &control::OURS,
        &streams::TESTS,
        &streams::OURS,
        &exits::TESTS,
        &exits::OURS,
        &events::TESTS,
        &events::OURS,
        &events_shown::OURS,
        &at_most_once::TESTS,
        &guardians::TESTS,
        &creations::TESTS,
        &deploys::TESTS,
        &cut_short::TESTS,
        &cut_short_checkpoints::TESTS,
        &cut_short_execs::TESTS,
        &cut_short_starts::TESTS,
        &held_up::TESTS,
        &hung::TESTS,
        &inheritance::TESTS,
        &installs::TESTS,
        &inheritance::OURS,
        &last_words::TESTS,
        &late_execs::TESTS,
        &log_files::TESTS,
        &log_files::OURS,
        &store::TESTS,
        &succession::TESTS,
        &strangers::TESTS,
        &pods::TESTS,
        &pods_like_others::TESTS,
        &pods_processes::TESTS,
        &pods_shown::TESTS,
        &pipes::TESTS,
        &pipes::OURS,
        &terminals::TESTS,
        &terminals::OURS,
        &tools::TESTS,
        &tools::OURS,
        &traces::TESTS,
        &traces::OURS,
        &two_containerds::TESTS,
        &user_namespaces::TESTS,
        &survival::TESTS,
        &survival::OURS,
        &survival::UPGRADES,
        &failures::TESTS,
        &failures::OURS,
        &half_done::TESTS,
        &hostile::TESTS,
        &kubernetes::TESTS,
        &metrics::TESTS,
        &metrics::OURS,
        &model::TESTS,
        &modes::TESTS,
        &mounts::TESTS,
        &operators::TESTS,
        &operators::OURS,
        &regressions::TESTS,
        &removed_state::TESTS,
        &runtime_words::TESTS,
        &runtimes::TESTS,
        &replacement::TESTS,
        &shortcuts::TESTS,
        &smoke::TESTS,
        &smoke::UNIFIED,
        &bootstrap::TESTS,
        &broken_parts::TESTS,
        &checkpoint::TESTS,
        &embedding::TESTS,
    ]
    .concat()
}

/// The tests with Docker; some of them in full only.
fn with_docker() -> Vec<Test> {
    let mut docker = [
        docker::life::TESTS.as_slice(),
        &docker::life::OURS,
        &docker::options::OURS,
        &docker::survival::TESTS,
        &docker::survival::OURS,
    ]
    .concat();
    if std::env::var_os("EMBEDSHIM_TEST_CLIENTS").is_some() {
        docker.extend(docker::options::IN_FULL);
    }
    docker
}

/// The first number of the version of the containerd that this run is about.
fn major_of_containerd() -> Option<u32> {
    let version = std::env::var("EMBEDSHIM_TEST_CONTAINERD").ok()?;
    version.split('.').next()?.parse().ok()
}

fn trial(test: Test, stage: &Arc<OnceLock<Result<Stage, String>>>, missing: Option<&str>) -> Trial {
    let name = test.name.trim_start_matches("end_to_end::").to_owned();
    if let Some(missing) = missing {
        let name = format!("{name} (skipped, because {missing})");
        return Trial::test(name, || Ok(())).with_ignored_flag(true);
    }
    let stage = Arc::clone(stage);
    Trial::test(name, move || {
        let stage = stage.get_or_init(|| Stage::set().map_err(|error| format!("{error:#}")));
        let stage = stage
            .as_ref()
            .map_err(|error| Failed::from(format!("no stage: {error}")))?;
        (test.run)(stage).map_err(|error| Failed::from(format!("{error:#}")))
    })
}
