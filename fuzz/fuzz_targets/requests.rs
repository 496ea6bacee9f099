//! Request messages of every method, to a node without tasks: no panic, and nothing but an error
//! with words, where there is nothing to answer.
#![no_main]

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use embedshim_core::fuzzing::{mount_options, streams};
use embedshim_core::task::{Node, NodeConfig};
use libfuzzer_sys::fuzz_target;
use monitor_pidfd::PidfdMonitor;
use shim_api::fuzzing::create;
use shim_api::server::{Call, Handler, Session};
use shim_api::services::Services;
use tokio::runtime::{Builder, Runtime};

const METHODS: [&str; 16] = [
    "State",
    "Create",
    "Start",
    "Delete",
    "Pids",
    "Pause",
    "Resume",
    "Checkpoint",
    "Kill",
    "Exec",
    "ResizePty",
    "CloseIO",
    "Update",
    "Wait",
    "Stats",
    "Connect",
];

static SERVER: LazyLock<(Runtime, Services)> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let state_dir = std::env::temp_dir().join(format!("embedshim-fuzz-{}", std::process::id()));
    let config = NodeConfig {
        runtime_deadline: std::time::Duration::from_secs(1),
        ..NodeConfig::new(state_dir)
    };
    let node = runtime.block_on(async {
        let monitor = Arc::new(PidfdMonitor::new().unwrap());
        Node::open(config, monitor).await.unwrap()
    });
    (runtime, Services::new(node))
});

fuzz_target!(|bytes: &[u8]| {
    let Some((&number, payload)) = bytes.split_first() else {
        return;
    };
    let method = METHODS[usize::from(number) % METHODS.len()];
    if method == "Create" {
        // Not to be carried out: we are root, and it mounts.
        if let Some((mounts, paths)) = create(payload) {
            streams(&paths);
            mounts.iter().for_each(|mount| {
                mount_options(mount);
            });
        }
        return;
    }
    let call = Call {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        payload: payload.into(),
        metadata: HashMap::from([("containerd-namespace-ttrpc".into(), "fuzz".into())]),
        session: Arc::new(Session::default()),
        request: None,
        is_replay: false,
        outcomes: None,
    };
    let (runtime, services) = &*SERVER;
    match runtime.block_on(services.call(call)) {
        Ok(_) => assert_eq!(method, "Connect"),
        Err(status) => assert!(!status.message.is_empty()),
    }
});
