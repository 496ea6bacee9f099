//! [`Log`]: the open file of an append log. Owns where the next entry goes, the longest length, the
//! compaction, and that the file is at its path.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use embedshim_core::failpoint;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// No log is longer. A connection's largest request has 4 MiB; the unacknowledged events of one
/// containerd have 16 MiB, and as many bytes can be acknowledged and not compacted yet.
pub(super) const LONGEST: u64 = 64 << 20;
/// A log with fewer bytes that are not needed is not worth its compaction.
const COMPACT_FROM: u64 = 64 * 1024;
/// The extension of a file that is being written and takes a log's place when it is complete.
pub(super) const DRAFT: &str = "draft";

/// An open log.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    header_size: u64,
    /// Where the next entry goes.
    end: u64,
    /// The path could not be created, so the file is a memory file until it can.
    is_in_memory: bool,
    /// The last compaction failed: the next attempt is when so many bytes are not needed.
    compact_from: u64,
}

impl Log {
    /// Creates an empty log at `path`, in the place of whatever is there.
    pub(crate) fn create(path: &Path, header: &[u8]) -> io::Result<Self> {
        let file = create_file(path)?;
        file.write_all_at(header, 0)?;
        Ok(Self::new(path, file, header.len() as u64))
    }

    /// Creates an empty log in memory. It moves to `path` as soon as that can be created, so that
    /// it misses no entry of the time in which its directory was gone or full.
    pub(crate) fn in_memory(path: &Path, header: &[u8]) -> io::Result<Self> {
        let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC)?);
        file.write_all_at(header, 0)?;
        Ok(Self {
            is_in_memory: true,
            ..Self::new(path, file, header.len() as u64)
        })
    }

    /// Creates an empty log beside `path`, which [moves](Self::move_to) there when all is in it.
    pub(crate) fn draft(path: &Path, header: &[u8]) -> io::Result<Self> {
        Self::create(&path.with_extension(DRAFT), header)
    }

    /// A log that is at `path` and ends at `end`.
    pub(super) fn found(path: &Path, file: File, header_size: u64, end: u64) -> Self {
        Self {
            end,
            ..Self::new(path, file, header_size)
        }
    }

    fn new(path: &Path, file: File, header_size: u64) -> Self {
        Self {
            path: path.to_owned(),
            file,
            header_size,
            end: header_size,
            is_in_memory: false,
            compact_from: COMPACT_FROM,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the next entry goes, which is the length of the log.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Whether the entries end with this process.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    /// Appends entries, all or none of them, and returns their place.
    pub(crate) fn append(&mut self, entries: &[u8]) -> io::Result<Range<u64>> {
        if self.is_in_memory {
            // It stays in memory if this fails again, and its user has logged why.
            let _ = self.recreate();
        }
        failpoint::step("before entries are appended to a log");
        let end = self.end.saturating_add(entries.len() as u64);
        let written = if end > LONGEST {
            Err(io::ErrorKind::FileTooLarge.into())
        } else {
            self.file.write_all_at(entries, self.end)
        };
        if let Err(error) = written {
            let _ = self.file.set_len(self.end);
            return Err(error);
        }
        failpoint::step("after entries were appended to a log");
        Ok(std::mem::replace(&mut self.end, end)..end)
    }

    /// Overwrites bytes of the header.
    pub(crate) fn write_header(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    /// Reads the header as it is.
    pub(crate) fn header(&self) -> io::Result<Vec<u8>> {
        self.read(&(0..self.header_size))
    }

    fn read(&self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let length = range.end.saturating_sub(range.start);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Cuts off all entries.
    pub(crate) fn cut(&mut self) -> io::Result<()> {
        if self.end > self.header_size {
            self.file.set_len(self.header_size)?;
            self.end = self.header_size;
        }
        Ok(())
    }

    /// Whether the log is worth [compacting](Self::compact), if so many bytes of its entries are
    /// needed: more than that are not.
    pub(crate) fn is_worth_compacting(&self, needed: u64) -> bool {
        let entries = self.end.saturating_sub(self.header_size);
        entries.saturating_sub(needed) >= self.compact_from.max(needed)
    }

    /// Rewrites the log: this header, and the entries at these places, in their order. Returns
    /// their new places. On failure the log is as it was.
    pub(crate) fn compact(
        &mut self,
        header: &[u8],
        needed: &[Range<u64>],
    ) -> io::Result<Vec<Range<u64>>> {
        // If this fails, the next attempt is when twice as much has come together.
        let entries = self.end.saturating_sub(self.header_size);
        self.compact_from = entries.saturating_mul(2);
        let mut bytes = header.to_vec();
        let mut places = Vec::with_capacity(needed.len());
        for range in needed {
            let start = bytes.len() as u64;
            bytes.extend(self.read(range)?);
            places.push(start..bytes.len() as u64);
        }
        self.replace(&bytes)?;
        self.compact_from = COMPACT_FROM;
        Ok(places)
    }

    /// Creates the log at its path again if it is not there: its directory was removed, mounted
    /// over, or full when the log was created.
    pub(crate) fn recreate(&mut self) -> io::Result<()> {
        if self.is_at_its_path() {
            return Ok(());
        }
        let bytes = self.read(&(0..self.end))?;
        self.replace(&bytes)
    }

    /// Moves the log, in the place of whatever is there.
    pub(crate) fn move_to(&mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        path.clone_into(&mut self.path);
        Ok(())
    }

    fn is_at_its_path(&self) -> bool {
        let id = |file: &fs::Metadata| (file.dev(), file.ino());
        let own = self.file.metadata();
        let found = self.path.symlink_metadata();
        matches!((own, found), (Ok(own), Ok(found)) if id(&own) == id(&found))
    }

    /// Puts a file with these bytes at the log's path, in one step.
    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        let draft = self.path.with_extension(DRAFT);
        let file = create_file(&draft)?;
        let written = file.write_all_at(bytes, 0);
        if let Err(error) = written.and_then(|()| fs::rename(&draft, &self.path)) {
            let _ = fs::remove_file(&draft);
            return Err(error);
        }
        self.file = file;
        self.end = bytes.len() as u64;
        self.is_in_memory = false;
        Ok(())
    }

    /// Removes the file.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}
