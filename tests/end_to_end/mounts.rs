//! The mounts of a request: what becomes the container's root, and what is refused.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test, write_program};
use serde_json::{Value, json};
use testbed::sandbox::{Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(WithoutContainerd:
    a_read_only_bind_mount_is_the_root,
    an_overlay_of_many_layers_is_the_root,
    a_target_cannot_leave_the_root,
    a_file_behind_a_loop_device_is_the_root,
    a_root_with_mapped_owners_belongs_to_the_containers_users,
    options_that_are_not_ours_are_refused_by_name,
    a_file_system_in_user_space_is_the_root_every_time,
    a_mount_helper_inherits_from_the_containerd_that_creates,
);

/// A bundle whose files were moved away to be mounted by the request, and the directory where they
/// are.
fn without_files(sandbox: &Sandbox, id: &str, script: &str) -> anyhow::Result<(Bundle, PathBuf)> {
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", script])?;
    let files = sandbox.directory().join(format!("{id}-files"));
    fs::rename(bundle.path().join("rootfs"), &files)?;
    for directory in ["proc", "dev", "sys", "etc"] {
        fs::create_dir_all(files.join(directory))?;
    }
    Ok((bundle, files))
}

fn mount(kind: &str, source: &Path, target: &str, options: &[&str]) -> api::Mount {
    api::Mount {
        type_: kind.into(),
        source: source.to_string_lossy().into_owned(),
        target: target.into(),
        options: options.iter().map(|&option| option.into()).collect(),
        ..api::Mount::default()
    }
}

fn create(shim: &Shim, id: &str, bundle: &Bundle, rootfs: &[api::Mount]) -> ttrpc::Result<u32> {
    shim.create_with(id, bundle.path(), |request| {
        request.rootfs = rootfs.to_vec();
    })
}

fn run(shim: &Shim, id: &str, bundle: &Bundle, rootfs: &[api::Mount]) -> anyhow::Result<u32> {
    create(shim, id, bundle, rootfs)?;
    shim.start(id)?;
    let code = shim.wait(id)?;
    shim.delete(id)?;
    Ok(code)
}

fn with_daemon(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

fn a_read_only_bind_mount_is_the_root(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "echo x > /etc/x || exit 5")?;
    bundle.edit(|spec| {
        if let Some(read_only) = spec.pointer_mut("/root/readonly") {
            *read_only = false.into();
        }
    })?;
    let code = run(
        &shim,
        "c",
        &bundle,
        &[mount("bind", &files, "", &["rbind", "ro"])],
    )?;
    ensure!(
        code == 5 && !files.join("etc/x").exists(),
        "it was written to: {code}"
    );
    let code = run(
        &shim,
        "c",
        &bundle,
        &[mount("bind", &files, "", &["rbind", "rw"])],
    )?;
    ensure!(
        code == 0 && files.join("etc/x").exists(),
        "it was not written to: {code}"
    );
    before.wait_for_return(&sandbox)
}

fn an_overlay_of_many_layers_is_the_root(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(
        &sandbox,
        "c",
        "for i in 0 50 99; do [ -e /layer$i ] || exit 6; done",
    )?;
    let layers: Vec<PathBuf> = (0..100)
        .map(|number| {
            sandbox
                .directory()
                .join(format!("snapshots/{number}/a-name-of-some-length/fs"))
        })
        .collect();
    for (number, layer) in layers.iter().enumerate() {
        fs::create_dir_all(layer)?;
        fs::write(layer.join(format!("layer{number}")), "")?;
    }
    let all = layers
        .iter()
        .chain([&files])
        .map(|layer| layer.to_string_lossy());
    let lower = format!("lowerdir={}", all.collect::<Vec<_>>().join(":"));
    ensure!(lower.len() > 4096, "that would fit");
    let code = run(
        &shim,
        "c",
        &bundle,
        &[mount(
            "overlay",
            Path::new("overlay"),
            "",
            &["index=off", &lower],
        )],
    )?;
    ensure!(code == 0, "{code}");
    before.wait_for_return(&sandbox)
}

fn a_target_cannot_leave_the_root(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "[ -e /etc/inside ] || exit 7")?;
    // Outside, this link leads to the machine's own /etc; inside, to the container's.
    symlink("/../../../../etc", files.join("link"))?;
    let inside = sandbox.directory().join("inside");
    fs::create_dir(&inside)?;
    fs::write(inside.join("inside"), "")?;
    let rootfs = [
        mount("bind", &files, "", &["rbind", "rw"]),
        mount("bind", &inside, "link", &["bind", "ro"]),
    ];
    let code = run(&shim, "c", &bundle, &rootfs)?;
    ensure!(code == 0, "{code}");
    ensure!(
        !Path::new("/etc/inside").exists(),
        "the machine's /etc was mounted over"
    );
    before.wait_for_return(&sandbox)
}

fn is_behind_a_loop_device(image: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut files = devices
        .filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.any(|file| Path::new(file.trim_end()) == image)
}

fn a_file_behind_a_loop_device_is_the_root(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "echo x > /etc/x || exit 5")?;
    let image = sandbox.directory().join("image");
    fs::File::create(&image)?.set_len(32 << 20)?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-d"])
        .args([&files, &image])
        .status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    bundle.edit(|spec| {
        if let Some(read_only) = spec.pointer_mut("/root/readonly") {
            *read_only = false.into();
        }
    })?;
    let code = run(&shim, "c", &bundle, &[mount("ext4", &image, "", &["loop"])])?;
    ensure!(code == 0, "{code}");
    // A mount namespace that was made meanwhile, by another test, may still hold the file system:
    // then its journal is not clean.
    until("its device is gone", || {
        Ok(!is_behind_a_loop_device(&image))
    })?;
    let read_only = [mount("ext4", &image, "", &["loop", "ro"])];
    let code = run(&shim, "c", &bundle, &read_only)?;
    ensure!(code == 5, "it was written to: {code}");
    before.wait_for_return(&sandbox)
}

