//! `loop` mounts: a file behind a block device that goes away with its last mount. Owns nothing
//! longer than the mount call takes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::sys;

const CONTROL: &str = "/dev/loop-control";
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
/// A wish: the kernel falls back to buffered I/O where the file system below has none.
const DIRECT_IO: u32 = 16;
/// Another program may take the free device before us; as often as util-linux tries.
const TRIES: usize = 32;

/// A configured loop device; kept open until it is mounted, for it goes away with its last user.
pub(super) struct LoopDevice {
    pub(super) path: PathBuf,
    _device: OwnedFd,
}

impl LoopDevice {
    /// Puts `source` behind a free device (Linux 5.8).
    pub(super) fn of(source: &str, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(source)?;
        let control = File::open(CONTROL)?;
        for _ in 0..TRIES {
            let number = sys::free_loop_device(control.as_fd())?;
            let path = Path::new("/dev").join(format!("loop{number}"));
            let device = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(&path)?;
            let flags = AUTOCLEAR | DIRECT_IO | if read_only { READ_ONLY } else { 0 };
            match sys::configure_loop_device(device.as_fd(), file.as_fd(), flags) {
                Ok(()) => {
                    return Ok(Self {
                        path,
                        _device: device.into(),
                    });
                }
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EBUSY.into())
    }
}
