//! [`Logger`]: a `binary://` logger that writes what it gets to files, and where these are. An
//! output that it has read to the end has a file that says so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Each logger has files of its own, since there may be several: a creation that is done again
/// starts another one. It is ready (descriptor 5 is closed) as soon as both files are there.
const SCRIPT: &str = "#!/bin/sh
export PATH=/usr/bin:/bin
log=$2.$$
( exec > $log.out 4<&-; exec 5>&-; cat <&3; : > $log.out.end ) &
( exec > $log.err 3<&-; exec 5>&-; cat <&4; : > $log.err.end ) &
exec 3<&- 4<&- 5>&-
wait
";

/// The program, which all loggers of a run are.
#[derive(Clone, Debug)]
pub(crate) struct Logger(PathBuf);

impl Logger {
    /// Writes the program into a directory.
    pub(crate) fn install(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join("logger");
        fs::write(&path, SCRIPT)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    /// What a request has to say so that the output goes to files that begin like this.
    pub(crate) fn uri(&self, files: &Path) -> String {
        format!("binary://{}?files={}", self.0.display(), files.display())
    }
}

/// What loggers have written of one output, and whether each has read it to the end. With `is_due`
/// only the lines that it accepts: a logger's pipe is the runtime's too, and what is left of a
/// runtime that was killed says so there.
pub(crate) fn read(
    files: &Path,
    suffix: &str,
    is_due: Option<fn(&[u8]) -> bool>,
) -> anyhow::Result<(Vec<u8>, bool)> {
    let (mut bytes, mut count, mut ends) = (Vec::new(), 0, 0);
    for (path, name) in written(files)? {
        if name.ends_with(suffix) {
            count += 1;
            let written = fs::read(path)?;
            let lines = written.split_inclusive(|&byte| byte == b'\n');
            let due = lines.filter(|line| is_due.is_none_or(|is_due| is_due(line)));
            bytes.extend(due.flatten());
        } else if name.ends_with(&format!("{suffix}.end")) {
            ends += 1;
        }
    }
    Ok((bytes, count > 0 && ends == count))
}

/// All files whose names begin like this.
fn written(files: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let start = files.file_name().unwrap_or_default().to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir(files.parent().unwrap_or(files))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{start}.")) {
            found.push((entry.path(), name));
        }
    }
    found.sort();
    Ok(found)
}
