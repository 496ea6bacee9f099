//! Reading small text files of the kernel (procfs, cgroupfs) with few system calls. Their size is
//! 0 whatever is in them, so the readers of `std::fs` begin with 32 bytes and double that. Never
//! limits what is read: what a container can make long is not for this module.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// More than most of them have.
const USUAL: usize = 4096;

/// The whole text. Blocks as long as the file's file system does.
pub(crate) fn read(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read_bytes(path)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The same, of a file in which a process's name can be, which is any bytes.
pub(crate) fn read_bytes(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(USUAL);
    // `File` would ask for the size first.
    File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_any_length_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for length in [0, 1, USUAL - 1, USUAL, USUAL + 1, 10 * USUAL] {
            let text = "x".repeat(length);
            std::fs::write(&path, &text).unwrap();
            assert_eq!(read(&path).unwrap(), text);
        }
        assert!(
            read("/proc/self/stat")
                .unwrap()
                .starts_with(char::is_numeric)
        );
        let missing = read(dir.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
