//! Metrics: what a daemon tells is what the packaged rules and dashboard ask for, and a real
//! Prometheus takes it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test};
use testbed::products::workspace;
use testbed::releases;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(EmbedshimOnly:
    every_metric_of_rules_and_dashboard_is_told_by_a_daemon,
);

pub(crate) const OURS: [Test; 4] = tests!(WithoutContainerd:
    what_is_counted_is_what_was_done,
    the_file_of_metrics_is_whole_at_each_moment_and_written_again,
    a_file_of_metrics_in_no_directory_is_refused_by_name,
    by_tcp_only_metrics_and_health_are_told_and_only_if_asked_for,
);

/// Those that need Prometheus.
pub(crate) const WITH_PROMETHEUS: [Test; 3] = tests!(WithoutContainerd:
    the_file_of_metrics_is_what_node_exporter_parses,
    the_packaged_alerts_fire_when_they_have_to,
    a_prometheus_scrapes_a_daemon,
);

const RULES: &str = "packaging/prometheus/embedshim.rules.yml";
const DASHBOARD: &str = "packaging/grafana/embedshim.json";

pub(crate) fn metrics(stage: &Stage, sandbox: &Sandbox) -> anyhow::Result<String> {
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["metrics", "--state-dir"])
        .arg(sandbox.state_dir())
        .stdin(Stdio::null());
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    Ok(finished.stdout)
}

/// The names of metrics in a text, whatever it is.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| word.starts_with("embedshim_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// The value of a sample, by what its line begins with.
fn value(text: &str, sample: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with(sample))?;
    line.rsplit(' ').next()?.parse().ok()
}

fn every_metric_of_rules_and_dashboard_is_told_by_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut run = sandbox.run(&["--rm"], "c", &["sh", "-c", "exit 3"]);
    let finished = Running::capture(&mut run)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(3), "{finished:?}");
    let shim = Shim::connect(&sandbox)?;
    ensure!(shim.state("absent").is_err(), "there is no such task");
    let text = metrics(stage, &sandbox)?;
    let samples: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line.split(['{', ' ']).next().unwrap_or_default(), "\n"])
        .collect();
    let told = names(&samples);
    for file in [RULES, DASHBOARD] {
        let asked = names(&fs::read_to_string(workspace().join(file))?);
        ensure!(asked.len() > 10, "{file}: {asked:?}");
        let missing: Vec<_> = asked.difference(&told).collect();
        ensure!(missing.is_empty(), "{file} asks for {missing:?}: {text}");
    }
    Ok(())
}

fn what_is_counted_is_what_was_done(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    for number in 0..3 {
        let id = format!("c{number}");
        let bundle = Bundle::new(&sandbox, &id, &["true"])?;
        shim.create(&id, bundle.path())?;
        shim.start(&id)?;
        shim.wait(&id)?;
        shim.delete(&id)?;
    }
    let bundle = Bundle::new(&sandbox, "runs", &["sleep", "1000"])?;
    shim.create("runs", bundle.path())?;
    shim.start("runs")?;
    ensure!(shim.state("absent").is_err(), "there is no such task");
    let text = metrics(stage, &sandbox)?;
    let of_exits = text
        .lines()
        .filter(|line| line.starts_with("embedshim_exits_total{"));
    let exits: f64 = of_exits
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    ensure!((exits - 3.0).abs() < 0.1, "{exits} exits: {text}");
    let expected = [
        ("embedshim_tasks{state=\"running\"}", 1.0),
        ("embedshim_unknown_exits_total", 0.0),
        (
            "embedshim_request_duration_seconds_count{method=\"Create\"}",
            4.0,
        ),
        ("embedshim_requests_refused_total{method=\"State\"}", 1.0),
        ("embedshim_watched_processes", 1.0),
        ("embedshim_restarts_total", 0.0),
    ];
    for (sample, number) in expected {
        let told = value(&text, sample);
        ensure!(told == Some(number), "{sample} is {told:?}: {text}");
    }
    let creations = value(
        &text,
        "embedshim_runtime_call_duration_seconds_count{operation=\"create\",result=\"ok\"}",
    );
    ensure!(creations == Some(4.0), "{creations:?}: {text}");
    sandbox.kill_daemon()?;
    let restarts = value(&metrics(stage, &sandbox)?, "embedshim_restarts_total");
    ensure!(restarts == Some(1.0), "{restarts:?}");
    Ok(())
}

/// A daemon that serves metrics on a port that the kernel chooses, and that port.
fn serving_by_tcp(stage: &Stage) -> anyhow::Result<(Sandbox, u16)> {
    let mut sandbox = stage.bare_sandbox()?;
    let config = sandbox.directory().join("config.toml");
    fs::write(&config, "[metrics]\nlisten = \"127.0.0.1:0\"\n")?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    let log = sandbox.daemon_log();
    let port = log
        .lines()
        .find(|line| line.contains("metrics are served"))
        .and_then(|line| line.rsplit(':').next()?.trim().parse().ok());
    let port = port.with_context(|| format!("no port: {log}"))?;
    Ok((sandbox, port))
}

fn get(port: u16, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn by_tcp_only_metrics_and_health_are_told_and_only_if_asked_for(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, port) = serving_by_tcp(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "secret", &["sleep", "1000"])?;
    shim.create("secret", bundle.path())?;
    let told = get(port, "/metrics")?;
    ensure!(
        told.starts_with("HTTP/1.1 200 ") && told.contains("embedshim_tasks{"),
        "{told}"
    );
    ensure!(!told.contains("secret"), "{told}");
    let health = get(port, "/healthz")?;
    ensure!(health.starts_with("HTTP/1.1 200 "), "{health}");
    let namespace = sandbox.namespace();
    for path in [
        "/v1/status",
        "/v1/tasks",
        &format!("/v1/tasks/{namespace}/secret"),
    ] {
        let refused = get(port, path)?;
        ensure!(refused.starts_with("HTTP/1.1 404 "), "{path}: {refused}");
    }
    drop(sandbox);
    let silent = stage.bare_sandbox()?;
    silent.start_daemon()?;
    ensure!(
        !silent.daemon_log().contains("metrics are served"),
        "nothing was asked for"
    );
    Ok(())
}

