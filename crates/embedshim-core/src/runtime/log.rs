//! The OCI runtime's `log.json`: one JSON object a line, of which the last error is the reason of a failure.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A runtime that logs more than this in one call has its last message cut off, nothing worse.
const MAX_LOG: u64 = 1024 * 1024;

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// Forgets what earlier calls said.
pub(super) async fn discard(log: &Path) {
    let _ = tokio::fs::remove_file(log).await;
}

/// The last message of level `error` or worse, if the log can be read and holds one.
pub(super) async fn last_error(log: &Path) -> Option<String> {
    let log = PathBuf::from(log);
    tokio::task::spawn_blocking(move || {
        use std::io::Read;
        let mut text = String::new();
        std::fs::File::open(log)
            .ok()?
            .take(MAX_LOG)
            .read_to_string(&mut text)
            .ok()?;
        last_error_in(&text)
    })
    .await
    .ok()?
}

fn last_error_in(text: &str) -> Option<String> {
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg.trim().to_owned())
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
        assert_eq!(last_error_in(""), None);
        assert_eq!(last_error_in("{\"level\":\"info\",\"msg\":\"x\"}"), None);
    }
}
