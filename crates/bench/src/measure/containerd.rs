//! `ctr run --rm ... true` by each containerd, with our shim and with its own in turn. ctr and
//! containerd are in the figures of both.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use testbed::image;
use testbed::releases::Release;
use testbed::sandbox::{EMBEDSHIM, PATIENCE, RUNC_V2, Running, Sandbox};

use super::Bench;
use crate::report::OURS;

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let directory = bench.ground.directory().join("image");
    std::fs::create_dir_all(&directory)?;
    let archive = image::build(&directory)?;
    let releases: &[(Release, &str)] = if bench.is_short() {
        &[(Release::Installed, "go 1.6")]
    } else {
        &[
            (Release::Installed, "go 1.6"),
            (Release::Trixie, "go 1.7"),
            (Release::Sid, "go 2.1"),
        ]
    };
    for (release, theirs) in releases {
        if let Err(error) = with(bench, *release, theirs, &archive) {
            println!("  {theirs} by its containerd is skipped: {error:#}");
        }
    }
    Ok(())
}

fn with(
    bench: &mut Bench<'_>,
    release: Release,
    theirs: &str,
    archive: &Path,
) -> anyhow::Result<()> {
    let programs = release.programs()?;
    let mut sandbox = Sandbox::new(bench.binaries, EMBEDSHIM)?;
    for name in ["es", "state"] {
        sandbox.keep_in_memory(name)?;
    }
    sandbox.use_programs(programs);
    if let Some(shim) = release.runc_v2() {
        // As it is, not by the script that starts other programs: it executes itself again.
        let shims = sandbox.directory().join("shims");
        std::fs::create_dir(&shims)?;
        symlink(shim, shims.join("containerd-shim-runc-v2"))?;
        sandbox.use_shims(shims);
    }
    sandbox.start_containerd()?;
    sandbox.import(archive)?;
    let name = format!("ctr run, containerd {}", release.version()?);
    // One of each to warm up; ours starts the daemon in it.
    for round in 0..=bench.rounds(30, 10) {
        if bench.is_late(round, 3) {
            break;
        }
        for (subject, runtime) in [(theirs, RUNC_V2), (OURS, EMBEDSHIM)] {
            let id = bench.id();
            let mut run = sandbox.ctr(["run", "--runtime", runtime, "--rm", "--fifo-dir"]);
            run.arg(sandbox.directory().join("fifo"));
            run.args([image::NAME, &id, "true"]);
            let began = Instant::now();
            let finished = Running::capture(&mut run)?.finish(PATIENCE)?;
            ensure!(finished.code == Some(0), "{runtime}: {finished:?}");
            if round > 0 {
                bench.time(&name, None, subject, began.elapsed());
            }
        }
    }
    Ok(())
}
