//! `google.protobuf.Any` as containerd uses it: it sends bare type names, and ignores everything up
//! to the last slash of those it receives.

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use ttrpc::Status;

use crate::status;

/// Packs a message under its bare full name, as containerd's package `typeurl` does.
pub(crate) fn pack(name: &str, message: &impl Message) -> Result<Any, Status> {
    let value = message
        .write_to_bytes()
        .map_err(|error| status::internal(format!("{name}: {error}")))?;
    Ok(Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    })
}

/// The type's full name: what is behind the last slash.
pub(crate) fn name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// The JSON of a document, which must be of this type, such as `Process`.
pub(crate) fn json(any: Option<&Any>, expected: &str) -> Result<Vec<u8>, Status> {
    match any {
        Some(any) if name(any) == expected => Ok(any.value.clone()),
        Some(any) => Err(status::invalid(format!(
            "unsupported type {:?}: a {expected} is needed",
            any.type_url
        ))),
        None => Err(status::invalid(format!("a {expected} is needed"))),
    }
}
