//! What the streams of an idle container add to our daemon's memory. Of a successor, whose heap has
//! no holes that an earlier peak has left; containers are those of `growth`.

use std::fs::File;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::image;

use super::Bench;
use crate::process::anonymous_kb;
use crate::report::{OURS, Unit};
use crate::subject::{Shim, ShimContainer, fake_runtime};

const CONTAINERS: u32 = 200;
/// An idle daemon has given its threads back after this.
const REST: Duration = Duration::from_secs(4);

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let ours = bench.chosen.find(OURS).context("ours is always there")?;
    let shim = ours.shim().context("ours is a shim")?;
    let runtime = bench.ground.directory().join("streams_runtime");
    image::compile_echo_runtime(&runtime)?;
    let mut containers = Vec::new();
    let mut before = of_a_successor(bench)?;
    for (name, has_streams) in [
        ("memory of one/without streams", false),
        ("memory of one/with three streams", true),
    ] {
        for _ in 0..CONTAINERS {
            containers.push(one(bench, shim, &runtime, has_streams)?);
        }
        let after = of_a_successor(bench)?;
        let each = (after - before) / f64::from(CONTAINERS);
        bench.recorder.record(name, OURS, Unit::Kilobytes, each);
        before = after;
    }
    for (container, _streams) in containers {
        container.end()?;
    }
    Ok(())
}

/// A container, and the client's ends of its streams.
fn one(
    bench: &mut Bench<'_>,
    shim: &Shim,
    runtime: &Path,
    has_streams: bool,
) -> anyhow::Result<(ShimContainer, Vec<File>)> {
    let id = bench.id();
    let bundle = bench.ground.bundle(&id)?;
    let (mut paths, mut files) = (Vec::new(), Vec::new());
    for name in ["in", "out", "err"].iter().filter(|_| has_streams) {
        let path = bundle.path().join(name);
        mkfifo(&path, Mode::S_IRWXU)?;
        files.push(File::options().read(true).write(true).open(&path)?);
        paths.push(path.display().to_string());
    }
    let mut container = shim.launch(bench.ground, &id, bundle)?;
    container.create(|request| {
        fake_runtime(runtime)(request);
        if let [stdin, stdout, stderr] = paths.as_slice() {
            request.stdin.clone_from(stdin);
            request.stdout.clone_from(stdout);
            request.stderr.clone_from(stderr);
        }
    })?;
    container.start()?;
    Ok((container, files))
}

fn of_a_successor(bench: &Bench<'_>) -> anyhow::Result<f64> {
    let daemon = bench.ground.sandbox().kill_daemon()?;
    sleep(REST);
    anonymous_kb(daemon)
}
