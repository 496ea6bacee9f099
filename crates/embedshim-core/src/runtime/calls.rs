//! [`Calls`]: the calls of OCI runtimes that this process waits for, so that an operator can see
//! which one a container waits for, and for how long. Owns the list; calls nothing. What a
//! predecessor has left running is [`InFlightCalls`](super::InFlightCalls)'s.

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[cfg(feature = "spans")]
use super::caller::Reported;
use crate::id::TaskKey;
use crate::observer::Observer;

/// A call of the OCI runtime that is in flight.
#[derive(Clone, Debug)]
pub struct RuntimeCall {
    /// For which container.
    pub task: TaskKey,
    /// The runtime's command, such as `create`.
    pub operation: &'static str,
    /// When it began.
    pub since: Instant,
}

/// The calls in flight of a node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls {
    list: Arc<Mutex<List>>,
    observer: Option<Arc<dyn Observer>>,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    calls: BTreeMap<u64, RuntimeCall>,
}

impl Calls {
    /// None yet; `observer` hears of the end of each.
    pub(crate) fn new(observer: Option<Arc<dyn Observer>>) -> Self {
        Self {
            list: Arc::default(),
            observer,
        }
    }

    /// Notes a call, which is in flight for as long as the answer lives.
    pub(crate) fn begin(&self, task: &TaskKey, operation: &'static str) -> CallInFlight {
        let call = RuntimeCall {
            task: task.clone(),
            operation,
            since: Instant::now(),
        };
        let mut list = self.list();
        let number = list.next;
        list.next = list.next.wrapping_add(1);
        list.calls.insert(number, call);
        CallInFlight {
            calls: self.clone(),
            number,
            status: None,
            #[cfg(feature = "spans")]
            reported: None,
        }
    }

    /// All of them, the oldest first.
    pub(crate) fn all(&self) -> Vec<RuntimeCall> {
        self.list().calls.values().cloned().collect()
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A noted call. Dropping it says that the call is over.
#[derive(Debug)]
pub(crate) struct CallInFlight {
    calls: Calls,
    number: u64,
    status: Option<ExitStatus>,
    #[cfg(feature = "spans")]
    reported: Option<Reported>,
}

impl CallInFlight {
    /// The runtime has ended, with this status.
    pub(crate) fn ended(&mut self, status: ExitStatus) -> ExitStatus {
        *self.status.insert(status)
    }

    /// The caller of the operation hears of the end, too.
    #[cfg(feature = "spans")]
    pub(crate) fn report_to_caller(&mut self, program: &str) {
        self.reported = Reported::begin(program);
    }
}

impl Drop for CallInFlight {
    fn drop(&mut self) {
        let call = self.calls.list().calls.remove(&self.number);
        let Some(call) = call else { return };
        #[cfg(feature = "spans")]
        if let Some(reported) = &self.reported {
            reported.end(call.operation, self.status);
        }
        if let Some(observer) = &self.calls.observer {
            let has_succeeded = self.status.is_some_and(|status| status.success());
            observer.runtime_called(call.operation, call.since.elapsed(), has_succeeded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_listed_until_it_is_over() {
        let key = TaskKey {
            namespace: "n".parse().unwrap(),
            id: "c".parse().unwrap(),
        };
        let calls = Calls::default();
        let first = calls.begin(&key, "create");
        let second = calls.begin(&key, "kill");
        let listed = |calls: &Calls| -> Vec<&str> {
            calls.all().iter().map(|call| call.operation).collect()
        };
        assert_eq!(listed(&calls), ["create", "kill"]);
        drop(first);
        assert_eq!(listed(&calls), ["kill"]);
        drop(second);
        assert_eq!(listed(&calls), [""; 0]);
    }
}
