//! Logs that this daemon writes (`file://`): the host's files, which a container can neither change
//! nor stop.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use testbed::sandbox::{PATIENCE, Running, until};

use crate::terminals::ensure_repeats_at_most;
use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(AnyRuntime:
    a_container_cannot_touch_its_log_file,
);
pub(crate) const OURS: [Test; 3] = tests!(EmbedshimOnly:
    a_full_disk_drops_output_and_stops_no_container,
    a_log_file_loses_nothing_with_a_daemon,
    both_outputs_of_many_containers_are_appended_to_one_file,
);

fn a_container_cannot_touch_its_log_file(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let log = sandbox.directory().join("log");
    fs::write(&log, "line of an earlier container\n")?;
    fs::set_permissions(&log, fs::Permissions::from_mode(0o644))?;
    let uri = format!("file://{}", log.display());
    let script = "chmod 4755 /proc/self/fd/1; : >/proc/self/fd/1; : >/dev/stdout; echo said";
    let mut run = sandbox.run(&["--rm", "--log-uri", &uri], "c", &["sh", "-c", script]);
    Running::capture(&mut run)?.finish(PATIENCE)?;
    let text = fs::read_to_string(&log)?;
    ensure!(
        text.starts_with("line of an earlier container\n") && text.contains("said\n"),
        "{text}"
    );
    let mode = fs::metadata(&log)?.permissions().mode() & 0o7777;
    ensure!(mode == 0o644, "{mode:o}");
    Ok(())
}

/// A small file system of its own, gone with this.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path) -> anyhow::Result<Self> {
        fs::create_dir(at)?;
        let size = Some("size=256k");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), size)?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

fn a_full_disk_drops_output_and_stops_no_container(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let directory = sandbox.directory().join("small");
    let _disk = SmallDisk::mount(&directory)?;
    let log = directory.join("log");
    let script = "busybox seq 300000; exit 6";
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", script])?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdout = format!("file://{}", log.display());
    })?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 6, "not 6");
    shim.delete("c")?;
    ensure!(
        fs::metadata(&log)?.len() >= 128 << 10,
        "nothing was written"
    );
    let daemon_log = sandbox.daemon_log();
    let told: Vec<&str> = daemon_log
        .lines()
        .filter(|line| line.contains("output is dropped"))
        .collect();
    ensure!(
        told.len() == 1
            && told[0].contains("dropped_bytes")
            && told[0].contains("stream=\"stdout\""),
        "{told:?}"
    );
    Ok(())
}

/// It repeats one chunk for a kill, at most: a file takes no splice.
fn a_log_file_loses_nothing_with_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 300_000;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let script = format!("busybox seq {LINES} | busybox sed 's/^/line /'; exit 6");
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", &script])?;
    let before = Footprint::of(&sandbox);
    let log = sandbox.directory().join("log");
    shim.create_with("c", bundle.path(), |request| {
        request.stdout = format!("file://{}", log.display());
    })?;
    shim.start("c")?;
    let mut kills = 0;
    while shim.state("c")?.exited_at.seconds < 0 || kills == 0 {
        sandbox.kill_daemon()?;
        kills += 1;
    }
    ensure!(shim.wait("c")? == 6 && shim.delete("c")? == 6, "not 6");
    ensure_repeats_at_most(&fs::read_to_string(&log)?, LINES, kills)?;
    before.wait_for_return(&sandbox)
}

fn both_outputs_of_many_containers_are_appended_to_one_file(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 500;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let log = sandbox.directory().join("log");
    let ids = ["a", "b", "c"];
    for id in ids {
        let script = format!(
            "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo {id}out $i; echo {id}err $i >&2; done"
        );
        let bundle = Bundle::new(&sandbox, id, &["sh", "-c", &script])?;
        shim.create_with(id, bundle.path(), |request| {
            request.stdout = format!("file://{}", log.display());
            request.stderr.clone_from(&request.stdout);
        })?;
    }
    for id in ids {
        shim.start(id)?;
    }
    for id in ids {
        shim.wait(id)?;
    }
    let lines = 2 * ids.len() * LINES;
    until("all of it is there", || {
        Ok(fs::read_to_string(&log)?.lines().count() == lines)
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let text = fs::read_to_string(&log)?;
    for id in ids {
        for word in ["out", "err"] {
            embedshim_tests::ensure_counted(&text, &format!("{id}{word}"), LINES)?;
        }
        shim.delete(id)?;
    }
    Ok(())
}
