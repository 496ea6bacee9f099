//! Damaged journals: whatever byte of one is wrong, each request gets an answer, its own or
//! `DATA_LOSS`.

use std::collections::BTreeMap;

use super::*;

/// Longer than anything here takes; not a limit that a right answer ever comes near.
const LIMIT: Duration = Duration::from_secs(5);

/// How the text of an error begins when the connection was closed.
const CLOSED: &str = "closed: ";

/// What may be answered on a stream, beside `DATA_LOSS`.
type Due = BTreeMap<u32, (Code, Vec<u8>)>;

/// What a daemon has left of connection 4.
struct Left {
    /// Its journal.
    bytes: Vec<u8>,
    /// What is in the socket.
    unread: Vec<u8>,
    due: Due,
}

fn request(stream: u32, method: &str) -> Vec<u8> {
    let request = Request {
        method: method.into(),
        payload: method.into(),
        ..Request::default()
    };
    frame::request(stream, &request).unwrap()
}

fn ok(text: &str) -> (Code, Vec<u8>) {
    (Code::OK, text.into())
}

fn note(talk: impl FnOnce(&mut Journal)) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    let mut journal = journals.begin(4);
    journal.identity(&Identity {
        namespace: Some("k8s.io".parse().unwrap()),
        creation: None,
    });
    talk(&mut journal);
    std::fs::read(directory.path().join("connections/4")).unwrap()
}

/// One entry of each kind, and a frame that is half here.
fn of_every_kind() -> Left {
    let frame = request(9, "parts");
    let bytes = note(|journal| {
        journal.request(1, &request(1, "wait"));
        journal.request(3, &request(3, "answered"));
        journal.request(5, &request(5, "gone"));
        journal.answered(3);
        journal.outcome(5, b"code 9");
        journal.request(7, &request(7, "refused"));
        let refusal = ttrpc::get_status(Code::INVALID_ARGUMENT, "no");
        journal.refused(7, &frame::response(7, Err(refusal)));
        for (from, to) in [(0, 4), (4, 12)] {
            journal.part(&frame[..from], &frame[from..to]);
            journal.part_consumed();
        }
    });
    let unread = [
        frame[12..].to_vec(),
        request(11, "echo"),
        request(13, "where"),
    ];
    let due = [
        (1, ok("wait")),
        (5, ok("code 9")),
        (7, (Code::INVALID_ARGUMENT, vec![])),
        (9, ok("parts")),
        (11, ok("echo")),
        (13, ok("k8s.io")),
    ];
    Left {
        bytes,
        unread: unread.concat(),
        due: due.into(),
    }
}

/// The last request is noted and not consumed.
fn with_a_request_that_may_be_consumed() -> Left {
    let bytes = note(|journal| {
        journal.request(1, &request(1, "wait"));
        journal.request(3, &request(3, "echo"));
    });
    let unread = [request(3, "echo"), request(5, "where")];
    let due = [(1, ok("wait")), (3, ok("echo")), (5, ok("k8s.io"))];
    Left {
        bytes,
        unread: unread.concat(),
        due: due.into(),
    }
}

/// The end of an answer is still to be sent.
fn with_the_rest_of_an_answer() -> Left {
    let answer = frame::response(1, Ok(b"long".to_vec()));
    let bytes = note(|journal| {
        journal.request(1, &request(1, "long"));
        journal.request(3, &request(3, "wait"));
        journal.rest(&answer);
    });
    let due = [(1, ok("long")), (3, ok("wait")), (5, ok("echo"))];
    Left {
        bytes,
        unread: request(5, "echo"),
        due: due.into(),
    }
}

/// Every answer that a daemon gives which finds this.
fn answers(left: &Left, journal: &[u8]) -> Result<Due, String> {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let path = directory.path().join("connections");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("4"), journal).unwrap();
    io::Write::write_all(&mut &ours, &left.unread).unwrap();
    store
        .add(&FdName::Connection(4), &[theirs.as_fd()])
        .unwrap();
    drop(theirs);
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        let mut answered = Due::new();
        while !left.due.keys().all(|stream| answered.contains_key(stream)) {
            match tokio::time::timeout(LIMIT, answer(&mut client)).await {
                Ok(Ok((stream, response))) => {
                    let got = (response.status().code(), response.payload);
                    answered.insert(stream, got);
                }
                Ok(Err(error)) => return Err(format!("{CLOSED}{error}; answered: {answered:?}")),
                Err(_) => return Err(format!("no more answers; answered: {answered:?}")),
            }
        }
        Ok(answered)
    })
}

