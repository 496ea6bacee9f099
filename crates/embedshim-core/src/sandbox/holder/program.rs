//! The program of a pod's init process, a few hundred bytes of machine code that need no other
//! file: as little as can be run or read by a neighbour. Owns the file that it is executed from,
//! which nothing can change.
//!
//! The init process of a pid namespace reaps what its containers leave (the kernel does, since
//! SIGCHLD is ignored) and otherwise waits. It drops its rights before it becomes this program;
//! here it gives up its descriptors and every system call but those for waiting.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::fs::{Mode, SealFlags, fchmod, fcntl_add_seals};

use super::sys;

/// `MFD_EXEC` of linux/memfd.h (6.3): a node can refuse files in memory that do not ask for it.
const MFD_EXEC: u32 = 0x10;
/// Where the program is in memory.
const ADDRESS: u64 = 0x40_0000;
const HEADERS: usize = 64 + 2 * 56;

/// Makes the sealed file. `None` on a processor that there is no program for.
pub(super) fn file() -> io::Result<Option<OwnedFd>> {
    let Some(image) = image() else {
        return Ok(None);
    };
    let create = |flags| memfd_create(c"embedshim-pod", flags);
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match create(flags | MFdFlags::from_bits_retain(MFD_EXEC)) {
        Err(Errno::EINVAL) => create(flags)?,
        created => created?,
    };
    let mut file = File::from(fd);
    file.write_all(&image)?;
    // What its own user cannot read, the kernel shows and gives to root alone.
    fchmod(&file, Mode::from_raw_mode(0o111))?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&file, seals)?;
    Ok(Some(file.into()))
}

/// Of elf.h.
const EXECUTABLE: u16 = 2;
const LOAD: u32 = 1;
const STACK: u32 = 0x6474_e551;
const READ: u32 = 4;
const WRITE: u32 = 2;
const EXECUTE: u32 = 1;
/// Pages of x86-64 and arm64 are no larger.
const ALIGNMENT: u64 = 0x1_0000;

/// A static ELF executable of one segment, which holds its own headers, too.
fn image() -> Option<Vec<u8>> {
    let (machine, code) = sys::code()?;
    let size = u64::try_from(HEADERS + code.len()).ok()?;
    let entry = ADDRESS + u64::try_from(HEADERS).ok()?;
    let mut image = Image(b"\x7fELF\x02\x01\x01".to_vec());
    image.0.resize(16, 0);
    image.halves([EXECUTABLE, machine]);
    image.words([1]);
    image.longs([entry, 64, 0]);
    image.words([0]);
    // Sizes of the headers, two of segments, none of sections.
    image.halves([64, 56, 2, 64, 0, 0]);
    image.words([LOAD, READ | EXECUTE]);
    image.longs([0, ADDRESS, ADDRESS, size, size, ALIGNMENT]);
    image.words([STACK, READ | WRITE]);
    image.longs([0, 0, 0, 0, 0, 16]);
    image.0.extend(code);
    Some(image.0)
}

/// The bytes of a file in the processor's order, which is little endian on all that have a program.
struct Image(Vec<u8>);

impl Image {
    fn halves<const N: usize>(&mut self, values: [u16; N]) {
        self.0.extend(values.map(u16::to_le_bytes).as_flattened());
    }

    fn words<const N: usize>(&mut self, values: [u32; N]) {
        self.0.extend(values.map(u32::to_le_bytes).as_flattened());
    }

    fn longs<const N: usize>(&mut self, values: [u64; N]) {
        self.0.extend(values.map(u64::to_le_bytes).as_flattened());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_small_and_its_headers_are_as_long_as_said() {
        let (_, code) = sys::code().unwrap();
        let image = image().unwrap();
        assert_eq!(image.len(), HEADERS + code.len());
        assert!(image.len() < 1024, "{}", image.len());
    }

    #[test]
    fn nothing_changes_the_program() {
        let file = file().unwrap().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let open = File::options().write(true).open(path);
        let written = open.and_then(|mut file| file.write_all(b"x"));
        assert!(written.is_err());
    }
}
