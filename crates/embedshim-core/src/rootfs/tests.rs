//! What is mounted is what was asked for, and unmounting leaves nothing.

use super::*;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<(), MountError> {
    super::mount_all(mounts, rootfs, &HelperContext::default())
}

/// Unmounts whatever a failed test leaves.
struct Mounted(PathBuf);
impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount_recursive(&self.0);
    }
}

fn below(dir: &Path) -> usize {
    read_mountinfo()
        .unwrap()
        .iter()
        .filter(|mount| mount.path.starts_with(dir))
        .count()
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        kind: kind.into(),
        source: source.display().to_string(),
        target: String::new(),
        options: options.iter().map(|&o| o.into()).collect(),
    }
}

#[test]
fn a_read_only_bind_is_read_only_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let guard = Mounted(dir.path().to_owned());
    let (source, rootfs) = (dir.path().join("a b"), dir.path().join("rootfs"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("f"), "x").unwrap();
    mount_all(
        &[mount("bind", &source, &["rbind", "ro", "rprivate"])],
        &rootfs,
    )
    .unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("f")).unwrap(), "x");
    assert_eq!(
        fs::write(rootfs.join("f"), "y").unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    unmount_recursive(&rootfs).unwrap();
    assert_eq!(below(dir.path()), 0);
    unmount_recursive(&rootfs).unwrap();
    drop(guard);
}

#[test]
fn an_overlay_of_more_layers_than_fit_a_page_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let tmp = dir.path().join("tmp");
    mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m"])], &tmp).unwrap();
    let layers: Vec<PathBuf> = (0..120)
        .map(|number| tmp.join(format!("snapshots-with-long-names/{number}/fs")))
        .collect();
    for (number, layer) in layers.iter().enumerate() {
        fs::create_dir_all(layer).unwrap();
        fs::write(layer.join(format!("file{number}")), "x").unwrap();
    }
    let list = layers
        .iter()
        .map(|layer| layer.display().to_string())
        .collect::<Vec<_>>()
        .join(":");
    assert!(list.len() > 5000);
    let rootfs = dir.path().join("rootfs");
    mount_all(
        &[mount(
            "overlay",
            Path::new("overlay"),
            &[&format!("lowerdir={list}")],
        )],
        &rootfs,
    )
    .unwrap();
    assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 120);
}

#[test]
fn overlay_and_stacked_mounts_are_undone_latest_first() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let tmp = dir.path().join("tmp");
    mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m"])], &tmp).unwrap();
    for name in ["lower", "upper", "work"] {
        fs::create_dir(tmp.join(name)).unwrap();
    }
    fs::write(tmp.join("lower/f"), "low").unwrap();
    let options = ["lower", "upper", "work"].map(|n| format!("{n}dir={}", tmp.join(n).display()));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let rootfs = tmp.join("rootfs");
    let over = mount("overlay", Path::new("overlay"), &options);
    mount_all(&[over, mount("tmpfs", Path::new("tmpfs"), &[])], &rootfs).unwrap();
    assert_eq!(below(&rootfs), 2);
    unmount_recursive(&tmp).unwrap();
    assert_eq!(below(dir.path()), 0);
}

#[test]
fn what_a_failed_call_mounted_is_unmounted() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let rootfs = dir.path().join("rootfs");
    let bad = mount("nonexistentfs", Path::new("x"), &[]);
    let error = mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[]), bad], &rootfs).unwrap_err();
    assert!(error.to_string().contains("nonexistentfs"), "{error}");
    assert_eq!(below(dir.path()), 0);
}

#[test]
fn a_symlink_in_a_target_cannot_leave_the_rootfs() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let (rootfs, outside) = (dir.path().join("rootfs"), dir.path().join("outside"));
    fs::create_dir_all(rootfs.join("etc")).unwrap();
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, rootfs.join("evil")).unwrap();
    std::os::unix::fs::symlink("/etc", rootfs.join("inside")).unwrap();
    let mut tmpfs = mount("tmpfs", Path::new("tmpfs"), &[]);
    tmpfs.target = "evil".into();
    mount_all(&[tmpfs.clone()], &rootfs).unwrap_err();
    tmpfs.target = "../../outside".into();
    mount_all(&[tmpfs.clone()], &rootfs).unwrap_err();
    assert_eq!(below(dir.path()), 0);
    tmpfs.target = "inside".into();
    mount_all(&[tmpfs], &rootfs).unwrap();
    assert_eq!(below(&rootfs.join("etc")), 1);
}