/// How many answers are lost, if every one is right or says that it is.
fn lost(left: &Left, journal: &[u8]) -> Result<usize, String> {
    let answered = answers(left, journal)?;
    let mut lost = 0;
    for (stream, due) in &left.due {
        match answered.get(stream) {
            Some(got) if got == due => {}
            Some((Code::DATA_LOSS, _)) => lost += 1,
            got => return Err(format!("stream {stream}: {got:?}, due: {due:?}")),
        }
    }
    Ok(lost)
}

fn shapes() -> [(&'static str, Left); 3] {
    [
        ("of every kind", of_every_kind()),
        ("maybe consumed", with_a_request_that_may_be_consumed()),
        ("rest", with_the_rest_of_an_answer()),
    ]
}

#[test]
fn whatever_byte_of_a_journal_is_wrong_every_request_is_answered() {
    for (name, left) in shapes() {
        assert_eq!(lost(&left, &left.bytes), Ok(0), "{name}: a sound one");
        for at in 0..left.bytes.len() {
            for mask in [0x01, 0xff] {
                let mut bytes = left.bytes.clone();
                bytes[at] ^= mask;
                let lost = lost(&left, &bytes);
                assert!(
                    matches!(lost, Ok(0 | 1)),
                    "{name}: byte {at} of {}, mask {mask:#x}: {lost:?}",
                    left.bytes.len()
                );
            }
        }
    }
}

/// Much more is wrong than a byte. A connection is closed only if nothing tells where its next
/// frame begins.
#[test]
fn whatever_range_of_a_journal_is_overwritten_no_request_hangs() {
    for (name, left) in shapes() {
        for at in (0..left.bytes.len()).step_by(3) {
            for length in [40, 90, usize::MAX] {
                let mut bytes = left.bytes.clone();
                let end = at.saturating_add(length).min(bytes.len());
                bytes[at..end].fill(0xa5);
                let lost = lost(&left, &bytes);
                let is_closed =
                    |text: &String| name != "maybe consumed" && text.starts_with(CLOSED);
                assert!(
                    lost.as_ref().map_or_else(is_closed, |_| true),
                    "{name}: {at} to {end} of {}: {lost:?}",
                    left.bytes.len()
                );
            }
        }
    }
}

#[test]
fn an_entry_of_a_newer_version_costs_its_request_its_answer() {
    let left = with_a_request_that_may_be_consumed();
    let first = request(1, "wait");
    let mut newer = vec![200, 1, 0, 0, 0];
    newer.extend(u32::try_from(first.len()).unwrap().to_le_bytes());
    newer.extend(crc32fast::hash(&first).to_le_bytes());
    newer.extend(crc32fast::hash(&newer).to_le_bytes());
    let newer = [newer.repeat(2), first].concat();
    let mut journal = left.bytes.clone();
    journal.splice(384..384 + newer.len(), newer);
    let answered = answers(&left, &journal).unwrap();
    assert_eq!(answered[&1].0, Code::DATA_LOSS);
    assert_eq!(
        (&answered[&3], &answered[&5]),
        (&left.due[&3], &left.due[&5])
    );
}

#[test]
fn a_journal_of_the_first_format_is_read_and_converted() {
    let entry = |kind: u8, stream: u8, payload: &[u8]| {
        let mut bytes = vec![kind, stream, 0, 0, 0];
        let checksum = crc32fast::hash(&[bytes.as_slice(), payload].concat());
        bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        bytes.extend(checksum.to_le_bytes());
        [&bytes, payload].concat()
    };
    let mut header = b"embconn1\x06k8s.io".to_vec();
    header.resize(128, 0);
    let frame = request(7, "parts");
    let journal = [
        header,
        entry(1, 1, &request(1, "wait")),
        entry(1, 3, &request(3, "answered")),
        entry(2, 3, &[]),
        entry(1, 5, &request(5, "gone")),
        entry(8, 5, b"code 9"),
        entry(3, 0, &frame[..12]),
        entry(4, 0, &[]),
    ];
    let due = [
        (1, ok("wait")),
        (5, ok("code 9")),
        (7, ok("parts")),
        (9, ok("k8s.io")),
    ];
    let left = Left {
        bytes: journal.concat(),
        unread: [&frame[12..], &request(9, "where")].concat(),
        due: due.into(),
    };
    assert_eq!(lost(&left, &left.bytes), Ok(0));
}
