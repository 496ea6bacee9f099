//! Bytes as a peer might send them: no panic, and every answer is a frame with a response in it.
#![no_main]

use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use libfuzzer_sys::fuzz_target;
use protobuf::Message;
use shim_api::frame::{HEADER, Header, Kind, MAX_PAYLOAD};
use shim_api::fuzzing::converse;
use shim_api::server::{Call, Handler};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use ttrpc::{Response, Status};

/// Answers with what it was asked.
struct Echo;

#[async_trait]
impl Handler for Echo {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        Ok(call.payload)
    }
}

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().unwrap());

fuzz_target!(|bytes: &[u8]| {
    let answers = RUNTIME.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut read, mut write) = theirs.into_split();
        let send = async {
            // It may hang up before it has read everything.
            let _ = write.write_all(bytes).await;
            let _ = write.shutdown().await;
        };
        let mut answers = Vec::new();
        tokio::join!(
            converse(ours, Arc::new(Echo)),
            send,
            read.read_to_end(&mut answers)
        )
        .2
        .unwrap();
        answers
    });
    let mut rest = answers.as_slice();
    while let Some((header, after)) = rest.split_first_chunk::<HEADER>() {
        let header = Header::decode(*header);
        assert!(header.kind == Kind::Response && header.length <= MAX_PAYLOAD);
        let (payload, after) = after.split_at(header.length as usize);
        assert!(
            Response::parse_from_bytes(payload)
                .unwrap()
                .status
                .is_some()
        );
        rest = after;
    }
    assert!(rest.is_empty());
});
