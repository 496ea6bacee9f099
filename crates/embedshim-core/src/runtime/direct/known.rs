//! Which programs are a runc whose state is known. Owns the list of those that were asked for their
//! version; never executes one. A wrapper can do anything in a call, so a script is none, and
//! neither is a program that an init was not made by.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// More programs than a node has runtimes: the list is emptied.
const MANY: usize = 64;
/// How a program begins that is none that an interpreter reads.
const ELF: &[u8; 4] = b"\x7fELF";
/// How runc begins to tell its version. All of them note the same of a container.
const VERSION: &[u8] = b"runc version 1.";

/// Which content a program has: another file, or one that was changed, is another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProgramId {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    modified: (i64, i64),
    /// In bytes.
    pub(super) size: u64,
}

/// What is known of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A runc whose state is known.
    Known(ProgramId),
    /// Something else, or another call asks it at this moment.
    Other,
    /// To be asked for its version, by the caller that gets this, which then [`note`]s the answer.
    Ask(PathBuf, ProgramId),
}

/// What is known of the program at `path`, which is one with no symbolic link to resolve. Blocks on
/// its file system.
pub(super) fn judge(path: &Path) -> Verdict {
    let Some(id) = File::open(path).ok().and_then(|file| identify(&file)) else {
        return Verdict::Other;
    };
    let mut asked = asked();
    match asked.get(&id) {
        Some(true) => return Verdict::Known(id),
        Some(false) => return Verdict::Other,
        None => {}
    }
    if asked.len() >= MANY {
        asked.clear();
    }
    // Until it has answered.
    asked.insert(id, false);
    Verdict::Ask(path.to_owned(), id)
}

/// Notes whether a program is known; `None`: it could not be asked, and is to be asked again.
pub(super) fn note(id: ProgramId, is_known: Option<bool>) {
    match is_known {
        Some(is_known) => drop(asked().insert(id, is_known)),
        None => drop(asked().remove(&id)),
    }
}

/// Whether a program that says this of its version is a runc whose state is known.
pub(super) fn is_version_known(text: &[u8]) -> bool {
    text.starts_with(VERSION)
}

/// Which program this is, if it is one that the kernel itself executes.
fn identify(mut file: &File) -> Option<ProgramId> {
    let meta = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let mut head = [0; ELF.len()];
    file.read_exact(&mut head).ok()?;
    (head == *ELF).then(|| ProgramId {
        device: meta.dev(),
        inode: meta.ino(),
        changed: (meta.ctime(), meta.ctime_nsec()),
        modified: (meta.mtime(), meta.mtime_nsec()),
        size: meta.size(),
    })
}

fn asked() -> MutexGuard<'static, HashMap<ProgramId, bool>> {
    static ASKED: LazyLock<Mutex<HashMap<ProgramId, bool>>> = LazyLock::new(Mutex::default);
    ASKED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_asked_once_and_a_script_never() {
        let directory = tempfile::tempdir().unwrap();
        let (script, program) = (
            directory.path().join("script"),
            directory.path().join("runc"),
        );
        std::fs::write(&script, "#!/bin/sh\necho runc version 1.1.5\n").unwrap();
        std::fs::write(&program, "\x7fELF and more").unwrap();
        assert_eq!(judge(&script), Verdict::Other);
        assert_eq!(judge(&directory.path().join("missing")), Verdict::Other);
        let Verdict::Ask(_, id) = judge(&program) else {
            panic!("it is not asked")
        };
        assert_eq!(judge(&program), Verdict::Other, "it is asked twice");
        note(id, None);
        assert!(matches!(judge(&program), Verdict::Ask(..)));
        note(id, Some(true));
        assert_eq!(judge(&program), Verdict::Known(id));
        std::fs::write(&program, "\x7fELF, an upgrade of it").unwrap();
        assert!(matches!(judge(&program), Verdict::Ask(..)));
    }

    #[test]
    fn of_versions_runcs_first_is_known() {
        assert!(is_version_known(b"runc version 1.1.5+ds1\ncommit: x\n"));
        for other in [
            "runc version 2.0.0",
            "crun version 1.8",
            "sysbox-runc\n",
            "youki version: 0.5",
        ] {
            assert!(!is_version_known(other.as_bytes()), "{other}");
        }
    }
}
