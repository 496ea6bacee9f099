//! What a journal says after its daemon.

use embedshim_core::task::BundleId;

use super::*;
use crate::server::Creation;

fn journals() -> (tempfile::TempDir, Journals) {
    let directory = tempfile::tempdir().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    (directory, journals)
}

#[test]
fn a_connection_that_comes_while_the_directory_is_gone_is_noted_when_it_is_back() {
    let (directory, journals) = journals();
    fs::remove_dir_all(directory.path()).unwrap();
    let mut journal = journals.begin(7);
    journal.request(1, b"asked meanwhile");
    journals.make().unwrap();
    journal.write_again();
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
    assert_eq!(recovered.doubtful, Some(5));
    journal.answered(3);
    journal.answered(5);
    assert_eq!(fs::metadata(&journal.path).unwrap().len(), HEADER);
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
    let (mut journal, owed) = journals.resume(7);
    assert_eq!(owed.rest, b"no");
    assert_eq!(owed.pending.into_keys().collect::<Vec<_>>(), [1]);
    journal.rest_sent();
    let (mut journal, owed) = journals.resume(7);
    assert!(owed.rest.is_empty() && owed.pending.len() == 1);
    journal.refused(1, b"no");
    journal.rest_sent();
    journal.answered(1);
    assert_eq!(journal.length, HEADER, "nothing is owed any more");
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
    journal.request(1, b"a Wait that takes for ever");
    for stream in (3..20_000).step_by(2) {
        journal.request(stream, &[b'x'; 100]);
        journal.answered(stream);
    }
    assert!(journal.length < 2 * COMPACT_FROM, "{}", journal.length);
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
    let path = journal.path.clone();
    let middle = HEADER + 41 + 40;
    let mut bytes = fs::read(&path).unwrap();
    bytes[usize::try_from(middle).unwrap()] ^= 0xff;
    fs::write(&path, bytes).unwrap();
    let (_, recovered) = journals.resume(1);
    assert_eq!(recovered.unreadable, BTreeSet::from([3]));
    let streams: Vec<u32> = recovered.pending.into_keys().collect();
    assert_eq!(streams, [1, 5]);
}

#[test]
fn any_piece_of_a_journal_can_be_read() {
    let (_directory, journals) = journals();
    let mut journal = journals.begin(1);
    journal.request(1, b"whole");
    journal.part(&[], b"half");
    journal.part_consumed();
    journal.rest(b"of an answer");
    let bytes = fs::read(&journal.path).unwrap();
    for length in 0..=bytes.len() {
        fs::write(&journal.path, &bytes[..length]).unwrap();
        let (after, recovered) = journals.resume(1);
        assert!(recovered.pending.len() <= 1);
        drop(after);
        let (_, again) = journals.resume(1);
        assert_eq!(again.pending, recovered.pending, "{length} bytes");
    }
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
    assert_eq!(fs::read(&journal.path).unwrap(), OF_0_1_0);
}