/// What containerd 2.x does for pods with a user namespace: one snapshot on disk, other owners in
/// each pod.
fn a_root_with_mapped_owners_belongs_to_the_containers_users(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let script = "[ \"$(stat -c %u:%g /bin/busybox)\" = 0:0 ] || exit 3; echo x > /etc/x || exit 5; \
        [ \"$(cat /proc/self/uid_map | tr -s ' ')\" = ' 0 100000 65536' ] || exit 6";
    let (bundle, files) = without_files(&sandbox, "c", script)?;
    let upper = sandbox.directory().join("upper");
    let work = sandbox.directory().join("work");
    for directory in [&upper, &work] {
        fs::create_dir(directory)?;
    }
    chown(&upper, Some(100_000), Some(100_000))?;
    bundle.edit(|spec| {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        if let Some(read_only) = spec.pointer_mut("/root/readonly") {
            *read_only = false.into();
        }
        if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
            linux.insert("uidMappings".into(), map.clone());
            linux.insert("gidMappings".into(), map);
            if let Some(Value::Array(namespaces)) = linux.get_mut("namespaces") {
                namespaces.push(json!({"type": "user"}));
            }
        }
    })?;
    let maps = ["uidmap=0:100000:65536", "gidmap=0:100000:65536"];
    let lower = format!("lowerdir={}", files.display());
    let rest = format!("upperdir={},workdir={}", upper.display(), work.display());
    let overlay = mount(
        "overlay",
        Path::new("overlay"),
        "",
        &[&lower, &rest, maps[0], maps[1]],
    );
    let code = run(&shim, "c", &bundle, &[overlay])?;
    ensure!(code == 0, "in an overlay: {code}");
    let owner = fs::metadata(upper.join("etc/x"))?.uid();
    ensure!(owner == 100_000, "its file belongs to {owner}");
    before.wait_for_return(&sandbox)
}

fn options_that_are_not_ours_are_refused_by_name(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "true")?;
    for option in ["X-containerd.mkdir.path=/x", "uidmap=0:1000:1"] {
        // The one before it was mounted already, and is unmounted again.
        let rootfs = [
            mount("bind", &files, "", &["rbind", "rw"]),
            mount("bind", &files, "etc", &["rbind", option]),
        ];
        let error = create(&shim, "c", &bundle, &rootfs)
            .unwrap_err()
            .to_string();
        ensure!(
            error.contains(option) && error.contains("is not supported"),
            "{error}"
        );
        before.wait_for_return(&sandbox)?;
    }
    let missing = [mount(
        "bind",
        Path::new("/nonexistent/source"),
        "",
        &["rbind"],
    )];
    let error = create(&shim, "c", &bundle, &missing)
        .unwrap_err()
        .to_string();
    ensure!(
        error.contains("cannot mount bind /nonexistent/source"),
        "{error}"
    );
    before.wait_for_return(&sandbox)
}

/// Its server is a child of the daemon's, and so is the helper whose status the daemon waits for.
fn a_file_system_in_user_space_is_the_root_every_time(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "[ -e /bin/busybox ] || exit 5; exit 9")?;
    let lower = format!("lowerdir={}", files.display());
    let root = mount("fuse3.fuse-overlayfs", Path::new("overlay"), "", &[&lower]);
    for attempt in 0..12 {
        let code = run(&shim, "c", &bundle, std::slice::from_ref(&root))
            .with_context(|| format!("attempt {attempt}"))?;
        ensure!(code == 9, "{code}");
    }
    before.wait_for_return(&sandbox)
}

/// containerd's launcher notes in the bundle what a shim of the container's own would inherit.
fn a_mount_helper_inherits_from_the_containerd_that_creates(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let (bundle, files) = without_files(&sandbox, "c", "exit 9")?;
    let programs = sandbox.directory().join("programs");
    let note = sandbox.directory().join("note");
    fs::create_dir(&programs)?;
    let helper = format!(
        "#!/bin/sh\n{{ test -f config.json && echo bundle; env; echo limit $(ulimit -Sn); }} >{}\nexec mount --bind \"$1\" \"$2\"\n",
        note.display()
    );
    write_program(&programs.join("mount.fuse3"), &helper)?;
    let path = format!("PATH={}:{}", programs.display(), std::env::var("PATH")?);
    let inherited = json!({"context": {
        "environment": [path, "HOME=/home/containerd", "NOTIFY_SOCKET=/nowhere"],
        "open_files": [1000, 4000],
    }});
    fs::write(bundle.path().join("embedshim.json"), inherited.to_string())?;
    let code = run(&shim, "c", &bundle, &[mount("fuse3.any", &files, "", &[])])?;
    ensure!(code == 9, "{code}");
    let note = fs::read_to_string(note).context("another helper was run")?;
    for line in ["bundle", "HOME=/home/containerd", "limit 1000"] {
        ensure!(
            note.lines().any(|found| found == line),
            "no {line:?}: {note}"
        );
    }
    ensure!(!note.contains("NOTIFY_SOCKET"), "{note}");
    before.wait_for_return(&sandbox)
}
