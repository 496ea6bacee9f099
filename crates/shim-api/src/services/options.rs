//! The options of a `Create` or a `Checkpoint`: runc's own message, the generic one with a TOML
//! body, that of containerd's first runtime, or none. Owns which types are understood.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use containerd_shim_protos::shim::oci::{CheckpointOptions, Options};
use embedshim_core::task::RuntimeOptions;
use nix::fcntl::OFlag;
use protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};
use serde::Deserialize;
use tracing::{debug, warn};
use ttrpc::Status;

use super::any;
use crate::status;

const RUNC: &str = "containerd.runc.v1.Options";
const CHECKPOINT: &str = "containerd.runc.v1.CheckpointOptions";
const GENERIC: &str = "runtimeoptions.v1.Options";
/// The generic one as containerd 1.6 and older name it, after the package of their CRI plugin.
const GENERIC_OLD: &str = "cri.runtimeoptions.v1.Options";
/// The options of containerd's first runtime, which ctr 1.x sends for every runtime but runc-v2.
const LINUX: &str = "containerd.linux.runc.CreateOptions";
const LINUX_CHECKPOINT: &str = "containerd.linux.runc.CheckpointOptions";
/// The most bytes of a file of options.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Whether reading these options may mean to read a file that they name.
pub(crate) fn may_name_a_file(options: Option<&Any>) -> bool {
    options.is_some_and(|options| [GENERIC, GENERIC_OLD].contains(&any::name(options)))
}

/// Reads the options of a `Create`, and the file that they name. Blocks on that file.
pub(crate) fn decode(options: Option<&Any>) -> Result<RuntimeOptions, Status> {
    let Some(options) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(RuntimeOptions::default());
    };
    let garbled = |error: protobuf::Error| {
        status::invalid(format!("runtime options {}: {error}", options.type_url))
    };
    match any::name(options) {
        RUNC => Options::parse_from_bytes(&options.value)
            .map(of_runc)
            .map_err(garbled),
        GENERIC | GENERIC_OLD => {
            let generic = Generic::read(&options.value).map_err(garbled)?;
            if generic.body.is_empty() && !generic.path.is_empty() {
                return of_file(Path::new(&generic.path));
            }
            of_toml("ConfigBody", &generic.body)
        }
        LINUX => of_linux(&options.value).map_err(garbled),
        _ => Err(status::invalid(format!(
            "unsupported runtime options {:?}: {RUNC}, {GENERIC}, {LINUX} or none are understood",
            options.type_url
        ))),
    }
}

/// Reads the options of a `Checkpoint`; there may be none.
pub(crate) fn decode_checkpoint(options: Option<&Any>) -> Result<CheckpointOptions, Status> {
    let Some(options) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(CheckpointOptions::default());
    };
    let name = any::name(options);
    if ![CHECKPOINT, LINUX_CHECKPOINT].contains(&name) {
        return Err(status::invalid(format!(
            "unsupported checkpoint options {:?}: {CHECKPOINT}, {LINUX_CHECKPOINT} or none are understood",
            options.type_url
        )));
    }
    let mut read = CheckpointOptions::parse_from_bytes(&options.value)
        .map_err(|error| status::invalid(format!("checkpoint options {name}: {error}")))?;
    if name == LINUX_CHECKPOINT {
        // There fields 8 and 9 are the other way round.
        std::mem::swap(&mut read.image_path, &mut read.work_path);
    }
    Ok(read)
}

fn of_runc(options: Options) -> RuntimeOptions {
    if !options.shim_cgroup.is_empty() {
        debug!("runtime options: ignoring ShimCgroup: there is no shim process for this container");
    }
    RuntimeOptions {
        binary: options.binary_name,
        root: options.root,
        systemd_cgroup: Some(options.systemd_cgroup),
        no_pivot_root: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        io_uid: options.io_uid,
        io_gid: options.io_gid,
        ..RuntimeOptions::default()
    }
}

/// The fields of `containerd.linux.runc.CreateOptions` that are not CRIU's.
fn of_linux(message: &[u8]) -> Result<RuntimeOptions, protobuf::Error> {
    let mut options = RuntimeOptions::default();
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match (tag >> 3, tag & 7) {
            (1, 0) => options.no_pivot_root = input.read_bool()?,
            (8, 0) => options.no_new_keyring = input.read_bool()?,
            (10, 0) => options.io_uid = input.read_uint32()?,
            (11, 0) => options.io_gid = input.read_uint32()?,
            _ => skip(&mut input, tag)?,
        }
    }
    Ok(options)
}

fn skip(input: &mut CodedInputStream<'_>, tag: u32) -> Result<(), protobuf::Error> {
    let wire_type = WireType::new(tag & 7);
    input.skip_field(wire_type.ok_or_else(|| io::Error::other("wire type"))?)
}

/// `runtimeoptions.v1.Options`, without `TypeUrl`, its field 1.
#[derive(Default)]
struct Generic {
    /// `ConfigPath`: a file of the same form as the body.
    path: String,
    /// `ConfigBody`, which is read if there are both.
    body: String,
}

impl Generic {
    fn read(message: &[u8]) -> Result<Self, protobuf::Error> {
        let mut read = Self::default();
        let mut input = CodedInputStream::from_bytes(message);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).map_err(io::Error::other);
            match (tag >> 3, tag & 7) {
                (2, 2) => read.path = text(input.read_bytes()?)?,
                (3, 2) => read.body = text(input.read_bytes()?)?,
                _ => skip(&mut input, tag)?,
            }
        }
        Ok(read)
    }
}

