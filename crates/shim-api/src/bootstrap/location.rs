//! Where the daemon is: the state directory and the socket in it. The launcher reads no file to
//! know it.

use std::io;
use std::path::{Path, PathBuf};

/// The environment variable that names another state directory; containerd passes its own
/// environment on to the launcher.
pub const STATE_DIR_VARIABLE: &str = "EMBEDSHIM_STATE_DIR";
const DEFAULT_STATE_DIR: &str = "/run/embedshim";
/// The bytes of `sun_path` without its final zero.
const MAX_SOCKET_PATH: usize = 107;

/// The state directory that the environment names, or `/run/embedshim`.
pub fn state_dir() -> PathBuf {
    std::env::var_os(STATE_DIR_VARIABLE)
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| DEFAULT_STATE_DIR.into(), PathBuf::from)
}

/// The socket in a state directory, if a socket can have that path.
pub fn socket(state_dir: &Path) -> io::Result<PathBuf> {
    socket_named(state_dir, "shim.sock")
}

/// The socket in a state directory that answers operators, if a socket can have that path.
pub fn admin_socket(state_dir: &Path) -> io::Result<PathBuf> {
    socket_named(state_dir, "admin.sock")
}

fn socket_named(state_dir: &Path, name: &str) -> io::Result<PathBuf> {
    let invalid = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if !state_dir.is_absolute() {
        return invalid(format!(
            "the state directory {} is not an absolute path",
            state_dir.display()
        ));
    }
    let path = state_dir.join(name);
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return invalid(format!(
            "the path {} has {length} bytes, a socket's may have {MAX_SOCKET_PATH}",
            path.display()
        ));
    }
    if path.to_str().is_none() {
        return invalid(format!("the path {} is not valid UTF-8", path.display()));
    }
    Ok(path)
}
