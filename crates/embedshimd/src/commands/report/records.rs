//! Records without what is private of a container or a pod: only fields that are known not to be
//! are taken, so that a field of a later version stays out.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};

/// The longest record that is read.
const MAX_RECORD: u64 = 4 << 20;
/// The most records.
const MAX_RECORDS: usize = 5_000;
/// The fields of a task that are taken as they are.
const OF_TASK: [&str; 8] = [
    "version",
    "boot_id",
    "namespace",
    "id",
    "bundle",
    "complete",
    "cgroup",
    "oom_kills",
];
/// The fields of a process that are taken as they are.
const OF_PROCESS: [&str; 8] = [
    "phase",
    "identity",
    "exit",
    "stdin_closed",
    "number",
    "made_by",
    "start_failed",
    "may_have_run",
];
/// The fields of a sandbox that are taken as they are: labels are the user's.
const OF_SANDBOX: [&str; 10] = [
    "version",
    "boot_id",
    "namespace",
    "id",
    "phase",
    "created_at",
    "ended",
    "network",
    "ipc",
    "processes",
];

/// The names of all records of tasks, each with what may be told of it.
pub(super) fn of_tasks(state_dir: &Path) -> Vec<(String, Vec<u8>)> {
    redacted(&state_dir.join("tasks"), redact)
}

/// The same of sandboxes.
pub(super) fn of_sandboxes(state_dir: &Path) -> Vec<(String, Vec<u8>)> {
    let redact = |record: &Value| Value::Object(fields(record, &OF_SANDBOX));
    redacted(&state_dir.join("sandboxes"), redact)
}

fn redacted(folder: &Path, redact: impl Fn(&Value) -> Value) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let records = entries.take(MAX_RECORDS).map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let told = match read(&entry.path()) {
            Ok(record) => serde_json::to_vec_pretty(&redact(&record)).unwrap_or_default(),
            Err(error) => error.to_string().into_bytes(),
        };
        (name, told)
    });
    records.collect()
}

fn read(path: &Path) -> io::Result<Value> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_RECORD).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

fn redact(record: &Value) -> Value {
    let mut told = fields(record, &OF_TASK);
    if let Some(init) = record.get("init") {
        told.insert("init".into(), Value::Object(fields(init, &OF_PROCESS)));
    }
    if let Some(Value::Object(execs)) = record.get("execs") {
        let execs = execs
            .iter()
            .map(|(id, exec)| (id.clone(), Value::Object(fields(exec, &OF_PROCESS))));
        told.insert("execs".into(), Value::Object(execs.collect()));
    }
    Value::Object(told)
}

fn fields(of: &Value, names: &[&str]) -> Map<String, Value> {
    let taken = names
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), of.get(*name)?.clone())));
    taken.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_known_not_to_be_private_is_told() {
        let record = json!({
            "version": 1, "id": "c", "bundle": {"path": "/b"}, "owner": "/c.sock",
            "runtime": {"context": {"environment": ["SECRET=1"]}},
            "rootfs": [{"options": ["password=SECRET"]}],
            "init": {"phase": "running", "stdio": {"stdout": "binary:///l?token=SECRET"}},
            "execs": {"e": {"phase": "created", "spec": "{\"args\":[\"SECRET\"]}"}},
            "of_a_later_version": "SECRET",
        });
        let told = redact(&record);
        assert_eq!(
            told,
            json!({
                "version": 1, "id": "c", "bundle": {"path": "/b"},
                "init": {"phase": "running"}, "execs": {"e": {"phase": "created"}},
            })
        );
    }
}
