//! containerd's mount options: fstab words that are flags, words that are propagation, and data for
//! the file system. The table is that of containerd's `core/mount/mount_linux.go`. Pure.

use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use super::idmap::IdMap;
use super::{Mount, MountError, lowerdirs};

/// mount(2) takes one page, with a final zero.
const MAX_DATA: usize = 4096 - 1;
/// Above this, overlays are shortened, as by containerd: the kernel adds to what we say.
const SHORTEN_ABOVE: usize = 4096 - 512;

const MOUNT_MANAGERS: &str = "X-containerd.";
const NOT_RESOLVED: &str =
    ": it is for containerd's mount manager, which should have resolved it before Create";
const NOT_MAPPABLE: &str = ": only bind mounts and overlays can have other owners";
const NO_MAP: &str = ": both are needed, each as container:host:size";

/// The options of one mount, sorted out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) flags: MsFlags,
    pub(super) propagation: Vec<MsFlags>,
    pub(super) data: String,
    /// Where paths in the data begin that are relative.
    pub(super) base: Option<PathBuf>,
    /// The source is a file to be put behind a block device.
    pub(super) is_loop: bool,
    /// Other owners for the files.
    pub(super) idmap: Option<IdMap>,
}

impl Options {
    pub(super) fn parse(mount: &Mount, target: &Path) -> Result<Self, MountError> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: Vec::new(),
            data: String::new(),
            base: None,
            is_loop: false,
            idmap: None,
        };
        let unsupported = |option: &str, why| MountError::Unsupported {
            option: option.to_owned(),
            kind: mount.kind.clone(),
            target: target.to_owned(),
            why,
        };
        let mut data = Vec::new();
        let (mut users, mut groups) = (None, None);
        for option in &mount.options {
            if option.starts_with(MOUNT_MANAGERS) {
                return Err(unsupported(option, NOT_RESOLVED));
            }
            if option == "loop" {
                parsed.is_loop = true;
            } else if let Some(ranges) = option.strip_prefix("uidmap=") {
                users = Some(ranges);
            } else if let Some(ranges) = option.strip_prefix("gidmap=") {
                groups = Some(ranges);
            } else if let Some((clear, flag)) = flag(option) {
                parsed.flags.set(flag, !clear);
            } else if let Some(propagation) = propagation(option) {
                parsed.propagation.push(propagation);
            } else if option != "defaults" {
                data.push(option.as_str());
            }
        }
        // containerd's bind mounts come as type "bind" with the option, from some clients without
        // it.
        if matches!(mount.kind.as_str(), "bind" | "rbind") {
            parsed.flags.set(MsFlags::MS_BIND, true);
            parsed.flags.set(
                MsFlags::MS_REC,
                parsed.flags.contains(MsFlags::MS_REC) || mount.kind == "rbind",
            );
        }
        if users.is_some() || groups.is_some() {
            let map = IdMap::parse(users.unwrap_or_default(), groups.unwrap_or_default());
            let option = format!(
                "uidmap={},gidmap={}",
                users.unwrap_or_default(),
                groups.unwrap_or_default()
            );
            let is_overlay = mount.kind == "overlay";
            if !is_overlay && !parsed.flags.contains(MsFlags::MS_BIND) {
                return Err(unsupported(&option, NOT_MAPPABLE));
            }
            parsed.idmap = Some(map.ok_or_else(|| unsupported(&option, NO_MAP))?);
        }
        parsed.data = data.join(",");
        // The layers of a mapped overlay get names of their own.
        if parsed.idmap.is_some() {
            return Ok(parsed);
        }
        if parsed.data.len() > SHORTEN_ABOVE
            && let Some((base, data)) = lowerdirs::shorten(&parsed.data)
        {
            parsed.base = Some(base);
            parsed.data = data;
        }
        if parsed.data.len() > MAX_DATA {
            return Err(MountError::OptionsTooLong {
                kind: mount.kind.clone(),
                target: target.to_owned(),
                length: parsed.data.len(),
                limit: MAX_DATA,
            });
        }
        Ok(parsed)
    }

    /// Flags beside the binding itself.
    pub(super) fn needs_remount(&self) -> bool {
        !self
            .flags
            .difference(MsFlags::MS_BIND | MsFlags::MS_REC)
            .is_empty()
    }
}

