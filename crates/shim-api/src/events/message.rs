//! Events as containerd's messages: the topics of `core/runtime/events.go` and the messages of
//! `api/events/task.proto`, with the fields that runc-v2 fills. Pure.

use containerd_shim_protos::api;
use containerd_shim_protos::events::task as messages;
use embedshim_core::event::EventKind;
use embedshim_core::id::ContainerId;
use embedshim_core::rootfs::Mount;
use embedshim_core::stdio::StdioPaths;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::Status;

use crate::services::{any, timestamp};
use crate::status;

/// A topic and a message of `containerd.events`, its other fields empty.
macro_rules! event {
    ($topic:literal, $name:ident { $($field:ident $(: $value:expr)?),* $(,)? }) => {
        Ok(($topic, pack(&messages::$name { $($field $(: $value)?,)* ..messages::$name::default() })?))
    };
}

/// The topic and the message of an event.
pub(super) fn of(id: &ContainerId, kind: &EventKind) -> Result<(&'static str, Any), Status> {
    let container_id = id.as_str().to_owned();
    match kind {
        EventKind::Created {
            bundle,
            rootfs,
            stdio,
            checkpoint,
            pid,
        } => event!(
            "/tasks/create",
            TaskCreate {
                container_id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: rootfs.iter().map(mount).collect(),
                io: MessageField::some(io(stdio)),
                checkpoint: checkpoint
                    .as_ref()
                    .map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
                pid: *pid,
            }
        ),
        EventKind::Started { pid } => event!(
            "/tasks/start",
            TaskStart {
                container_id,
                pid: *pid,
            }
        ),
        EventKind::Exited {
            exec,
            pid,
            exit_code,
            exited_at,
        } => event!(
            "/tasks/exit",
            TaskExit {
                id: exec
                    .as_ref()
                    .map_or_else(|| container_id.clone(), |exec| exec.as_str().to_owned()),
                container_id,
                pid: *pid,
                exit_status: *exit_code,
                exited_at: timestamp::of(*exited_at),
            }
        ),
        EventKind::Deleted {
            pid,
            exit_code,
            exited_at,
        } => event!(
            "/tasks/delete",
            TaskDelete {
                container_id,
                pid: *pid,
                exit_status: *exit_code,
                exited_at: timestamp::of(*exited_at),
            }
        ),
        EventKind::ExecAdded { exec } => event!(
            "/tasks/exec-added",
            TaskExecAdded {
                container_id,
                exec_id: exec.as_str().into(),
            }
        ),
        EventKind::ExecStarted { exec, pid } => event!(
            "/tasks/exec-started",
            TaskExecStarted {
                container_id,
                exec_id: exec.as_str().into(),
                pid: *pid,
            }
        ),
        EventKind::Paused => event!("/tasks/paused", TaskPaused { container_id }),
        EventKind::Resumed => event!("/tasks/resumed", TaskResumed { container_id }),
        EventKind::Oom => event!("/tasks/oom", TaskOOM { container_id }),
        other => Err(status::internal(format!("no message for {other:?}"))),
    }
}

fn pack<M: Message>(message: &M) -> Result<Any, Status> {
    any::pack(&format!("containerd.events.{}", M::NAME), message)
}

fn io(stdio: &StdioPaths) -> messages::TaskIO {
    messages::TaskIO {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        ..messages::TaskIO::default()
    }
}

fn mount(mount: &Mount) -> api::Mount {
    api::Mount {
        type_: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..api::Mount::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn types_have_their_bare_full_name() {
        let id = "c".parse().unwrap();
        let exited = EventKind::Exited {
            exec: Some("e".parse().unwrap()),
            pid: 7,
            exit_code: 9,
            exited_at: SystemTime::UNIX_EPOCH,
        };
        let (topic, any) = of(&id, &exited).unwrap();
        assert_eq!(
            (topic, any.type_url.as_str()),
            ("/tasks/exit", "containerd.events.TaskExit")
        );
        let read = messages::TaskExit::parse_from_bytes(&any.value).unwrap();
        assert_eq!(
            (
                read.container_id.as_str(),
                read.id.as_str(),
                read.exit_status
            ),
            ("c", "e", 9)
        );
        assert_eq!(
            of(&id, &EventKind::Oom).unwrap().1.type_url,
            "containerd.events.TaskOOM"
        );
    }
}
