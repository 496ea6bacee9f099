//! The state directory, before anything is in it. Owns creating it, and which user it has to belong
//! to: a process that can write there can pass for any container.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// The mode bits by which group and others can write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Creates a directory for its owner alone, and those above it, if they are missing.
pub fn create(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Refuses a directory that belongs to another user. The right of others to write into it, as a new
/// tmpfs gives it, is taken away; it is refused if they have used it.
pub fn check(path: &Path) -> io::Result<()> {
    let own = nix::unistd::geteuid().as_raw();
    let foreign = |what: &str, owner| {
        let text = format!("{what} belongs to user {owner}, and this is user {own}");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    };
    let directory = File::open(path)?;
    let metadata = directory.metadata()?;
    if metadata.uid() != own {
        return foreign("it", metadata.uid());
    }
    if metadata.mode() & WRITABLE_BY_OTHERS == 0 {
        return Ok(());
    }
    directory.set_permissions(Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let owner = entry.metadata()?.uid();
        if owner != own {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            return foreign(&format!("others could write into it, and {name:?}"), owner);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    const NOBODY: u32 = 65534;

    fn make(path: &Path) -> io::Result<()> {
        create(path).and_then(|()| check(path))
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_state_directory_that_others_can_write_into_is_closed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new/state");
        make(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        for (before, after) in [(0o1777, 0o700), (0o720, 0o700), (0o755, 0o755)] {
            fs::set_permissions(&path, Permissions::from_mode(before)).unwrap();
            make(&path).unwrap();
            assert_eq!(mode(&path), after, "{before:o}");
        }
    }

    #[test]
    fn a_state_directory_of_another_user_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        make(&path).unwrap();
        let file = path.join("lock");
        fs::write(&file, "").unwrap();
        if chown(&file, Some(NOBODY), None).is_err() {
            return; // Only root can do that.
        }
        assert!(make(&path).is_ok(), "others could not write into it");
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        let refused = make(&path).unwrap_err().to_string();
        assert!(
            refused.contains("\"lock\" belongs to user 65534"),
            "{refused}"
        );
        chown(&path, Some(NOBODY), None).unwrap();
        let refused = make(&path).unwrap_err().to_string();
        assert!(refused.contains("it belongs to user 65534"), "{refused}");
    }
}
