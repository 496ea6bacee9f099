//! [`Scope`]: which tasks a call can mean. Owns the way from the ids of a request to keys.

use embedshim_core::Error;
use embedshim_core::id::{ExecId, Namespace, ProcessKey, TaskKey};
use embedshim_core::task::Node;
use ttrpc::{Code, Status};

use crate::server::{Call, Creation};
use crate::status;

/// How the namespace travels: in no request, but in the metadata.
const NAMESPACE: &str = "containerd-namespace-ttrpc";

type Answer<T> = Result<T, Status>;

/// The namespace of a call, and the `Create` of its connection: with them the way from ids to keys.
pub(crate) struct Scope<'a> {
    node: &'a Node,
    namespace: Namespace,
    creation: Option<Creation>,
}

impl<'a> Scope<'a> {
    /// Debian's containerd 1.6.20 lacks the interceptor that puts the namespace into a call's
    /// metadata (its packaging removes it); only the calls of its start-up have it. What a
    /// connection has told once holds for all its calls.
    pub(crate) fn of(call: &Call, node: &'a Node) -> Answer<Self> {
        let scope = |namespace| Self {
            node,
            namespace,
            creation: call.session.creation().clone(),
        };
        let name = call
            .metadata
            .get(NAMESPACE)
            .map(String::as_str)
            .unwrap_or_default();
        if !name.is_empty() {
            let namespace: Namespace = name.parse().map_err(invalid_id)?;
            call.session.namespace.get_or_init(|| namespace.clone());
            return Ok(scope(namespace));
        }
        let told = call.session.namespace.get().cloned();
        told.map(scope).ok_or_else(|| {
            if call.session.is_namespace_lost {
                return status::damaged("this connection's namespace");
            }
            required("neither its metadata nor an earlier call of its connection names one")
        })
    }

    pub(crate) fn key(&self, id: &str) -> Answer<TaskKey> {
        Ok(TaskKey {
            namespace: self.namespace.clone(),
            id: id.parse().map_err(invalid_id)?,
        })
    }

    /// A task that the caller means. Another containerd can have one of the same namespace and id,
    /// and the caller's was refused because of it: then it is not there.
    pub(crate) fn task(&self, id: &str) -> Answer<TaskKey> {
        let key = self.key(id)?;
        if let Some(asked) = self.creation.as_ref().filter(|asked| asked.id == key.id)
            && self
                .node
                .bundle_id(&key)
                .is_some_and(|found| found != asked.bundle)
        {
            return Err(status::of(&Error::NoSuchTask));
        }
        Ok(key)
    }

    pub(crate) fn process(&self, id: &str, exec: &str) -> Answer<ProcessKey> {
        let exec = match exec {
            "" => None,
            exec => Some(exec.parse::<ExecId>().map_err(invalid_id)?),
        };
        Ok(ProcessKey {
            task: self.task(id)?,
            exec,
        })
    }
}

/// A call in no namespace; `why` none is known.
pub(crate) fn required(why: &str) -> Status {
    let text = format!("namespace is required for this call, and {why}: failed precondition");
    ttrpc::get_status(Code::FAILED_PRECONDITION, text)
}

pub(crate) fn invalid_id(error: embedshim_core::id::InvalidId) -> Status {
    status::of(&error.into())
}
