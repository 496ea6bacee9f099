//! What every user of a log relies on, whatever becomes of its file. [`log_properties`] makes the
//! tests for one user; those of the framings and of the file are here.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestCaseResult;

use super::log::LONGEST;
use super::*;

/// A user of a log: how it writes one, and how its successor goes on with it.
pub(crate) trait User {
    /// The bytes of its header, and those before a payload.
    const HEADER: usize;
    const PREFIX: usize;
    /// Where its header names the format.
    const MAGIC_AT: &'static [usize];

    /// Goes on with what is in the directory, and appends these payloads. Returns the log's path.
    fn append(directory: &Path, payloads: &[Vec<u8>]) -> PathBuf;
    /// The payloads that a successor finds, in their order.
    fn read(directory: &Path) -> Vec<Vec<u8>>;
}

/// Payloads of a log.
pub(crate) fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 0..8)
}

/// The tests of one user.
macro_rules! log_properties {
    ($user:ty) => {
        mod log_properties {
            use proptest::prelude::*;
            use proptest::sample::Index;

            use crate::appendlog::tests as properties;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(100))]

                #[test]
                fn any_prefix_has_the_entries_that_are_whole_in_it_and_is_gone_on_with(
                    payloads in properties::payloads(), cut: Index,
                ) {
                    properties::prefix::<$user>(&payloads, cut)?;
                }

                #[test]
                fn any_flipped_byte_costs_at_most_its_entry_or_sets_the_file_aside(
                    payloads in properties::payloads(), place: Index, flip in 1..=255u8,
                ) {
                    properties::flip::<$user>(&payloads, place, flip)?;
                }

                #[test]
                fn a_log_of_any_version_is_read_or_set_aside(
                    payloads in properties::payloads(), magic: [u8; 8],
                ) {
                    properties::version::<$user>(&payloads, magic)?;
                }

                #[test]
                fn garbage_is_read_without_harm_and_gone_on_with(
                    bytes in prop::collection::vec(any::<u8>(), 0..600), has_header: bool,
                ) {
                    properties::garbage::<$user>(&bytes, has_header)?;
                }
            }
        }
    };
}
pub(crate) use log_properties;

/// A log with these payloads in a directory of its own.
struct Case {
    directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Case {
    fn new<U: User>(payloads: &[Vec<u8>]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // One more than is asked for, so that there is a file.
        let all = [payloads, &[vec![]]].concat();
        let path = U::append(directory.path(), &all);
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - U::PREFIX);
        Self {
            directory,
            path,
            bytes,
        }
    }

    fn read<U: User>(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        fs::write(&self.path, bytes).unwrap();
        U::read(self.directory.path())
    }

    fn is_set_aside(&self, bytes: &[u8]) -> bool {
        fs::read(self.path.with_extension("damaged")).is_ok_and(|aside| aside == bytes)
    }

    /// What a successor finds after one that went on with these bytes.
    fn go_on<U: User>(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        fs::write(&self.path, bytes).unwrap();
        U::append(self.directory.path(), &[b"n".to_vec()]);
        U::read(self.directory.path())
    }
}

/// Where the entries of these payloads are in a file.
fn entries<U: User>(payloads: &[Vec<u8>]) -> Vec<Range<usize>> {
    let mut end = U::HEADER;
    let place = |payload: &Vec<u8>| {
        let start = end;
        end += U::PREFIX + payload.len();
        start..end
    };
    payloads.iter().map(place).collect()
}

pub(crate) fn prefix<U: User>(payloads: &[Vec<u8>], cut: Index) -> TestCaseResult {
    let case = Case::new::<U>(payloads);
    let length = cut.index(case.bytes.len() + 1);
    let places = entries::<U>(payloads);
    let whole = places.iter().filter(|place| place.end <= length).count();
    let bytes = &case.bytes[..length];
    prop_assert_eq!(case.read::<U>(bytes), &payloads[..whole]);
    let expected = [&payloads[..whole], &[b"n".to_vec()]].concat();
    prop_assert_eq!(case.go_on::<U>(bytes), expected);
    Ok(())
}

pub(crate) fn flip<U: User>(payloads: &[Vec<u8>], place: Index, flip: u8) -> TestCaseResult {
    let case = Case::new::<U>(payloads);
    let mut bytes = case.bytes.clone();
    let at = place.index(bytes.len());
    bytes[at] ^= flip;
    let read = case.read::<U>(&bytes);
    let hit = entries::<U>(payloads)
        .iter()
        .position(|place| place.contains(&at));
    let mut others = payloads.to_vec();
    if let Some(hit) = hit {
        others.remove(hit);
    }
    let is_refused = read.is_empty() && case.is_set_aside(&bytes);
    prop_assert!(
        read == payloads || read == others || (hit.is_none() && is_refused),
        "byte {}: {:?}",
        at,
        read
    );
    let after = case.go_on::<U>(&bytes);
    prop_assert_eq!(after.last(), Some(&b"n".to_vec()));
    Ok(())
}

pub(crate) fn version<U: User>(payloads: &[Vec<u8>], magic: [u8; 8]) -> TestCaseResult {
    let case = Case::new::<U>(payloads);
    let mut bytes = case.bytes.clone();
    for at in U::MAGIC_AT {
        bytes[*at..at + 8].copy_from_slice(&magic);
    }
    let read = case.read::<U>(&bytes);
    prop_assert!(read == payloads || case.is_set_aside(&bytes), "{:?}", read);
    Ok(())
}

