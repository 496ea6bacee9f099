//! The OCI runtime's `log.json`: JSON objects one after the other, of which the last error is the
//! reason of a failure. runc and youki write one a line, crun (1.28) each over several lines.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::spec::nullable;

/// Of a longer log the end is read: the last message is the one that counts.
const MAX_LOG: u64 = 1024 * 1024;

#[derive(Deserialize)]
struct Line {
    #[serde(default, deserialize_with = "nullable")]
    level: String,
    #[serde(default, deserialize_with = "nullable")]
    msg: String,
}

/// Forgets what earlier calls said. Blocks on the file system.
pub(super) fn discard(log: &Path) {
    let _ = std::fs::remove_file(log);
}

/// The last message of level `error` or worse, if the log can be read and holds one.
pub(crate) async fn last_error(log: &Path) -> Option<String> {
    let log = PathBuf::from(log);
    tokio::task::spawn_blocking(move || {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = std::fs::File::open(log).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG)))
            .ok()?;
        let mut bytes = Vec::new();
        file.take(MAX_LOG).read_to_end(&mut bytes).ok()?;
        last_error_in(&String::from_utf8_lossy(&bytes))
    })
    .await
    .ok()?
}

fn last_error_in(text: &str) -> Option<String> {
    let mut last = None;
    let mut rest = text;
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Line>();
        for line in values.by_ref().map_while(Result::ok) {
            if matches!(line.level.as_str(), "error" | "fatal" | "panic") {
                last = Some(line.msg);
            }
        }
        // What is no such object is skipped, to the end of its line.
        let read = rest.get(values.byte_offset()..).unwrap_or_default();
        rest = read.split_once('\n').map_or("", |(_, rest)| rest);
    }
    last.map(|message| message.trim().to_owned())
        .filter(|message| !message.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_wins_and_noise_does_not_hide_it() {
        let log = r#"{"level":"error","msg":"first","time":"t"}
{"level":"error","msg":"unable to start container process: exec: \"nope\": executable file not found in $PATH\n"}
{"level":"warning","msg":"later"}
{"level":"err"#;
        let message = last_error_in(log).unwrap();
        assert_eq!(
            message,
            r#"unable to start container process: exec: "nope": executable file not found in $PATH"#
        );
        let crun = "{\n  \"msg\": \"executable file `/nope` not found\",\n  \"level\": \"error\",\n  \"time\": \"t\"\n}\n";
        let message = "executable file `/nope` not found";
        assert_eq!(last_error_in(crun).unwrap(), message);
        let amid_noise = format!("end of a line\"}}\nnoise\n{crun}[1, 2]\n{{\"level\": null}}\n");
        assert_eq!(last_error_in(&amid_noise).unwrap(), message);
        assert_eq!(last_error_in(&format!("{crun}{crun}")).unwrap(), message);
        assert_eq!(last_error_in(""), None);
        assert_eq!(last_error_in("{\"level\":\"info\",\"msg\":\"x\"}"), None);
    }
}
