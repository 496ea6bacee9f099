//! [`CallObserver`]: hears of the calls of the OCI runtime that one operation makes. Owns the way
//! from the caller of an operation to those calls, over the task in which the operation goes on;
//! changes nothing of what is called. In builds with the feature `spans` only.
#![cfg(feature = "spans")]

use std::fmt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::SystemTime;

tokio::task_local! {
    static OBSERVER: Option<Arc<dyn CallObserver>>;
}

/// Hears of the calls of the OCI runtime that are made for what it was given to
/// ([`observe_calls`]), each when it is over.
///
/// Called by any thread, the runtime's among them, so it must not wait.
pub trait CallObserver: fmt::Debug + Send + Sync {
    /// A call is over.
    fn called(&self, call: EndedCall<'_>);
}

/// A call of the OCI runtime that is over.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct EndedCall<'a> {
    /// The file name of the runtime's program.
    pub program: &'a str,
    /// The runtime's command, such as `create`.
    pub operation: &'static str,
    /// When it began.
    pub began: SystemTime,
    /// How it ended; `None` if it was not begun, or was given up.
    pub status: Option<ExitStatus>,
}

/// Does `work`, and tells of the calls of the OCI runtime that a [`Node`](crate::task::Node) makes
/// for it: also of those that are over after `work` was dropped, as long as the operation goes on.
pub async fn observe_calls<T>(observer: Arc<dyn CallObserver>, work: impl Future<Output = T>) -> T {
    OBSERVER.scope(Some(observer), work).await
}

/// The same work, which takes the observer of its caller with it into a task of its own.
pub(crate) fn inherit<T>(
    work: impl Future<Output = T> + Send + 'static,
) -> impl Future<Output = T> + Send + 'static {
    OBSERVER.scope(observer(), work)
}

fn observer() -> Option<Arc<dyn CallObserver>> {
    OBSERVER.try_with(Clone::clone).ok().flatten()
}

/// A call of which its caller will hear.
#[derive(Debug)]
pub(super) struct Reported {
    observer: Arc<dyn CallObserver>,
    program: String,
    began: SystemTime,
}

impl Reported {
    /// A call of this program that begins now, if its caller wants to hear of it.
    pub(super) fn begin(program: &str) -> Option<Self> {
        let observer = observer()?;
        let name = Path::new(program).file_name().unwrap_or_default();
        Some(Self {
            observer,
            program: name.to_string_lossy().into_owned(),
            began: SystemTime::now(),
        })
    }

    /// The call is over.
    pub(super) fn end(&self, operation: &'static str, status: Option<ExitStatus>) {
        self.observer.called(EndedCall {
            program: &self.program,
            operation,
            began: self.began,
            status,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<String>>);

    impl CallObserver for Heard {
        fn called(&self, call: EndedCall<'_>) {
            let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            heard.push(format!("{} {}", call.program, call.operation));
        }
    }

    fn call() -> bool {
        let reported = Reported::begin("/usr/sbin/runc");
        reported.inspect(|call| call.end("create", None)).is_some()
    }

    #[tokio::test]
    async fn a_caller_hears_of_calls_in_another_task_and_no_other_caller_does() {
        let heard = Arc::new(Heard::default());
        let work = async { tokio::spawn(inherit(async { call() })).await };
        assert!(observe_calls(heard.clone(), work).await.unwrap());
        assert!(!tokio::spawn(inherit(async { call() })).await.unwrap());
        assert!(!call());
        assert_eq!(*heard.0.lock().unwrap(), ["runc create"]);
    }
}
