//! A server whose handler misbehaves.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::*;

/// Does what the method's name says.
#[derive(Default)]
struct Misbehaving {
    abandoned: Arc<AtomicUsize>,
    noticed: Arc<Notify>,
}

/// Counts futures that were dropped before their end.
struct Guard(Arc<AtomicUsize>, Arc<Notify>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        self.1.notify_one();
    }
}

#[async_trait]
impl Handler for Misbehaving {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        match call.method.as_str() {
            "panic" => panic!("as asked"),
            "hang" => {
                let _guard = Guard(Arc::clone(&self.abandoned), Arc::clone(&self.noticed));
                std::future::pending().await
            }
            "huge" => Ok(vec![0; 5 << 20]),
            _ => Ok(call.payload),
        }
    }
}

fn serve(handler: Misbehaving) -> UnixStream {
    let (ours, theirs) = Blocking::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    Server::new(handler)
        .admit(None, ours.into(), Ok(()))
        .unwrap();
    UnixStream::from_std(theirs).unwrap()
}

#[tokio::test]
async fn a_panic_is_one_internal_error_and_the_connection_goes_on() {
    let mut client = serve(Misbehaving::default());
    send(&mut client, 1, "panic", 0).await;
    let (stream, response) = answer(&mut client).await.unwrap();
    assert_eq!((stream, response.status().code()), (1, Code::INTERNAL));
    send(&mut client, 3, "echo", 0).await;
    let (stream, response) = answer(&mut client).await.unwrap();
    assert_eq!(
        (stream, response.payload.as_slice()),
        (3, b"echo".as_slice())
    );
}

#[tokio::test]
async fn a_deadline_is_kept_and_other_calls_do_not_wait() {
    let mut client = serve(Misbehaving::default());
    send(&mut client, 1, "hang", 0).await;
    send(&mut client, 3, "hang", 20_000_000).await;
    send(&mut client, 5, "huge", 0).await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        let (stream, response) = answer(&mut client).await.unwrap();
        answers.push((stream, response.status().code()));
    }
    answers.sort_unstable_by_key(|(stream, _)| *stream);
    assert_eq!(
        answers,
        [(3, Code::DEADLINE_EXCEEDED), (5, Code::RESOURCE_EXHAUSTED)]
    );
}

#[tokio::test]
async fn a_client_that_closes_its_connection_ends_its_calls() {
    let handler = Misbehaving::default();
    let (abandoned, noticed) = (Arc::clone(&handler.abandoned), Arc::clone(&handler.noticed));
    let mut client = serve(handler);
    send(&mut client, 1, "hang", 0).await;
    send(&mut client, 3, "echo", 0).await;
    answer(&mut client).await.unwrap();
    drop(client);
    tokio::time::timeout(Duration::from_secs(10), noticed.notified())
        .await
        .unwrap();
    assert_eq!(abandoned.load(Ordering::SeqCst), 1);
}
