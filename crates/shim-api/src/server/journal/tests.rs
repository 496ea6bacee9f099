//! What a journal says after its daemon.

use embedshim_core::task::BundleId;

use super::*;
use crate::appendlog::tests::{User, log_properties};
use crate::appendlog::{DoubleHead, Framing};
use crate::server::handler::Creation;

fn journals() -> (tempfile::TempDir, Journals) {
    let directory = tempfile::tempdir().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    (directory, journals)
}

fn path(journal: &Journal) -> &Path {
    journal.log.as_ref().unwrap().path()
}

fn end(journal: &Journal) -> u64 {
    journal.log.as_ref().unwrap().end()
}

/// A journal as a log: each payload is a request.
struct Requests;

impl User for Requests {
    const HEADER: usize = 384;
    const PREFIX: usize = DoubleHead::PREFIX + 1;
    const MAGIC_AT: &'static [usize] = &[0, 192];

    fn append(directory: &Path, payloads: &[Vec<u8>]) -> PathBuf {
        let journals = Journals::open(directory.into()).unwrap();
        let (mut journal, recovered) = journals.resume(1);
        let last = recovered.pending.keys().chain(&recovered.unreadable).max();
        let mut stream = last.copied().unwrap_or(1);
        for payload in payloads {
            stream += 2;
            // One without a payload is the end of parts.
            journal.request(stream, &[b"r", payload.as_slice()].concat());
        }
        path(&journal).into()
    }

    fn read(directory: &Path) -> Vec<Vec<u8>> {
        let journals = Journals::open(directory.into()).unwrap();
        let pending = journals.resume(1).1.pending.into_values();
        pending.map(|request| request[1..].to_vec()).collect()
    }
}

log_properties!(super::Requests);

#[test]
fn a_connection_that_comes_while_the_directory_is_gone_is_noted_when_it_is_back() {
    let (directory, journals) = journals();
    fs::remove_dir_all(directory.path()).unwrap();
    let mut journal = journals.begin(7);
    journal.request(1, b"asked meanwhile");
    journals.create_directory().unwrap();
    journal.recreate();
    journal.request(3, b"asked afterwards");
    drop(journal);
    let (_, recovered) = journals.resume(7);
    let streams: Vec<u32> = recovered.pending.keys().copied().collect();
    assert_eq!(streams, [1, 3]);
}

#[test]
fn what_is_not_answered_comes_back() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(7);
    let identity = Identity {
        namespace: Some("k8s.io".parse().unwrap()),
        creation: Some(Creation {
            id: "x".repeat(76).parse().unwrap(),
            bundle: BundleId {
                device: 7,
                inode: u64::MAX,
            },
        }),
    };
    journal.identity(&identity);
    journal.request(1, b"one");
    journal.request(3, b"three");
    journal.answered(1);
    journal.request(5, b"five");
    drop(journal);
    let (mut journal, recovered) = journals.resume(7);
    assert_eq!(recovered.identity, identity);
    let pending: Vec<_> = recovered.pending.into_iter().collect();
    assert_eq!(pending, [(3, b"three".to_vec()), (5, b"five".to_vec())]);
    assert_eq!(recovered.maybe_consumed, Some(5));
    journal.answered(3);
    journal.answered(5);
    assert_eq!(fs::metadata(path(&journal)).unwrap().len(), HEADER);
    let (_, recovered) = journals.resume(7);
    assert!(recovered.pending.is_empty() && recovered.identity.namespace.is_some());
}

#[test]
fn a_refusal_comes_back_and_its_request_does_not() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(7);
    journal.request(1, b"one");
    journal.request(3, b"three");
    journal.refused(3, b"no");
    let (mut journal, recovered) = journals.resume(7);
    assert_eq!(recovered.rest, b"no");
    assert_eq!(recovered.pending.into_keys().collect::<Vec<_>>(), [1]);
    journal.rest_sent();
    let (mut journal, recovered) = journals.resume(7);
    assert!(recovered.rest.is_empty() && recovered.pending.len() == 1);
    journal.refused(1, b"no");
    journal.rest_sent();
    journal.answered(1);
    assert_eq!(end(&journal), HEADER, "everything is answered");
}

#[test]
fn what_a_deletion_was_about_to_answer_comes_back() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(7);
    journal.request(1, b"wait");
    journal.request(3, b"delete");
    journal.outcome(3, b"code 9");
    let (mut journal, recovered) = journals.resume(7);
    assert_eq!(recovered.outcomes.get(&3), Some(&Some(b"code 9".to_vec())));
    journal.answered(3);
    let (_, recovered) = journals.resume(7);
    assert!(recovered.outcomes.is_empty() && recovered.pending.contains_key(&1));
}

