//! [`CallContext`]: on whose behalf a call acts. Owns the way from the ids of a request to the keys
//! of tasks and processes (invariant 10), so that no call reaches a task that its caller does not
//! mean.

use embedshim_core::Error;
use embedshim_core::id::{ExecId, InvalidId, Namespace, ProcessKey, TaskKey};
use embedshim_core::task::Node;
use ttrpc::{Code, Status};

use crate::server::{Call, Creation};
use crate::status;

/// How the namespace travels: in no request, but in the metadata.
pub(super) const NAMESPACE: &str = "containerd-namespace-ttrpc";

/// The answer to a call, or to a part of one.
pub(super) type Answer<T> = Result<T, Status>;

/// The node, on behalf of one call; the call's namespace; and the `Create` of its connection.
pub(super) struct CallContext<'a> {
    pub(super) node: &'a Node,
    pub(super) namespace: Namespace,
    creation: Option<Creation>,
}

impl<'a> CallContext<'a> {
    /// The context of a call; `node` acts on its behalf.
    ///
    /// Debian's containerd 1.6.20 lacks the interceptor that puts the namespace into a call's
    /// metadata (its packaging removes it); only the calls of its start-up have it. The
    /// namespace that one call names is that of all later calls of its connection.
    pub(super) fn new(call: &Call, node: &'a Node) -> Answer<Self> {
        let context = |namespace| Self {
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
            return Ok(context(namespace));
        }
        let named = call.session.namespace.get().cloned();
        named.map(context).ok_or_else(|| {
            if call.session.is_namespace_lost {
                return status::damaged("this connection's namespace");
            }
            required("neither its metadata nor an earlier call of its connection names one")
        })
    }

    /// The key of a task that is to be created.
    pub(super) fn key(&self, id: &str) -> Answer<TaskKey> {
        Ok(TaskKey {
            namespace: self.namespace.clone(),
            id: id.parse().map_err(invalid_id)?,
        })
    }

    /// The key of a task that the caller means. Another containerd can have a task of the same
    /// namespace and id, because of which the caller's `Create` was refused: then it is not there
    /// (invariant 21).
    pub(super) fn task(&self, id: &str) -> Answer<TaskKey> {
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

    /// The key of a task's init, or of the exec that `exec` names.
    pub(super) fn process(&self, id: &str, exec: &str) -> Answer<ProcessKey> {
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

/// The refusal of a call in no namespace; `why` none is known.
pub(super) fn required(why: &str) -> Status {
    let text = format!("namespace is required for this call, and {why}: failed precondition");
    ttrpc::get_status(Code::FAILED_PRECONDITION, text)
}

/// The refusal of a name that is none.
pub(super) fn invalid_id(error: InvalidId) -> Status {
    status::of(&error.into())
}
