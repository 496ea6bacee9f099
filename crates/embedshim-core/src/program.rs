//! [`touch`]: a look at a program before it is executed. Owns that a file system that does not
//! answer holds up this thread, which has nothing, and not a child: between `fork` and `execve` a
//! child has a copy of every descriptor of ours, so that no stream would end and no lock be free as
//! long as it waits.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Reads the beginning of the program, found as `execvp(3)` finds it, by this `PATH` or by ours.
/// Blocks as long as its file system does. What is wrong with it, the execution tells.
pub(crate) fn touch(program: &OsStr, path: Option<&str>) {
    let read = |path: &Path| {
        let file = File::open(path);
        file.and_then(|mut file| file.read(&mut [0; 4096])).is_ok()
    };
    if Path::new(program).components().count() > 1 {
        read(Path::new(program));
        return;
    }
    let path = path.map_or_else(|| std::env::var_os("PATH").unwrap_or_default(), Into::into);
    let _ = std::env::split_paths(&path).any(|directory| read(&directory.join(program)));
}