/// A file with an ext4 in it, owned by root.
fn image(dir: &Path) -> PathBuf {
    let image = dir.join("image");
    let file = fs::File::create(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&image).status();
    assert!(made.unwrap().success());
    image
}

#[test]
fn a_loop_mount_has_its_device_as_long_as_it_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let (image, rootfs) = (image(dir.path()), dir.path().join("rootfs"));
    // A mount namespace that another test makes holds its copies of all mounts for a moment.
    let wait_for_none = |behind: &dyn Fn() -> usize| {
        let give_up = Instant::now() + Duration::from_secs(10);
        while behind() > 0 {
            assert!(Instant::now() < give_up, "the device stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let behind = || {
        let used = fs::read_dir("/sys/block").unwrap().flatten();
        used.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok())
            .filter(|file| Path::new(file.trim_end()) == image)
            .count()
    };
    mount_all(&[mount("ext4", &image, &["loop", "rw"])], &rootfs).unwrap();
    fs::write(rootfs.join("kept"), "x").unwrap();
    assert_eq!(behind(), 1);
    unmount_recursive(&rootfs).unwrap();
    wait_for_none(&behind);
    mount_all(&[mount("ext4", &image, &["loop", "ro"])], &rootfs).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("kept")).unwrap(), "x");
    let refused = fs::write(rootfs.join("kept"), "y").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    unmount_recursive(&rootfs).unwrap();
    wait_for_none(&behind);
}

#[test]
fn a_mapped_bind_mount_shows_other_owners_and_changes_none() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let (source, rootfs) = (dir.path().join("source"), dir.path().join("rootfs"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("f"), "x").unwrap();
    let options = [
        "rbind",
        "ro",
        "uidmap=0:100000:65536",
        "gidmap=0:200000:65536",
    ];
    mount_all(&[mount("bind", &source, &options)], &rootfs).unwrap();
    let seen = fs::metadata(rootfs.join("f")).unwrap();
    assert_eq!((seen.uid(), seen.gid()), (100_000, 200_000));
    assert_eq!(fs::metadata(source.join("f")).unwrap().uid(), 0);
    assert!(fs::write(rootfs.join("f"), "y").is_err());
}

#[test]
fn a_mapped_overlay_shows_other_owners_and_leaves_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    let tmp = dir.path().join("tmp");
    mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m"])], &tmp).unwrap();
    for name in ["one", "two", "upper", "work"] {
        fs::create_dir(tmp.join(name)).unwrap();
    }
    fs::write(tmp.join("one/f"), "one").unwrap();
    fs::write(tmp.join("two/f"), "two").unwrap();
    fs::write(tmp.join("two/g"), "two").unwrap();
    let at = |name: &str| tmp.join(name).display().to_string();
    let options = [
        format!("lowerdir={}:{}", at("one"), at("two")),
        format!("upperdir={},workdir={}", at("upper"), at("work")),
        "uidmap=0:100000:65536".into(),
        "gidmap=0:100000:65536".into(),
    ];
    let options = options.each_ref().map(String::as_str);
    let rootfs = dir.path().join("rootfs");
    mount_all(&[mount("overlay", Path::new("overlay"), &options)], &rootfs).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("f")).unwrap(), "one");
    assert_eq!(fs::metadata(rootfs.join("g")).unwrap().uid(), 100_000);
    fs::write(rootfs.join("new"), "x").unwrap();
    assert!(tmp.join("upper/new").exists());
    assert_eq!(below(&rootfs), 1);
    unmount_recursive(&rootfs).unwrap();
    assert_eq!(below(dir.path()), 1);
    assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 0);
}

#[test]
fn a_file_system_in_user_space_is_mounted_by_its_helper() {
    let dir = tempfile::tempdir().unwrap();
    let _guard = Mounted(dir.path().to_owned());
    for name in ["lower", "upper", "work"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("lower/f"), "low").unwrap();
    let options = ["lower", "upper", "work"]
        .map(|name| format!("{name}dir={}", dir.path().join(name).display()));
    let options = options.each_ref().map(String::as_str);
    let rootfs = dir.path().join("rootfs");
    let fuse = mount("fuse3.fuse-overlayfs", Path::new("overlay"), &options);
    mount_all(&[fuse], &rootfs).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("f")).unwrap(), "low");
    unmount_recursive(&rootfs).unwrap();
    assert_eq!(below(dir.path()), 0);
    let unknown = mount("fuse3.no-such-fs", Path::new("x"), &[]);
    let error = mount_all(&[unknown], &rootfs).unwrap_err();
    let MountError::Mount { source, .. } = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("no-such-fs"), "{source}");
}
