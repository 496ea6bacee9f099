//! Daemons that are killed, one after the other, under one client.

use super::*;

#[test]
fn a_request_that_was_read_is_answered_by_the_next_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    generation(&store, directory.path(), Some(theirs), async || {
        let mut client = client(&ours);
        send(&mut client, 1, "wait", 60_000_000_000).await;
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
        send(&mut client, 5, "kill", 0).await;
        // The header, and entries for three requests and one answer.
        noted(directory.path(), 384 + 190).await;
    });
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        send(&mut client, 7, "echo", 0).await;
        let mut streams = Vec::new();
        for _ in 0..3 {
            let (stream, response) = answer(&mut client).await.unwrap();
            assert_eq!(response.status().code(), Code::OK);
            streams.push(stream);
        }
        streams.sort_unstable();
        assert_eq!(streams, [1, 5, 7]);
    });
    // Everything is answered, so nothing is answered twice.
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        send(&mut client, 9, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 9);
    });
}

/// Launchers ask so, twice for each container; containerd's connection may be silent for long.
#[test]
fn a_silent_connection_is_stored_and_one_that_was_closed_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    drop(ours);
    generation(&store, directory.path(), Some(theirs), async || ());
    assert!(store.connections().is_empty());
    let (_ours, theirs) = Blocking::pair().unwrap();
    generation(&store, directory.path(), Some(theirs), async || ());
    assert_eq!(store.connections().len(), 1);
}

/// The frame is longer than what a socket holds, and its pieces end anywhere.
#[test]
fn a_frame_in_pieces_is_put_together_by_several_daemons() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let request = Request {
        method: "echo".into(),
        payload: (0..300_000_u32).flat_map(u32::to_le_bytes).collect(),
        ..Request::default()
    };
    let frame = frame::request(1, &request).unwrap();
    let mut theirs = Some(theirs);
    let mut sent = 0;
    for end in [3, 10, 11, 70_000, 500_000, 1_000_000] {
        generation(&store, directory.path(), theirs.take(), async || {
            client(&ours).write_all(&frame[sent..end]).await.unwrap();
            let least = u64::try_from(end).unwrap() + 384;
            noted(directory.path(), least).await;
        });
        sent = end;
    }
    let answered = generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        client.write_all(&frame[sent..]).await.unwrap();
        answer(&mut client).await.unwrap()
    });
    assert_eq!(answered.0, 1);
    assert_eq!(answered.1.payload, request.payload);
}

/// Bytes that were peeked and noted, but not consumed, are there twice: in the journal and in the
/// socket.
#[test]
fn what_was_noted_and_not_consumed_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    let request = Request {
        method: "kill".into(),
        ..Request::default()
    };
    let bytes = frame::request(1, &request).unwrap();
    journals.begin(4).request(1, &bytes);
    // It was noted when it was there as a whole, and is not consumed.
    io::Write::write_all(&mut &ours, &bytes).unwrap();
    store
        .add(&FdName::Connection(4), &[theirs.as_fd()])
        .unwrap();
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        assert_eq!(answer(&mut client).await.unwrap().0, 1);
        send(&mut client, 3, "echo", 0).await;
        // Nothing in between: the first call was not made again.
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
}

/// A daemon is killed while its client has read a part of a long answer, again and again.
#[test]
fn an_answer_that_is_half_sent_arrives_once_and_whole() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut theirs = Some(theirs);
    let mut received = Vec::new();
    let whole = frame::response(1, Ok((0..700_000_u32).flat_map(u32::to_le_bytes).collect()));
    for part in [0, 1, 9, 100_000, 700_000, 1_500_000] {
        generation(&store, directory.path(), theirs.take(), async || {
            let mut client = client(&ours);
            if received.is_empty() && part == 0 {
                send(&mut client, 1, "numbers", 0).await;
            }
            let mut bytes = vec![0; part];
            client.read_exact(&mut bytes).await.unwrap();
            received.extend(bytes);
            // As much as the socket takes.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        });
    }
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        let mut bytes = vec![0; whole.len() - received.len()];
        client.read_exact(&mut bytes).await.unwrap();
        received.extend(bytes);
        assert!(received == whole, "other bytes");
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
    let is_answer = |(name, _): &(FdName, OwnedFd)| matches!(name, FdName::Answer(_));
    assert!(
        !store.0.lock().unwrap().iter().any(is_answer),
        "it is still stored"
    );
}

/// The kernel has taken a part of an answer, and the daemon has died before it could note anything.
#[test]
fn what_the_kernel_took_of_an_answer_is_not_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    let request = Request {
        method: "numbers".into(),
        ..Request::default()
    };
    let bytes = frame::request(1, &request).unwrap();
    journals.begin(4).request(1, &bytes);
    let payload: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let frame = frame::response(1, Ok(payload.clone()));
    let answers = AnswerStore {
        store: Arc::<Store>::clone(&store),
        connection: 4,
    };
    drop(answers.store(&frame).unwrap());
    store
        .add(&FdName::Connection(4), &[theirs.as_fd()])
        .unwrap();
    let (_, _, stored) = store.connections().remove(0);
    let sent = rustix::fs::sendfile(&theirs, stored.unwrap(), None, 50_000).unwrap();
    assert_eq!(sent, 50_000);
    generation(&store, directory.path(), None, async || {
        let mut client = client(&ours);
        let (stream, response) = answer(&mut client).await.unwrap();
        assert!(stream == 1 && response.payload == payload, "other bytes");
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
}

#[test]
fn a_connection_that_its_client_closed_leaves_neither_descriptor_nor_journal() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::<Store>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    generation(&store, directory.path(), Some(theirs), async || {
        drop(ours);
        for _ in 0..500 {
            if store.connections().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it is still stored");
    });
    let journals = std::fs::read_dir(directory.path().join("connections")).unwrap();
    assert_eq!(journals.count(), 0);
}
