//! Overlays of many layers: their `lowerdir=` is longer than the page that mount(2) takes (about 50
//! of containerd's snapshots). As containerd does, the paths are made relative to what they have in
//! common and mounted from there.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::chdir;

pub(super) const LOWERDIR: &str = "lowerdir=";

/// The same mount data with shorter paths, and the directory in which it means the same. `None` if
/// there is nothing to gain.
pub(super) fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let options: Vec<&str> = data.split(',').collect();
    let place = options
        .iter()
        .position(|option| option.starts_with(LOWERDIR))?;
    let list = options.get(place)?.strip_prefix(LOWERDIR)?;
    // An escaped colon or comma belongs to a path: rare enough to leave it to the kernel as it is.
    if list.contains('\\') {
        return None;
    }
    let directories: Vec<&Path> = list.split(':').map(Path::new).collect();
    if directories.len() < 2 || !directories.iter().all(|directory| directory.is_absolute()) {
        return None;
    }
    let base = common_parent(&directories)?;
    let relative = directories
        .iter()
        .map(|directory| directory.strip_prefix(&base).ok()?.to_str());
    let list = relative.collect::<Option<Vec<&str>>>()?.join(":");
    let shorter = format!("{LOWERDIR}{list}");
    let options = options.iter().enumerate().map(|(number, option)| {
        if number == place {
            shorter.as_str()
        } else {
            option
        }
    });
    Some((base, options.collect::<Vec<&str>>().join(",")))
}

/// The deepest directory that all are below, and none of them itself.
fn common_parent(directories: &[&Path]) -> Option<PathBuf> {
    let mut common = directories.first()?.parent()?;
    while !directories
        .iter()
        .all(|directory| *directory != common && directory.starts_with(common))
    {
        common = common.parent()?;
    }
    Some(common.to_owned())
}

/// The lower directories, and all other options. `None` if there are none, or their paths are
/// escaped.
pub(super) fn split(data: &str) -> Option<(Vec<&Path>, Vec<&str>)> {
    let (lower, rest): (Vec<&str>, Vec<&str>) = data
        .split(',')
        .partition(|option| option.starts_with(LOWERDIR));
    let list = lower.first()?.strip_prefix(LOWERDIR)?;
    (!list.contains('\\')).then(|| (list.split(':').map(Path::new).collect(), rest))
}

/// Runs `call` with `directory` as its working directory, which no other thread notices.
pub(super) fn inside(
    directory: &Path,
    call: impl FnOnce() -> Result<(), Errno> + Send,
) -> Result<(), Errno> {
    let done = on_own_thread(|| {
        unshare(CloneFlags::CLONE_FS)?;
        chdir(directory)?;
        Ok(call()?)
    });
    done.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Runs `call` on a thread that ends afterwards, with whatever it unshared.
pub(super) fn on_own_thread<T: Send>(call: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("mount".into())
            .spawn_scoped(scope, call)?
            .join()
            .unwrap_or_else(|_| Err(Errno::EIO.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_what_they_have_in_common_and_nothing_else() {
        let shortened =
            |data: &str| shorten(data).map(|(base, data)| format!("{}: {data}", base.display()));
        assert_eq!(
            shortened("index=off,lowerdir=/s/12/fs:/s/3/fs,upperdir=/s/4/fs,workdir=/s/4/work")
                .as_deref(),
            Some("/s: index=off,lowerdir=12/fs:3/fs,upperdir=/s/4/fs,workdir=/s/4/work")
        );
        assert_eq!(
            shortened("lowerdir=/a/b:/a/b/c").as_deref(),
            Some("/a: lowerdir=b:b/c")
        );
        assert_eq!(
            shortened("lowerdir=/a:/b").as_deref(),
            Some("/: lowerdir=a:b")
        );
        for as_it_is in [
            "index=off",
            "lowerdir=/a",
            "lowerdir=a:b",
            r"lowerdir=/a\:b:/c",
        ] {
            assert_eq!(shortened(as_it_is), None, "{as_it_is}");
        }
    }

    #[test]
    fn only_the_callers_working_directory_changes() {
        let before = std::env::current_dir().unwrap();
        let mut seen = PathBuf::new();
        inside(Path::new("/proc"), || {
            seen = nix::unistd::getcwd()?;
            Ok(())
        })
        .unwrap();
        assert_eq!(
            (seen, std::env::current_dir().unwrap()),
            (PathBuf::from("/proc"), before)
        );
        assert_eq!(
            inside(Path::new("/nonexistent"), || Ok(())).unwrap_err(),
            Errno::ENOENT
        );
    }
}
