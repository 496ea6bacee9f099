//! [`find`] and [`touch`]: a look at a program before it is executed. Owns that a file system that
//! does not answer holds up this thread, which has nothing, and not a child: between `fork` and
//! `execve` a child has a copy of every descriptor of the daemon, so that no stream would end and
//! no lock be free as long as it waits.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Reads the beginning of the program. Blocks as long as its file system does. What is wrong with
/// it, the execution tells.
pub(crate) fn touch(program: &OsStr, path: Option<&str>) {
    let _ = find(program, path);
}

/// Where the program is that can be read, as `execvp(3)` finds it, by this `PATH` or by the
/// daemon's.
/// Blocks as long as its file system does.
pub(crate) fn find(program: &OsStr, path: Option<&str>) -> Option<PathBuf> {
    let read = |path: &PathBuf| {
        let file = File::open(path);
        file.and_then(|mut file| file.read(&mut [0; 4096])).is_ok()
    };
    if Path::new(program).components().count() > 1 {
        return Some(PathBuf::from(program)).filter(read);
    }
    let path = path.map_or_else(|| std::env::var_os("PATH").unwrap_or_default(), Into::into);
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
    candidates.find(read)
}
