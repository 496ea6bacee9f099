//! The kernel's list of mounts, `/proc/self/mountinfo`, in the order in which they were made.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use tracing::debug;

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountPoint {
    /// The directory of the file system that is mounted here.
    pub(crate) root: PathBuf,
    /// Where it is mounted.
    pub(crate) path: PathBuf,
    /// Its type, such as `cgroup2`.
    pub(crate) kind: String,
    /// The file system's own options, such as a v1 hierarchy's controllers.
    pub(crate) options: Vec<String>,
}

/// Reads the mounts of this process's mount namespace. It takes the longer the more there are, of
/// all containers of the node: nothing in an ordinary life needs it.
pub(crate) fn read_mountinfo() -> io::Result<Vec<MountPoint>> {
    debug!("reading the kernel's list of mounts");
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// `36 35 98:0 /root /path rw,noatime master:1 - ext4 /dev/root rw,errors=continue` (proc(5)).
fn parse(text: &[u8]) -> Vec<MountPoint> {
    text.split(|&byte| byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = unescape(fields.nth(3)?);
    let path = unescape(fields.next()?);
    let mut tail = fields.skip_while(|&field| field != b"-").skip(1);
    let kind = String::from_utf8_lossy(tail.next()?).into_owned();
    let options = String::from_utf8_lossy(tail.nth(1)?)
        .split(',')
        .map(str::to_owned)
        .collect();
    Some(MountPoint {
        root,
        path,
        kind,
        options,
    })
}

/// Blanks, tabs, newlines and backslashes are written as octal numbers.
fn unescape(field: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                plain.push(escaped);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_paths_and_optional_fields_are_understood() {
        let text = b"36 35 98:0 / /a\\040b rw,noatime shared:1 master:2 - cgroup cgroup rw,cpu,cpuacct\nrubbish\n\
            37 35 98:0 /r /c rw - ext4 /dev/root rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].path, PathBuf::from("/a b"));
        assert_eq!(mounts[0].kind, "cgroup");
        assert_eq!(mounts[0].options, ["rw", "cpu", "cpuacct"]);
        assert_eq!(mounts[1].root, PathBuf::from("/r"));
    }
}
