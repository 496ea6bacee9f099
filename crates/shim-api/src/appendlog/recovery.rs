//! [`Found`]: a log that a predecessor has left. Owns reading it, whatever state it is in, and
//! going on with it. Never decides what becomes of an entry, and never drops a byte unasked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::framing::{First, Framing};
use super::log::{DRAFT, LONGEST, Log};

/// The extension of a log that cannot be read and is left for people to look at.
const DAMAGED: &str = "damaged";

/// A log that a predecessor has left, in memory as a whole.
#[derive(Debug)]
pub(crate) struct Found {
    path: PathBuf,
    file: File,
    bytes: Vec<u8>,
}

impl Found {
    /// Reads the file at `path`, which is refused if it is longer than a log can be.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        if length > LONGEST {
            let text = format!("{length} bytes are more than a log can have");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut bytes = Vec::new();
        (&file).take(LONGEST).read_to_end(&mut bytes)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
        })
    }

    /// All bytes, the header among them.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Goes on with this log, whose header has `header_size` bytes. What is behind `end` is cut
    /// off.
    pub(crate) fn go_on(self, header_size: u64, end: u64) -> io::Result<Log> {
        self.file.set_len(end)?;
        Ok(Log::found(&self.path, self.file, header_size, end))
    }
}

/// The next piece of a log.
#[derive(Debug)]
pub(crate) enum Piece<'a, T> {
    /// An entry.
    Entry {
        /// What the entry says beside its payload.
        tag: T,
        /// The payload of the entry; if that is damaged, as it was read.
        payload: &'a [u8],
        /// Whether the payload has its checksum.
        is_sound: bool,
        /// Where the entry is, its prefix included.
        place: Range<u64>,
    },
    /// Bytes in which no entry can be made out.
    Gap(Range<u64>),
}

/// The pieces of a log, up to an entry whose writer was killed.
#[derive(Debug)]
pub(crate) struct Pieces<'a, F> {
    bytes: &'a [u8],
    at: usize,
    framing: PhantomData<F>,
}

impl<'a, F: Framing> Pieces<'a, F> {
    /// The pieces of `bytes` from this place on.
    pub(crate) fn new(bytes: &'a [u8], from: u64) -> Self {
        Self {
            bytes,
            at: usize::try_from(from).unwrap_or(usize::MAX),
            framing: PhantomData,
        }
    }

    fn advance(&mut self, length: usize) -> Range<u64> {
        let start = self.at as u64;
        self.at = self.at.saturating_add(length).min(self.bytes.len());
        start..self.at as u64
    }
}

impl<'a, F: Framing> Iterator for Pieces<'a, F> {
    type Item = Piece<'a, F::Tag>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.get(self.at..).filter(|rest| !rest.is_empty())?;
        Some(match F::first(rest) {
            First::Torn => return None,
            First::Damage => Piece::Gap(self.advance(gap::<F>(rest))),
            First::Entry {
                tag,
                payload,
                is_sound,
            } => Piece::Entry {
                tag,
                payload,
                is_sound,
                place: self.advance(F::PREFIX.saturating_add(payload.len())),
            },
        })
    }
}

/// How many bytes are before the next place where an entry can begin, the first byte being none.
fn gap<F: Framing>(bytes: &[u8]) -> usize {
    let mut places = bytes.windows(F::BEGINNING).skip(1);
    places
        .position(F::can_begin)
        .map_or(bytes.len(), |before| before.saturating_add(1))
}

/// Whether this name in a directory of logs can be one.
pub(crate) fn is_log(path: &Path) -> bool {
    let is = |extension: &str| path.extension().is_some_and(|own| own == extension);
    !is(DAMAGED) && !is(DRAFT)
}

/// Removes what is left of logs that were being written.
pub(crate) fn discard_drafts(directory: &Path) -> io::Result<()> {
    for found in fs::read_dir(directory)?.flatten() {
        let path = found.path();
        if path.extension().is_some_and(|extension| extension == DRAFT) {
            let _ = fs::remove_file(path);
        }
    }
    Ok(())
}

/// Renames a log that cannot be read, so that people can look at it and another takes its place.
pub(crate) fn set_aside(path: &Path) -> io::Result<()> {
    fs::rename(path, path.with_extension(DAMAGED))
}