#[test]
fn a_long_journal_is_shortened_and_loses_nothing() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(1);
    journal.request(1, b"a Wait that never ends");
    for stream in (3..20_000).step_by(2) {
        journal.request(stream, &[b'x'; 100]);
        journal.answered(stream);
    }
    let end = end(&journal);
    assert!(end < 128 * 1024, "{end}");
    let (_, recovered) = journals.resume(1);
    let streams: Vec<u32> = recovered.pending.into_keys().collect();
    assert_eq!(streams, [1]);
}

#[test]
fn a_damaged_request_is_lost_alone_and_by_name() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(1);
    for stream in [1, 3, 5] {
        journal.request(stream, b"payload");
    }
    let path = path(&journal).to_owned();
    let middle = HEADER + 41 + 40;
    let mut bytes = fs::read(&path).unwrap();
    bytes[usize::try_from(middle).unwrap()] ^= 0xff;
    fs::write(&path, bytes).unwrap();
    let (_, recovered) = journals.resume(1);
    assert_eq!(recovered.unreadable, BTreeSet::from([3]));
    let streams: Vec<u32> = recovered.pending.into_keys().collect();
    assert_eq!(streams, [1, 5]);
}

/// The bytes that version 0.1.0 wrote for these notes: a successor of any version reads them.
const OF_0_1_0: &[u8] = include_bytes!("../../appendlog/fixtures/connection.embconn2");

#[test]
fn the_bytes_of_a_journal_are_those_of_version_0_1_0() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(7);
    journal.identity(&Identity {
        namespace: Some("k8s.io".parse().unwrap()),
        creation: Some(Creation {
            id: "c1".parse().unwrap(),
            bundle: BundleId {
                device: 7,
                inode: 9,
            },
        }),
    });
    journal.request(1, b"wait");
    journal.request(3, b"answered");
    journal.answered(3);
    journal.request(5, b"delete");
    journal.outcome(5, b"code 9");
    journal.lost(7);
    journal.request(9, b"refused");
    journal.refused(9, b"no");
    journal.rest_sent();
    journal.request(11, b"last");
    journal.rest(b"the end of an answer");
    let frame_header = [0, 0, 0, 20, 0, 0, 0, 13, 1, 0];
    journal.part(&[], &frame_header[..4]);
    journal.part_consumed();
    journal.part(&frame_header[..4], &frame_header[4..]);
    journal.part_consumed();
    journal.skipped(12);
    assert_eq!(fs::read(path(&journal)).unwrap(), OF_0_1_0);
}

#[test]
fn a_journal_of_version_0_1_0_is_read() {
    let (_directory, journals) = journals();
    fs::write(journals.path(7), OF_0_1_0).unwrap();
    let (journal, recovered) = journals.resume(7);
    let identity = recovered.identity;
    assert_eq!(identity.namespace.unwrap().as_str(), "k8s.io");
    let creation = identity.creation.unwrap();
    assert_eq!((creation.id.as_str(), creation.bundle.inode), ("c1", 9));
    let pending = [
        (1, b"wait".to_vec()),
        (5, b"delete".to_vec()),
        (11, b"last".to_vec()),
    ];
    assert_eq!(recovered.pending, pending.into());
    assert_eq!(recovered.outcomes, [(5, Some(b"code 9".to_vec()))].into());
    assert_eq!(recovered.unreadable, [7].into());
    assert_eq!(recovered.rest, b"the end of an answer");
    assert_eq!(recovered.partial.bytes, [0, 0, 0, 20, 0, 0, 0, 13, 1, 0]);
    assert_eq!(recovered.partial.skipped, 12);
    assert!(recovered.is_part_maybe_consumed && recovered.maybe_consumed.is_none());
    assert!(journal.is_mid_frame && journal.has_rest);
    assert_eq!(fs::read(path(&journal)).unwrap(), OF_0_1_0);
}

#[test]
fn any_prefix_of_a_journal_with_every_kind_of_entry_is_read_twice_alike() {
    let (_directory, journals) = journals();
    for length in 0..=OF_0_1_0.len() {
        fs::write(journals.path(1), &OF_0_1_0[..length]).unwrap();
        let (_, first) = journals.resume(1);
        let (_, again) = journals.resume(1);
        assert_eq!(
            (&again.pending, &again.rest, &again.partial),
            (&first.pending, &first.rest, &first.partial),
            "{length} bytes"
        );
        assert!(again.unreadable.len() <= 1 && again.unknown.is_none());
    }
}
