//! The suite that every transport runs, on the in-process one. What arrived is told by a group that applies everything at
//! once: there is no wire that anybody else could look at.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use pillarbox_testkit::transport::{Case, Corner, Harness, Stored, assert_documented, exercise};
use pillarbox_transport::{Message, Transport, memory::Memory};

const NO_WIRE: &str =
    "it has no wire and no server; the engine itself checks messages, at enqueue and at the relay";
const NO_SERVER: &str = "it has no connection and no server that could be lost";
const NOT_STORED: &str = "it stores nothing: what a group has not applied is told unavailable, and the relay sends it again";

struct InMemory;

#[async_trait(?Send)]
impl Harness for InMemory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn exceptions(&self) -> &'static [(Case, &'static str)] {
        &[
            (Case::Blame, NO_WIRE),
            (Case::Redelivery, NOT_STORED),
            (Case::HandOver, NOT_STORED),
            (Case::Cut, NO_SERVER),
            (Case::Silence, NO_SERVER),
            (Case::Slow, NO_SERVER),
            (Case::Away, NO_SERVER),
            (Case::Credentials, NO_SERVER),
            (Case::Crash, NO_SERVER),
            (Case::NoLeak, NO_SERVER),
        ]
    }

    async fn corner(&self, _own_server: bool) -> Option<Box<dyn Corner>> {
        Some(Box::<Process>::default())
    }
}

#[derive(Default)]
struct Process {
    memory: Memory,
    seen: Arc<Mutex<Vec<Message>>>,
}

fn stored(message: Message) -> Stored {
    Stored {
        id: message.id,
        key: message.key,
        payload: message.payload.unwrap_or_default(),
        headers: BTreeMap::from_iter(message.headers),
    }
}

#[async_trait(?Send)]
impl Corner for Process {
    fn word(&self) -> &str {
        "suite"
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(self.memory.clone())
    }

    async fn ready(&self, transport: &dyn Transport) {
        let source = transport
            .bind(&self.binding("witness"))
            .await
            .unwrap()
            .remove(0);
        let mut reader = transport.subscribe(&source, "witness", None).await.unwrap();
        let seen = Arc::clone(&self.seen);
        tokio::spawn(async move {
            while let Ok(delivery) = reader.next().await {
                seen.lock().unwrap().push(delivery.message);
                let _ = delivery.ack.ack().await;
            }
        });
    }

    async fn stored(&mut self) -> Vec<Stored> {
        let seen = self.seen.lock().unwrap().clone();
        seen.into_iter().map(stored).collect()
    }

    async fn dead_letters(&mut self) -> Vec<Stored> {
        self.memory
            .dead_lettered()
            .into_iter()
            .map(stored)
            .collect()
    }

    async fn crash(&mut self) {
        unreachable!("an exception")
    }

    fn too_large(&self) -> usize {
        unreachable!("an exception")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_promise_of_a_transport() {
    exercise(&InMemory).await;
}

#[test]
fn the_table_says_so() {
    let page = include_str!("../../docs/reference/transports.md");
    assert_documented(&InMemory, page);
}
