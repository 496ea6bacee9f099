//! `CreateTaskRequest.options`: runc's own message, the generic one with a TOML body, or none (`containerd.md` 4.3, 4.4).

use containerd_shim_protos::shim::oci::{CheckpointOptions, Options};
use embedshim_core::task::RuntimeOptions;
use protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};
use serde::Deserialize;
use tracing::{debug, warn};
use ttrpc::Status;

use crate::{any, status};

const RUNC: &str = "containerd.runc.v1.Options";
const CHECKPOINT: &str = "containerd.runc.v1.CheckpointOptions";
const GENERIC: &str = "runtimeoptions.v1.Options";
/// containerd 1.6 and older sends it under the name of its CRI plugin's package.
const GENERIC_OLD: &str = "cri.runtimeoptions.v1.Options";

/// Reads the options of a request.
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
        GENERIC | GENERIC_OLD => of_toml(&config_body(&options.value).map_err(garbled)?),
        _ => Err(status::invalid(format!(
            "unsupported runtime options {:?}: {RUNC}, {GENERIC} or none are understood",
            options.type_url
        ))),
    }
}

/// Reads the options of a checkpoint; there may be none.
pub(crate) fn decode_checkpoint(options: Option<&Any>) -> Result<CheckpointOptions, Status> {
    let Some(options) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(CheckpointOptions::default());
    };
    if any::name(options) != CHECKPOINT {
        return Err(status::invalid(format!(
            "unsupported checkpoint options {:?}: {CHECKPOINT} or none are understood",
            options.type_url
        )));
    }
    CheckpointOptions::parse_from_bytes(&options.value)
        .map_err(|error| status::invalid(format!("checkpoint options: {error}")))
}

fn of_runc(options: Options) -> RuntimeOptions {
    if !options.shim_cgroup.is_empty() {
        debug!("ShimCgroup is ignored: there is no shim process for this container");
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

/// Field 3 of `runtimeoptions.v1.Options`; fields 1 and 2 are a type and a path that runc-v2 does not read either.
fn config_body(message: &[u8]) -> Result<String, protobuf::Error> {
    const CONFIG_BODY: u32 = 3 << 3 | 2;
    let mut input = CodedInputStream::from_bytes(message);
    let mut body = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if tag == CONFIG_BODY {
            body = input.read_bytes()?;
        } else {
            let wire_type = WireType::new(tag & 7);
            input.skip_field(wire_type.ok_or_else(|| std::io::Error::other("wire type"))?)?;
        }
    }
    String::from_utf8(body).map_err(|error| std::io::Error::other(error).into())
}

/// The names of containerd's configuration file.
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

fn of_toml(body: &str) -> Result<RuntimeOptions, Status> {
    let body: Body = toml::from_str(body).map_err(|error| {
        status::invalid(format!(
            "runtime options (ConfigBody): {}",
            error.to_string().trim_end()
        ))
    })?;
    for key in body
        .unknown
        .keys()
        .filter(|key| key.as_str() != "ShimCgroup")
    {
        warn!(key, "unknown runtime option");
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
    fn what_is_not_understood_is_named() {
        let refused = |sent: Any| decode(Some(&sent)).unwrap_err().message;
        assert!(refused(any("windows.Options", vec![])).contains("windows.Options"));
        assert!(refused(any(RUNC, vec![0xff])).contains(RUNC));
        let body = b"\x1a\x03IoU";
        assert!(refused(any(GENERIC, body.to_vec())).contains("ConfigBody"));
    }
}
