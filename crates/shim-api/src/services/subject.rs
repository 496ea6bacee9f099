//! [`Subject`]: which process a call is about, for who observes calls. Owns where the ids of a
//! request are; what they mean for the call is the service's own.

use embedshim_core::id::{ContainerId, ExecId, Namespace};
use protobuf::CodedInputStream;
use protobuf::rt::WireType;

use super::context::NAMESPACE;
use super::{TASK, launcher};
use crate::server::Call;

/// The number of the field that has the container's id, in every request of the Task service.
const ID: u32 = 1;
/// The number of the field that has the exec's id, in the requests of [`OF_EXECS`].
const EXEC_ID: u32 = 2;
/// The methods whose requests can name an exec.
const OF_EXECS: [&str; 8] = [
    "CloseIO",
    "Delete",
    "Exec",
    "Kill",
    "ResizePty",
    "Start",
    "State",
    "Wait",
];

/// What a call is about, as far as its request says it. What is no valid name is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Of the call's metadata, or else of an earlier call of its connection.
    pub namespace: Option<Namespace>,
    /// The container.
    pub container: Option<ContainerId>,
    /// The exec, if it is not about the container's init.
    pub exec: Option<ExecId>,
}

impl Subject {
    /// The subject of a call; `None` if this daemon has no such service.
    pub fn of(call: &Call) -> Option<Self> {
        let is_of_tasks = TASK.contains(&call.service.as_str());
        if !is_of_tasks && call.service != launcher::NAME {
            return None;
        }
        let named = call.metadata.get(NAMESPACE);
        let namespace = match named.map(String::as_str) {
            None | Some("") => call.session.namespace.get().cloned(),
            Some(name) => name.parse().ok(),
        };
        let subject = Self {
            namespace,
            ..Self::default()
        };
        Some(if is_of_tasks {
            subject.with_ids(call)
        } else {
            subject
        })
    }

    fn with_ids(mut self, call: &Call) -> Self {
        let has_exec = OF_EXECS.contains(&call.method.as_str());
        let mut read = |field, text: &str| match field {
            ID => self.container = text.parse().ok(),
            EXEC_ID if has_exec => self.exec = text.parse().ok(),
            _ => {}
        };
        // A request that cannot be read has the ids that come before that.
        let _ = each_text(&call.payload, &mut read);
        self
    }
}

/// Reads the two fields of a message that can be ids.
fn each_text(message: &[u8], read: &mut impl FnMut(u32, &str)) -> protobuf::Result<()> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let (field, kind) = (tag >> 3, tag & 7);
        let Some(kind) = WireType::new(kind) else {
            return Ok(());
        };
        if kind == WireType::LengthDelimited && field <= EXEC_ID {
            read(field, &input.read_string()?);
        } else {
            input.skip_field(kind)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use containerd_shim_protos::api;
    use proptest::prelude::*;
    use protobuf::Message;

    use super::*;

    fn call(service: &str, method: &str, payload: Vec<u8>) -> Call {
        Call {
            service: service.into(),
            method: method.into(),
            payload,
            metadata: HashMap::from([(NAMESPACE.to_owned(), "n".to_owned())]),
            request: None,
            is_replay: false,
            outcomes: None,
            session: std::sync::Arc::default(),
        }
    }

    #[test]
    fn a_call_is_about_the_process_that_its_request_names() {
        let request = api::KillRequest {
            id: "c".into(),
            exec_id: "e".into(),
            signal: 9,
            ..api::KillRequest::default()
        };
        let payload = request.write_to_bytes().unwrap();
        let subject = Subject::of(&call(TASK[1], "Kill", payload)).unwrap();
        let names = (subject.namespace, subject.container, subject.exec);
        let expected = ("n".parse().ok(), "c".parse().ok(), "e".parse().ok());
        assert_eq!(names, expected);
    }

    #[test]
    fn the_bundle_of_a_creation_is_not_taken_for_an_exec() {
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: "b".into(),
            ..api::CreateTaskRequest::default()
        };
        let payload = request.write_to_bytes().unwrap();
        let subject = Subject::of(&call(TASK[0], "Create", payload)).unwrap();
        assert_eq!(subject.container, "c".parse().ok());
        assert_eq!(subject.exec, None);
    }

    #[test]
    fn a_service_that_is_not_ours_has_no_subject() {
        assert_eq!(Subject::of(&call("other", "Kill", Vec::new())), None);
        let launcher = Subject::of(&call(launcher::NAME, "Cleanup", b"{}".to_vec()));
        assert_eq!(launcher.unwrap().container, None);
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_subject(payload: Vec<u8>) {
            prop_assert!(Subject::of(&call(TASK[0], "State", payload)).is_some());
        }
    }
}