/// A daemon that writes its metrics to this file each second.
fn writing_to_a_file(stage: &Stage) -> anyhow::Result<(Sandbox, PathBuf)> {
    let mut sandbox = stage.bare_sandbox()?;
    let directory = sandbox.directory().join("textfile");
    fs::create_dir(&directory)?;
    let file = directory.join("embedshim.prom");
    let config = sandbox.directory().join("config.toml");
    fs::write(
        &config,
        format!(
            "[metrics]\ntextfile = \"{}\"\ntextfile_seconds = 1\n",
            file.display()
        ),
    )?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    until("the file is written", || Ok(file.exists()))?;
    Ok((sandbox, file))
}

fn the_file_of_metrics_is_whole_at_each_moment_and_written_again(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, file) = writing_to_a_file(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "secret", &["sleep", "1000"])?;
    shim.create("secret", bundle.path())?;
    shim.start("secret")?;
    let mut inodes = BTreeSet::new();
    until(
        "it was written several times, the last time with the task",
        || {
            let (text, inode) = (fs::read_to_string(&file)?, fs::metadata(&file)?.ino());
            // The last sample of the text.
            let last = text.lines().last().unwrap_or_default();
            ensure!(
                last.starts_with("embedshim_process_cpu_seconds_total ") && text.ends_with('\n'),
                "it is not whole: {text}"
            );
            ensure!(!text.contains("secret"), "{text}");
            inodes.insert(inode);
            let running = value(&text, "embedshim_tasks{state=\"running\"}");
            Ok(inodes.len() > 1 && running == Some(1.0))
        },
    )?;
    let names = fs::read_dir(file.parent().context("no directory")?)?;
    let names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
    let is_read = |name: &&std::ffi::OsString| name.to_string_lossy().ends_with(".prom");
    ensure!(names.iter().filter(is_read).count() == 1, "{names:?}");
    Ok(())
}

fn a_file_of_metrics_in_no_directory_is_refused_by_name(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let config = sandbox.directory().join("config.toml");
    let absent = sandbox.directory().join("absent");
    let file = absent.join("embedshim.prom");
    let text = format!("[metrics]\ntextfile = \"{}\"\n", file.display());
    fs::write(&config, text)?;
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["config", "check", "--config"])
        .arg(&config)
        .stdin(Stdio::null());
    let refused = Running::capture(&mut command)?.finish(PATIENCE)?;
    let named = format!(
        "metrics.textfile: there is no directory {}",
        absent.display()
    );
    ensure!(
        refused.code == Some(3) && refused.stderr.contains(&named),
        "{refused:?}"
    );
    Ok(())
}

fn the_file_of_metrics_is_what_node_exporter_parses(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, file) = writing_to_a_file(stage)?;
    let mut command = Command::new(prometheus()?.join("promtool"));
    // By the parser of node_exporter. 3: it understands all, and does not like every name.
    command
        .args(["check", "metrics"])
        .stdin(fs::File::open(&file)?);
    let checked = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(
        matches!(checked.code, Some(0 | 3)) && !checked.stderr.contains("error while"),
        "{checked:?}"
    );
    Ok(())
}

fn prometheus() -> anyhow::Result<PathBuf> {
    releases::fetched_prometheus().context("Prometheus is not fetched: cargo xtask setup")
}

fn promtool(arguments: &[&str], directory: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(prometheus()?.join("promtool"));
    command.args(arguments).current_dir(directory);
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{arguments:?}: {finished:?}");
    Ok(finished.stdout)
}

fn the_packaged_alerts_fire_when_they_have_to(_: &Stage) -> anyhow::Result<()> {
    let directory = workspace().join("packaging/prometheus");
    promtool(&["check", "rules", "embedshim.rules.yml"], &directory)?;
    promtool(&["test", "rules", "embedshim.test.yml"], &directory)?;
    Ok(())
}

fn a_prometheus_scrapes_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, port) = serving_by_tcp(stage)?;
    let own = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = sandbox.directory().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 1s}}\n\
         rule_files: [{}]\n\
         scrape_configs:\n- job_name: embedshim\n  static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n",
        workspace().join(RULES).display()
    );
    fs::write(&config, text)?;
    let mut command = Command::new(prometheus()?.join("prometheus"));
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            sandbox.directory().join("tsdb").display()
        ))
        .arg(format!("--web.listen-address={own}"))
        .stdin(Stdio::null());
    let _prometheus = Running::capture(&mut command)?;
    let server = format!("http://{own}");
    let ask = |expression: &str| {
        promtool(
            &["query", "instant", &server, expression],
            sandbox.directory(),
        )
    };
    until("it has scraped", || {
        Ok(ask("up{job=\"embedshim\"}").is_ok_and(|told| told.contains("=> 1 ")))
    })?;
    // Types and units are understood as well.
    let told = ask("embedshim_build_info")?;
    ensure!(told.contains("version="), "{told}");
    let told = ask("sum(embedshim_tasks)")?;
    ensure!(told.contains("=> 0 "), "{told}");
    let down = ask("ALERTS{alertstate=\"firing\"}")?;
    ensure!(down.trim().is_empty(), "{down}");
    Ok(())
}
