//! What the fuzz targets call, compiled for them only: readers of text from outside, without what
//! would follow from it.

use std::path::Path;

use crate::rootfs::{self, Mount};
use crate::spec::Spec;
use crate::stdio::{Plan, StdioPaths};
use crate::task::TaskRecord;

/// Sorts a mount's options out.
pub fn mount_options(mount: &Mount) -> bool {
    rootfs::options_are_understood(mount, Path::new("/rootfs"))
}

/// Sorts out where streams go.
pub fn streams(paths: &StdioPaths) -> bool {
    Plan::parse(paths).is_ok()
}

/// Reads an OCI spec and asks it everything we ask.
pub fn spec(text: &[u8]) -> Option<(bool, bool)> {
    let spec: Spec = serde_json::from_slice(text).ok()?;
    let traits = spec.traits();
    Some((traits.systemd_cgroup, traits.own_pid_namespace))
}

/// Reads a task's record, and writes it again if it is one.
pub fn task_record(text: &[u8]) -> Option<Vec<u8>> {
    let record: TaskRecord = serde_json::from_slice(text).ok()?;
    serde_json::to_vec(&record).ok()
}
