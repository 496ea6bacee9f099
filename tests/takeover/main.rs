//! `takeover`: how long a killed daemon is missed, and what that costs. For `cargo xtask bench`,
//! which builds the binaries it measures. One connection for each container, as containerd has
//! them, and three streams.

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use embedshim_tests::{Bundle, Shim};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use testbed::sandbox::{EMBEDSHIM, Sandbox, clean_up_all, clean_up_on_signals};

/// A daemon that has lived for so long is not young any more.
const GROWN_UP: Duration = Duration::from_millis(1500);

/// Measures the time from kill -9 of the daemon to the first answered State
#[derive(Debug, Parser)]
struct Options {
    /// Directory of the binaries
    binaries: PathBuf,
    /// Numbers of containers to measure with, rising
    #[arg(long, value_delimiter = ',', default_value = "1,100,500")]
    containers: Vec<usize>,
    /// How often the daemon is killed with each number
    #[arg(long, default_value_t = 5)]
    kills: usize,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    clean_up_on_signals()?;
    let result = measure(&options);
    clean_up_all();
    result
}

fn measure(options: &Options) -> anyhow::Result<()> {
    let sandbox = Sandbox::new(&options.binaries, EMBEDSHIM)?;
    sandbox.start_daemon()?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    println!(
        "kill -9 of the daemon, median (longest) of {}",
        options.kills
    );
    println!(
        "  tasks   first State   all States   daemon Pss   keeper: fds      Pss   records   journals"
    );
    let mut shims = Vec::new();
    for &count in &options.containers {
        while shims.len() < count {
            shims.push(Container::new(&sandbox, shims.len())?);
        }
        let mut times = Vec::new();
        for _ in 0..options.kills {
            times.push(kill_and_ask(&sandbox, &shims)?);
        }
        let (first, all): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        let keeper = sandbox.keeper_pid().context("the keeper is not there")?;
        let daemon = sandbox.daemon_pid().context("the daemon is not there")?;
        println!(
            "  {count:5}  {:>12}  {:>11}   {:7} kB  {:12}  {:4} kB  {:5} kB   {:5} kB",
            median(first),
            median(all),
            pss(daemon)?,
            fs::read_dir(format!("/proc/{keeper}/fd"))?.count(),
            pss(keeper)?,
            bytes(&sandbox.state_dir().join("tasks"))? / 1024,
            bytes(&sandbox.state_dir().join("connections"))? / 1024,
        );
    }
    Ok(())
}

/// A container, its connection, and the ends of its streams.
struct Container {
    id: String,
    shim: Shim,
    _streams: [File; 3],
}

impl Container {
    fn new(sandbox: &Sandbox, number: usize) -> anyhow::Result<Self> {
        let id = format!("c{number}");
        let shim = Shim::connect(sandbox)?;
        let bundle = Bundle::new(sandbox, &id, &["sleep", "100000"])?;
        let open = |stream: &str| -> anyhow::Result<(String, File)> {
            let path = bundle.path().join(stream);
            mkfifo(&path, Mode::S_IRWXU)?;
            let file = File::options().read(true).write(true).open(&path)?;
            Ok((path.display().to_string(), file))
        };
        let (stdin, input) = open("stdin")?;
        let (stdout, output) = open("stdout")?;
        let (stderr, errors) = open("stderr")?;
        shim.create_with(&id, bundle.path(), |request| {
            request.stdin = stdin;
            request.stdout = stdout;
            request.stderr = stderr;
        })?;
        shim.start(&id)?;
        Ok(Self {
            id,
            shim,
            _streams: [input, output, errors],
        })
    }
}

/// From the kill to the first answer, and to the last of one for each container.
fn kill_and_ask(sandbox: &Sandbox, shims: &[Container]) -> anyhow::Result<(Duration, Duration)> {
    let daemon = sandbox.daemon_pid().context("the daemon is not there")?;
    let began = Instant::now();
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    let mut first = None;
    for Container { id, shim, .. } in shims {
        ensure!(shim.state(id)?.pid > 0, "{id} has no pid");
        first.get_or_insert_with(|| began.elapsed());
    }
    let all = began.elapsed();
    sandbox.successor_of(daemon)?;
    // A daemon that dies young is started again with a delay, which is not what is measured.
    sleep(GROWN_UP);
    Ok((first.unwrap_or(all), all))
}

fn median(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |index: usize| times.get(index).map_or(0, Duration::as_millis);
    format!("{} ({}) ms", at(times.len() / 2), at(times.len() - 1))
}

fn bytes(directory: &PathBuf) -> anyhow::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(directory)? {
        // What the file system gives it, in blocks of 512 bytes.
        sum += std::os::unix::fs::MetadataExt::blocks(&entry?.metadata()?) * 512;
    }
    Ok(sum)
}

fn pss(pid: i32) -> anyhow::Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.context("no Pss")?.trim().trim_end_matches("kB").trim();
    Ok(number.parse()?)
}