/// The flag, and whether the word clears it.
fn flag(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "async" => (true, MsFlags::MS_SYNCHRONOUS),
        "atime" => (true, MsFlags::MS_NOATIME),
        "bind" => (false, MsFlags::MS_BIND),
        "dev" => (true, MsFlags::MS_NODEV),
        "diratime" => (true, MsFlags::MS_NODIRATIME),
        "dirsync" => (false, MsFlags::MS_DIRSYNC),
        "exec" => (true, MsFlags::MS_NOEXEC),
        "mand" => (false, MsFlags::MS_MANDLOCK),
        "noatime" => (false, MsFlags::MS_NOATIME),
        "nodev" => (false, MsFlags::MS_NODEV),
        "nodiratime" => (false, MsFlags::MS_NODIRATIME),
        "noexec" => (false, MsFlags::MS_NOEXEC),
        "nomand" => (true, MsFlags::MS_MANDLOCK),
        "norelatime" => (true, MsFlags::MS_RELATIME),
        "nostrictatime" => (true, MsFlags::MS_STRICTATIME),
        "nosuid" => (false, MsFlags::MS_NOSUID),
        "rbind" => (false, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        "relatime" => (false, MsFlags::MS_RELATIME),
        "remount" => (false, MsFlags::MS_REMOUNT),
        "ro" => (false, MsFlags::MS_RDONLY),
        "rw" => (true, MsFlags::MS_RDONLY),
        "strictatime" => (false, MsFlags::MS_STRICTATIME),
        "suid" => (true, MsFlags::MS_NOSUID),
        "sync" => (false, MsFlags::MS_SYNCHRONOUS),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MsFlags> {
    let (recursive, name) = match option.strip_prefix('r') {
        Some(name) if matches!(name, "private" | "shared" | "slave" | "unbindable") => (true, name),
        _ => (false, option),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(if recursive {
        flag | MsFlags::MS_REC
    } else {
        flag
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: &str, options: &[&str]) -> Result<Options, MountError> {
        let options = options.iter().map(|&option| option.into()).collect();
        let mount = Mount {
            kind: kind.into(),
            source: "s".into(),
            target: String::new(),
            options,
        };
        Options::parse(&mount, Path::new("/r"))
    }

    #[test]
    fn words_are_flags_propagation_or_data() {
        let options = parse(
            "overlay",
            &[
                "ro",
                "nosuid",
                "rslave",
                "lowerdir=/a:/b",
                "index=off",
                "suid",
            ],
        )
        .unwrap();
        assert_eq!(options.flags, MsFlags::MS_RDONLY);
        assert_eq!(options.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC]);
        assert_eq!(options.data, "lowerdir=/a:/b,index=off");
        assert!(parse("bind", &["rbind", "ro"]).unwrap().needs_remount());
        assert!(!parse("bind", &["rbind", "rw"]).unwrap().needs_remount());
    }

    #[test]
    fn what_is_not_ours_is_refused_by_name() {
        let refused = |option: &str| parse("ext4", &[option]).unwrap_err().to_string();
        insta::assert_snapshot!(
            [
                "X-containerd.mkdir.path=/x",
                "uidmap=0:0:1",
                &"x".repeat(5000),
            ]
            .map(refused)
            .join("\n"),
            @r#"
        mount option "X-containerd.mkdir.path=/x" of ext4 on /r is not supported: it is for containerd's mount manager, which should have resolved it before Create
        mount option "uidmap=0:0:1,gidmap=" of ext4 on /r is not supported: only bind mounts and overlays can have other owners
        the options of ext4 on /r are 5000 bytes long, mount takes 4095
        "#
        );
    }
}