pub(crate) fn garbage<U: User>(garbage: &[u8], has_header: bool) -> TestCaseResult {
    let case = Case::new::<U>(&[]);
    let header = &case.bytes[..if has_header { U::HEADER } else { 0 }];
    let read = case.go_on::<U>(&[header, garbage].concat());
    prop_assert_eq!(read.last(), Some(&b"n".to_vec()));
    Ok(())
}

fn double_head(payload: &[u8]) -> Vec<u8> {
    let tag = Tag { kind: 1, number: 7 };
    DoubleHead::entry(tag, payload)
}

/// The pieces of these bytes: entries, and gaps as none.
fn pieces<F: Framing>(bytes: &[u8]) -> Vec<(Range<u64>, Option<Vec<u8>>)> {
    Pieces::<F>::new(bytes, 0)
        .map(|piece| match piece {
            Piece::Gap(place) => (place, None),
            Piece::Entry {
                payload,
                is_sound,
                place,
                ..
            } => (place, is_sound.then(|| payload.to_vec())),
        })
        .collect()
}

fn overwritten<F: Framing>(
    entry: impl Fn(&[u8]) -> Vec<u8>,
    payloads: &[Vec<u8>],
    (from, to): (Index, Index),
) -> TestCaseResult {
    let mut bytes: Vec<u8> = payloads.iter().flat_map(|payload| entry(payload)).collect();
    let (from, to) = (from.index(bytes.len() + 1), to.index(bytes.len() + 1));
    let hit = from.min(to)..from.max(to);
    bytes[hit.clone()].fill(0xa5);
    let found: Vec<_> = pieces::<F>(&bytes).into_iter().collect();
    let mut end = 0;
    for (place, _) in &found {
        prop_assert!(place.start == end && place.end > end, "{:?}", found);
        end = place.end;
    }
    let mut start = 0;
    for payload in payloads {
        let place = start..start + F::PREFIX + payload.len();
        let is_hit = hit.start < place.end && place.start < hit.end;
        let wanted = (
            place.start as u64..place.end as u64,
            Some(payload.to_owned()),
        );
        prop_assert!(is_hit || found.contains(&wanted), "{:?}", found);
        start = place.end;
    }
    Ok(())
}

proptest! {
    #[test]
    fn whatever_range_is_overwritten_each_entry_outside_of_it_is_found(
        payloads in payloads(), range: (Index, Index),
    ) {
        overwritten::<DoubleHead>(double_head, &payloads, range)?;
        overwritten::<Marked>(Marked::entry, &payloads, range)?;
    }
}

#[test]
fn a_log_whose_directory_was_removed_is_recreated_with_all_entries() {
    let directory = tempfile::tempdir().unwrap();
    let logs = directory.path().join("logs");
    let path = logs.join("1");
    fs::create_dir(&logs).unwrap();
    let mut on_disk = Log::create(&path, b"header").unwrap();
    on_disk.append(b"one").unwrap();
    fs::remove_dir_all(&logs).unwrap();
    on_disk.append(b"two").unwrap();
    on_disk.recreate().unwrap_err();
    Log::create(&path, b"header").unwrap_err();
    let mut in_memory = Log::in_memory(&logs.join("2"), b"header").unwrap();
    in_memory.append(b"one").unwrap();
    fs::create_dir(&logs).unwrap();
    on_disk.recreate().unwrap();
    on_disk.append(b"six").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"headeronetwosix");
    assert!(in_memory.is_in_memory());
    in_memory.append(b"two").unwrap();
    assert_eq!(fs::read(logs.join("2")).unwrap(), b"headeronetwo");
    assert!(!in_memory.is_in_memory());
    let names = fs::read_dir(&logs).unwrap();
    assert_eq!(names.count(), 2, "a draft stays");
}

#[test]
fn a_log_in_its_place_is_not_rewritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1");
    let mut log = Log::create(&path, b"header").unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    log.recreate().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), before);
}

#[test]
fn a_log_that_cannot_be_compacted_goes_on_and_is_not_rewritten_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("logs/1");
    fs::create_dir(path.parent().unwrap()).unwrap();
    let mut log = Log::create(&path, b"header").unwrap();
    assert!(!log.is_worth_compacting(0));
    log.append(&vec![0; 70_000]).unwrap();
    let needed = log.append(b"needed").unwrap();
    assert!(log.is_worth_compacting(6));
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    log.compact(b"HEADER", std::slice::from_ref(&needed))
        .unwrap_err();
    assert!(!log.is_worth_compacting(6), "it is tried each time");
    assert_eq!(log.end(), needed.end);
    log.append(&vec![0; 80_000]).unwrap();
    assert!(log.is_worth_compacting(6), "it is never tried again");
    fs::create_dir(path.parent().unwrap()).unwrap();
    log.compact(b"HEADER", &[needed]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"HEADERneeded");
}

#[test]
fn no_log_grows_beyond_its_bound_and_a_longer_one_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1");
    let mut log = Log::create(&path, b"header").unwrap();
    let end = log.append(b"entry").unwrap().end;
    let longest = usize::try_from(LONGEST).unwrap();
    log.append(&vec![0; longest]).unwrap_err();
    assert_eq!((log.end(), fs::metadata(&path).unwrap().len()), (end, end));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(LONGEST + 1)
        .unwrap();
    Found::read(&path).unwrap_err();
}