/// The file that `ctr --runtime-config-path` and dockerd's `options` name.
fn of_file(path: &Path) -> Result<RuntimeOptions, Status> {
    let failed = |what: &dyn std::fmt::Display| {
        status::invalid(format!(
            "runtime options (ConfigPath {}): {what}",
            path.display()
        ))
    };
    if !path.is_absolute() {
        return Err(failed(&"it is not an absolute path"));
    }
    let read = || -> io::Result<String> {
        // To open a device can have an effect already.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > MAX_CONFIG {
            return Err(io::Error::other("it is no file of at most 1 MiB"));
        }
        let mut text = String::new();
        file.take(MAX_CONFIG).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|error| failed(&error))?;
    of_toml(&format!("ConfigPath {}", path.display()), &text)
}

/// The options, by their names in containerd's configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Body {
    binary_name: String,
    root: String,
    systemd_cgroup: Option<bool>,
    no_pivot_root: bool,
    no_new_keyring: bool,
    io_uid: u32,
    io_gid: u32,
    #[serde(flatten)]
    unknown: toml::Table,
}

fn of_toml(of: &str, body: &str) -> Result<RuntimeOptions, Status> {
    let body: Body = toml::from_str(body).map_err(|error| {
        status::invalid(format!(
            "runtime options ({of}): {}",
            error.to_string().trim_end()
        ))
    })?;
    for key in body
        .unknown
        .keys()
        .filter(|key| key.as_str() != "ShimCgroup")
    {
        warn!(key, "runtime options: ignoring an unknown option");
    }
    Ok(RuntimeOptions {
        binary: body.binary_name,
        root: body.root,
        systemd_cgroup: body.systemd_cgroup,
        no_pivot_root: body.no_pivot_root,
        no_new_keyring: body.no_new_keyring,
        io_uid: body.io_uid,
        io_gid: body.io_gid,
        ..RuntimeOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn runcs_options_and_none_are_understood() {
        let options = Options {
            binary_name: "crun".into(),
            systemd_cgroup: true,
            io_uid: 7,
            ..Options::default()
        };
        let sent = any(
            "type.googleapis.com/containerd.runc.v1.Options",
            options.write_to_bytes().unwrap(),
        );
        let read = decode(Some(&sent)).unwrap();
        assert_eq!(
            (read.binary.as_str(), read.systemd_cgroup, read.io_uid),
            ("crun", Some(true), 7)
        );
        assert_eq!(decode(None).unwrap(), RuntimeOptions::default());
        assert_eq!(
            decode(Some(&Any::default())).unwrap(),
            RuntimeOptions::default()
        );
    }

    #[test]
    fn a_toml_body_is_read_and_what_is_before_it_skipped() {
        let body = b"BinaryName = \"/usr/bin/crun\"\nSystemdCgroup = false\nShimCgroup = \"/x\"\nNew = 1\n";
        let mut message = vec![
            0x0a,
            1,
            b't',
            0x12,
            1,
            b'p',
            0x1a,
            u8::try_from(body.len()).unwrap(),
        ];
        message.extend_from_slice(body);
        let read = decode(Some(&any("runtimeoptions.v1.Options", message))).unwrap();
        assert_eq!(
            (read.binary.as_str(), read.systemd_cgroup),
            ("/usr/bin/crun", Some(false))
        );
    }

    #[test]
    fn a_file_is_read_where_there_is_no_body() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.toml");
        let message = |path: &Path| {
            let path = path.to_str().unwrap().as_bytes();
            [&[0x12, u8::try_from(path.len()).unwrap()], path].concat()
        };
        std::fs::write(&path, "BinaryName = \"/usr/bin/crun\"\n").unwrap();
        let read = decode(Some(&any(GENERIC, message(&path)))).unwrap();
        assert_eq!(read.binary, "/usr/bin/crun");
        let with_body = [&message(&path)[..], b"\x1a\x0bRoot = \"/r\""].concat();
        let read = decode(Some(&any(GENERIC, with_body))).unwrap();
        assert_eq!((read.binary.as_str(), read.root.as_str()), ("", "/r"));
        for bad in [
            directory.path(),
            Path::new("/nosuch"),
            Path::new("relative"),
            Path::new("/dev/zero"),
        ] {
            let refused = decode(Some(&any(GENERIC, message(bad))))
                .unwrap_err()
                .message;
            assert!(refused.contains(bad.to_str().unwrap()), "{refused}");
        }
    }

    #[test]
    fn the_first_runtimes_options_are_understood() {
        // NoPivotRoot, ShimCgroup, NoNewKeyring, IoUid.
        let message = b"\x08\x01\x4a\x02/x\x40\x01\x50\x07".to_vec();
        let read = decode(Some(&any(LINUX, message))).unwrap();
        assert!(read.no_pivot_root && read.no_new_keyring);
        assert_eq!((read.io_uid, read.systemd_cgroup), (7, None));
        let paths = b"\x42\x02/w\x4a\x02/i".to_vec();
        let read = decode_checkpoint(Some(&any(LINUX_CHECKPOINT, paths.clone()))).unwrap();
        assert_eq!(
            (read.work_path.as_str(), read.image_path.as_str()),
            ("/w", "/i")
        );
        let read = decode_checkpoint(Some(&any(CHECKPOINT, paths))).unwrap();
        assert_eq!(
            (read.work_path.as_str(), read.image_path.as_str()),
            ("/i", "/w")
        );
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let refused = |sent: Any| decode(Some(&sent)).unwrap_err().message;
        assert!(refused(any("windows.Options", vec![])).contains("windows.Options"));
        assert!(refused(any(RUNC, vec![0xff])).contains(RUNC));
        let body = b"\x1a\x03IoU";
        assert!(refused(any(GENERIC, body.to_vec())).contains("ConfigBody"));
    }
}
